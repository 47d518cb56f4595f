"""The options of a run as command-line words."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import Field
from typing import Any

from wellcond.experiments.run.config import RunConfig, run_config

OF_RUNS = ("--seeds", "--threads")
"""The options in the command line of a comparison that its runs tell: extended, or resumed, they may be others."""


def said_default(option: Field[Any], example: Any) -> str:
    """The default shown in the help: the paper's, and where it differs that of a configuration, by its data set."""
    values = dict.fromkeys((option.default, getattr(example, option.name)))
    texts = [option.metadata["unset"] if value is None else str(value) for value in values]
    if option.type == "bool":
        texts = [f"{'' if value else 'no-'}{option.name}" for value in values]
    return f"; {example.data}: ".join(texts)


def option_words(name: str, value: Any) -> list[str]:
    """The words that set an option."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", str(value)]


def comparison_command(saved: str | None, configs: Sequence[Any]) -> str | None:
    """The command line of a comparison with the seeds and CPU threads of its runs, which may be more than at first."""
    if saved is None:
        return None
    words = shlex.split(saved)
    kept = [word for before, word in zip(["", *words], words, strict=False) if not {before, word} & set(OF_RUNS)]
    kept += option_words(OF_RUNS[0].removeprefix("--"), 1 + max(config.seed for config in configs))
    threads = {config.threads for config in configs}
    if len(threads) == 1 and None not in threads:
        kept += option_words(OF_RUNS[1].removeprefix("--"), *threads)
    return shlex.join(kept)


def command(config: RunConfig) -> str:
    """The command line that trains ``config``, with the options that differ from the defaults of its data set."""
    default = run_config(data=config.data).to_dict()
    words = ["wellcond", "train", "--data", config.data]
    for name, value in config.to_dict().items():
        if name == "data" or value == default[name]:
            continue
        words += option_words(name, value)
    return shlex.join(words)
