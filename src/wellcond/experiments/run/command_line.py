"""The options of a run as command-line words."""

from __future__ import annotations

import shlex
from dataclasses import Field
from typing import Any

from wellcond.experiments.run.config import RunConfig, run_config


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


def command(config: RunConfig) -> str:
    """The command line that trains ``config``, with the options that differ from the defaults of its data set."""
    default = run_config(data=config.data).to_dict()
    words = ["wellcond", "train", "--data", config.data]
    for name, value in config.to_dict().items():
        if name == "data" or value == default[name]:
            continue
        words += option_words(name, value)
    return shlex.join(words)
