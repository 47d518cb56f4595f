"""What a comparison is about, beside its runs: its rows, what each is compared with, and the paper's figures.

It is made from a recipe, or from a grid whose rows are its configurations, and is kept in the comparison's folder.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wellcond.experiments.errors import FolderError
from wellcond.experiments.recipes import PaperFigures, Recipe
from wellcond.experiments.results.statistics import Difference, differences
from wellcond.experiments.results.summary import by_label, labels
from wellcond.experiments.run.config import RunConfig
from wellcond.experiments.run.result import RunResult


@dataclass(frozen=True)
class Experiment:
    """The rows of a comparison: a name for every configuration, whatever its seed and CPU threads."""

    heading: str
    names: Mapping[RunConfig, str]
    against: Mapping[str, str]
    paper: Mapping[str, PaperFigures]
    recipe: str | None = None
    shows: str = "table"
    command: str | None = None

    @classmethod
    def of_recipe(
        cls, recipe: Recipe, configs: Mapping[str, Sequence[RunConfig]], command: str | None = None
    ) -> Experiment:
        """Of the runs of each row of a recipe; ``command`` is the line that asked for them."""
        every = [config for row in configs.values() for config in row]
        names = {_key(config): row for row, its in configs.items() for config in its}
        paper = recipe.paper(every[0].data)
        return cls(recipe.heading(every), names, recipe.against(), paper, recipe.name, recipe.shows, command)

    @classmethod
    def of_grid(cls, configs: Sequence[RunConfig]) -> Experiment:
        """Each configuration is a row, and compared with the first."""
        label, first = labels(configs), configs[0]
        names = {_key(config): label(config) for config in configs}
        models, data, epochs = (
            list(dict.fromkeys(getattr(c, n) for c in configs)) for n in ("model", "data", "epochs")
        )
        places = ", ".join(Path(one).name for one in data)
        heading = f"{', '.join(models)} on {places}, {', '.join(map(str, epochs))} epochs"
        return cls(heading, names, {name: label(first) for name in names.values() if name != label(first)}, {})

    def label(self, config: RunConfig) -> str:
        """The row of a run; of one that was made longer since, a row of its own."""
        key = _key(config)
        if key in self.names:
            return self.names[key]
        was = (row for held, row in self.names.items() if replace(held, epochs=config.epochs) == key)
        return f"{next(was, config.label)}, {config.epochs} epochs"

    def folder(self, config: RunConfig) -> str:
        """The folder of a run: of a grid as the run would be called alone, of a recipe by the row's name."""
        if self.recipe is None:
            return config.folder_name
        return f"{re.sub('[^a-zA-Z0-9]+', '-', self.label(config)).strip('-').lower()}-seed{config.seed}"

    def differences(self, results: Iterable[RunResult]) -> list[Difference]:
        """Of the rows from those that they are compared with."""
        return differences(by_label(results, self.label), self.against)

    def conditioning(self, results: Iterable[RunResult]) -> list[Difference]:
        """Of the common logarithms of κ(P) at the first layer; rows where it is infinite are left out."""
        return differences(by_label(results, self.label), self.against, _decades)

    def papers_figures(self) -> dict[str, str]:
        """What the paper reports of each row: error in percent, deviation, minimum, top-5 error, failures."""
        found = {}
        for row, its in self.paper.items():
            spread = "" if its.std is None else f" ± {its.std:.2f}"
            least = "" if its.min is None else f", min {its.min:.2f}"
            top5 = "" if its.top5_error is None else f", top-5 {its.top5_error:.2f}"
            failures = "" if its.failures is None else f", {its.failures} failures"
            found[row] = f"{its.error:.2f}{spread}{least}{top5}{failures}"
        return found

    def papers_differences(self) -> dict[str, float]:
        """Those that the paper reports, in percent."""
        both = {row: other for row, other in self.against.items() if row in self.paper and other in self.paper}
        return {row: self.paper[row].error - self.paper[other].error for row, other in both.items()}

    def to_dict(self, folders: Mapping[RunConfig, str]) -> dict[str, Any]:
        """For the comparison's `config.json`; ``rows`` and ``folders`` are in the order of its runs."""
        values: dict[str, Any] = {name: getattr(self, name) for name in ("heading", "recipe", "shows", "command")}
        values |= {"rows": [self.label(config) for config in folders], "folders": list(folders.values())}
        return values | {"against": dict(self.against), "paper": {k: v._asdict() for k, v in self.paper.items()}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | None, configs: Sequence[RunConfig]) -> Experiment:
        """The inverse of `to_dict`; comparisons of earlier versions have none and are grids."""
        if values is None:
            return cls.of_grid(configs)
        try:
            names = {_key(config): row for config, row in zip(configs, values["rows"], strict=True)}
            paper = {row: PaperFigures(**figures) for row, figures in values["paper"].items()}
            kept = {name: values[name] for name in ("heading", "recipe", "shows", "against")}
            return cls(names=names, paper=paper, command=values.get("command"), **kept)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FolderError(f"this is not the description of a comparison ({error})") from error


def _decades(run: RunResult) -> float:
    return math.log10(run.conditions[0].kappa) if run.conditions else math.nan


def _key(config: RunConfig) -> RunConfig:
    return replace(config, seed=0, threads=None)
