"""The description of a comparison: its rows, their baselines, and the paper's figures.

It is made from a recipe, or from a grid with one row per configuration, and saved in the comparison's folder.
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
from wellcond.experiments.results.condition import kappa_over_range
from wellcond.experiments.results.statistics import Difference, differences
from wellcond.experiments.results.summary import by_label, labels
from wellcond.experiments.run.config import RunConfig
from wellcond.experiments.run.result import RunResult


@dataclass(frozen=True)
class Experiment:
    """The rows of a comparison: a name for every configuration, regardless of seed and CPU threads.

    ``command`` is the command line that began it; `comparison_command` has its present seeds and threads.
    """

    heading: str
    names: Mapping[Any, str]
    against: Mapping[str, str]
    paper: Mapping[str, PaperFigures]
    recipe: str | None = None
    shows: str = "table"
    command: str | None = None

    @classmethod
    def of_recipe(cls, recipe: Recipe, configs: Mapping[str, Sequence[Any]], command: str | None = None) -> Experiment:
        """From the configurations of each row of a recipe; ``command`` is the command line."""
        every = [config for row in configs.values() for config in row]
        names = {_key(config): row for row, row_configs in configs.items() for config in row_configs}
        paper = recipe.paper(every[0].data)
        return cls(recipe.heading(every), names, recipe.against(), paper, recipe.name, recipe.shows, command)

    @classmethod
    def of_grid(cls, configs: Sequence[RunConfig]) -> Experiment:
        """Each configuration is a row; the first is the baseline."""
        label, first = labels(configs), configs[0]
        names = {_key(config): label(config) for config in configs}
        models = ", ".join(dict.fromkeys(config.model for config in configs))
        data = ", ".join(Path(name).name for name in dict.fromkeys(config.data for config in configs))
        epochs = ", ".join(dict.fromkeys(str(config.epochs) for config in configs))
        against = {name: label(first) for name in names.values() if name != label(first)}
        return cls(f"{models} on {data}, {epochs} epochs", names, against, {})

    def label(self, config: Any) -> str:
        """The row of a run; a run that was extended since gets a row of its own."""
        key = _key(config)
        if key in self.names:
            return self.names[key]
        was = (row for held, row in self.names.items() if replace(held, epochs=config.epochs) == key)
        return f"{next(was, config.label)}, {config.epochs} epochs"

    def folder(self, config: Any) -> str:
        """The name of a run's folder: from its configuration in a grid, from its row in a recipe."""
        if self.recipe is None:
            return config.folder_name
        return f"{re.sub('[^a-zA-Z0-9]+', '-', self.label(config)).strip('-').lower()}-seed{config.seed}"

    def differences(self, results: Iterable[RunResult]) -> list[Difference]:
        """The differences in test error between each row and its baseline."""
        return differences(by_label(results, self.label), self.against)

    def conditioning(self, results: Iterable[RunResult], over_range: bool = False) -> list[Difference]:
        """The same for log10 κ(P) at the first layer, or for that over its numerical range; rows without a monitored
        layer are omitted."""
        kappa = kappa_over_range if over_range else _kappa
        return differences(by_label(results, self.label), self.against, lambda run: math.log10(kappa(run)))

    def papers_figures(self) -> dict[str, str]:
        """The paper's figures for each row as text: error in percent, deviation, minimum, top-5 error, failures."""
        found = {}
        for row, figures in self.paper.items():
            std = "" if figures.std is None else f" ± {figures.std:.2f}"
            minimum = "" if figures.min is None else f", min {figures.min:.2f}"
            top5 = "" if figures.top5_error is None else f", top-5 {figures.top5_error:.2f}"
            failures = "" if figures.failures is None else f", {figures.failures} failures"
            found[row] = f"{figures.error:.2f}{std}{minimum}{top5}{failures}"
        return found

    def papers_differences(self) -> dict[str, float]:
        """The paper's differences in percent."""
        both = {row: other for row, other in self.against.items() if row in self.paper and other in self.paper}
        return {row: self.paper[row].error - self.paper[other].error for row, other in both.items()}

    def to_dict(self, folders: Mapping[Any, str]) -> dict[str, Any]:
        """For the comparison's `config.json`; ``rows`` and ``folders`` are in the order of its runs."""
        values: dict[str, Any] = {name: getattr(self, name) for name in ("heading", "recipe", "shows", "command")}
        values |= {"rows": [self.label(config) for config in folders], "folders": list(folders.values())}
        return values | {"against": dict(self.against), "paper": {k: v._asdict() for k, v in self.paper.items()}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | None, configs: Sequence[RunConfig]) -> Experiment:
        """The inverse of `to_dict`; None, as in comparisons of earlier versions, means a grid."""
        if values is None:
            return cls.of_grid(configs)
        try:
            names = {_key(config): row for config, row in zip(configs, values["rows"], strict=True)}
            paper = {row: PaperFigures(**figures) for row, figures in values["paper"].items()}
            kept = {name: values[name] for name in ("heading", "recipe", "shows", "against")}
            return cls(names=names, paper=paper, command=values.get("command"), **kept)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FolderError(f"this is not the description of a comparison ({error})") from error


def _kappa(run: RunResult) -> float:
    return run.conditions[0].kappa if run.conditions else math.nan


def _key(config: Any) -> Any:
    return replace(config, seed=0, threads=None)
