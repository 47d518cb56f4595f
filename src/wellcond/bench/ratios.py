"""Ratios of repeated runs of the benchmarks, their noise, and what became slower than in an earlier file.

A ratio is a time over that of a reference which was timed in turns with it, in the same process: seconds of two days or
two machines cannot be compared, ratios can. Every benchmark runs several times, each in its own process. A ratio's
value is the median of the runs, and its noise their range over the median: what the same code differed by.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMAT = 1
Values = Mapping[str, Mapping[str, Sequence[float]]]
"""Of each script and each of its ratios, the value of every run."""


@dataclass(frozen=True)
class Change:
    """A ratio in two files.

    Attributes:
        script, name: whose it is.
        before, after: medians of the runs.
        noise: the sum of both ranges over their medians.
    """

    script: str
    name: str
    before: float
    after: float
    noise: float

    @property
    def growth(self) -> float:
        """By how much the ratio grew, relative to before; positive is slower."""
        return self.after / self.before - 1

    @property
    def is_slower(self) -> bool:
        """Whether it grew by more than the noise."""
        return self.growth > self.noise

    @property
    def is_faster(self) -> bool:
        """Whether it fell by more than the noise: the same question with before and after exchanged."""
        return self.before / self.after - 1 > self.noise


def noise(values: Sequence[float]) -> float:
    """The range of the runs over their median."""
    return (max(values) - min(values)) / statistics.median(values)


def changes(before: Values, after: Values) -> list[Change]:
    """Every ratio that is in both, the one that grew most first."""
    found = []
    for script, name in _names(before):
        if (new := after.get(script, {}).get(name)) is not None:
            old = before[script][name]
            medians = statistics.median(old), statistics.median(new)
            found.append(Change(script, name, *medians, noise(old) + noise(new)))
    return sorted(found, key=lambda change: -change.growth)


def only_in(one: Values, other: Values) -> list[tuple[str, str]]:
    """Script and name of each ratio that the other file does not have."""
    return [(script, name) for script, name in _names(one) if name not in other.get(script, {})]


def _names(values: Values) -> Iterator[tuple[str, str]]:
    for script, ratios in values.items():
        for name in ratios:
            yield script, name


def add_ratios_option(parser: argparse.ArgumentParser) -> None:
    """The option of a script that ``benchmarks/run_all.py`` runs."""
    parser.add_argument("--ratios", type=Path, help="write the ratios to this file, for run_all.py")


def write_ratios(path: Path | None, ratios: Mapping[str, float]) -> None:
    """Write what ``--ratios`` asks for; nothing without a path.

    Raises:
        ValueError: a ratio that is not positive and finite.
    """
    for name, value in ratios.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"the ratio '{name}' is {value}, but must be positive and finite")
    if path is not None:
        path.write_text(json.dumps(dict(ratios), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_values(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, list[float]]]]:
    """What ``benchmarks/run_all.py`` wrote: all of it, and the values of the runs.

    Raises:
        ValueError: the file has another format.
    """
    everything = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(everything, dict) or everything.get("format") != FORMAT:
        raise ValueError(f"{path} was not written by benchmarks/run_all.py in this version (format {FORMAT})")
    scripts = everything["scripts"]
    return everything, {
        script: {name: ratio["runs"] for name, ratio in found["ratios"].items()} for script, found in scripts.items()
    }
