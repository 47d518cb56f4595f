"""The options of a run as they are written on the command line."""

from __future__ import annotations

import shlex
from dataclasses import Field
from typing import Any

from wellcond.experiments.run.config import RunConfig, run_config


def said_default(option: Field[Any]) -> str:
    """What the command line says of the default of a field: the paper's, and the digits' own."""
    values = dict.fromkeys((option.default, getattr(run_config(), option.name)))
    texts = [option.metadata["unset"] if value is None else str(value) for value in values]
    if option.type == "bool":
        texts = [f"{'' if value else 'no-'}{option.name}" for value in values]
    return "; digits: ".join(texts)


def option_words(name: str, value: Any) -> list[str]:
    """The words that set the option."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", str(value)]


def command(config: RunConfig) -> str:
    """The command line that trains ``config`` again: what departs from the settings of its data."""
    default = run_config(data=config.data).to_dict()
    words = ["wellcond", "train", "--data", config.data]
    for name, value in config.to_dict().items():
        if name == "data" or value == default[name]:
            continue
        words += option_words(name, value)
    return shlex.join(words)
