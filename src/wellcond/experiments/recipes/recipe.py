"""A recipe: the configurations of its rows at a given scale, and the paper's figures."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from wellcond._shared.names import require_known
from wellcond.experiments.errors import ConfigError
from wellcond.experiments.recipes.tasks import CLASSIFIER, TASKS

ASIDE = {"seed", "threads", "workers", "monitor_every", "record_every"}
"""Options that do not change what is being compared."""

FULL = "full"
"""The scale without changes."""


class PaperFigures(NamedTuple):
    """The paper's figures for a row in percent; None if not reported."""

    error: float
    std: float | None = None
    min: float | None = None
    top5_error: float | None = None
    failures: int | None = None


@dataclass(frozen=True)
class Row:
    """A row of the table."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    against: str | None = None  # the baseline; by default the first row
    paper: Mapping[str, PaperFigures] = field(default_factory=dict)  # by data set


@dataclass(frozen=True)
class Recipe:
    """An experiment: its runs, its number of seeds, and its output (``shows`` is ``table`` or ``figure``).

    The runs are of the configuration that ``TASKS`` has for its ``task``.
    """

    name: str
    title: str
    about: str
    options: Mapping[str, Any]
    rows: tuple[Row, ...]
    scales: Mapping[str, Mapping[str, Any]]
    seeds: int
    shows: str
    task: str = CLASSIFIER

    def with_rows(self, names: Sequence[str]) -> Recipe:
        """The recipe reduced to these rows and their baselines.

        Raises:
            ConfigError: an unknown name, with the closest valid one.
        """
        for name in names:
            require_known(name, [row.name for row in self.rows], f"row of recipe '{self.name}'", error=ConfigError)
        first = self.rows[0].name
        wanted = {*names, *(row.against or first for row in self.rows if row.name in names)}
        return replace(self, rows=tuple(row for row in self.rows if row.name in wanted))

    def configs(self, scale: str = FULL, seeds: int | None = None, **options: Any) -> dict[str, list[Any]]:
        """The runs of each row with seeds 0, 1, …. The recipe's options are overridden by those of the scale, of the
        row, and by ``options``, in this order; ``options`` must not contain an option of a row.

        Raises:
            ConfigError: an unknown scale, no seeds, an invalid option, or two identical rows.
        """
        require_known(scale, [FULL, *self.scales], f"scale of recipe '{self.name}'", error=ConfigError)
        count = self.seeds if seeds is None else seeds
        if count < 1:
            raise ConfigError(f"seeds must be at least 1, got {count}")
        found = {row.name: self._config(row, scale, options) for row in self.rows}
        for config in found.values():
            if len(same := [name for name, other in found.items() if other == config]) > 1:
                raise ConfigError(f"recipe '{self.name}': rows '{same[0]}' and '{same[1]}' are the same run")
        return {name: [replace(config, seed=seed) for seed in range(count)] for name, config in found.items()}

    def _config(self, row: Row, scale: str, options: Mapping[str, Any]) -> Any:
        if clash := row.options.keys() & options.keys():
            raise ConfigError(
                f"{sorted(clash)[0]} is set by row '{row.name}' of recipe '{self.name}', and cannot be the same in all "
                "rows: leave that row out with --rows, or edit a copy of the recipe"
            )
        chosen = {**self.options, **self.scales.get(scale, {}), **row.options, **options}
        try:
            return TASKS[self.task].configure(**chosen)
        except ConfigError as error:
            raise ConfigError(f"recipe '{self.name}', row '{row.name}': {error}") from None

    def heading(self, configs: Iterable[Any]) -> str:
        """The title, followed by all options that differ from the recipe at full scale."""
        chosen, full = next(iter(configs)), next(iter(self.configs(seeds=1).values()))[0]
        varied = {*ASIDE, *(name for row in self.rows for name in row.options)}
        names = [option.name for option in fields(chosen) if option.name not in varied]
        changed = [f"{n} {getattr(chosen, n)}" for n in names if getattr(chosen, n) != getattr(full, n)]
        return f"{self.title} — at another scale: {', '.join(changed)}" if changed else self.title

    def paper(self, data: str) -> dict[str, PaperFigures]:
        """The paper's figures by row, if the data set or its folder is named like one of the paper's."""
        key = re.sub("[^a-z0-9]", "", Path(data).name.lower())
        return {row.name: row.paper[key] for row in self.rows if key in row.paper}

    def against(self) -> dict[str, str]:
        """The baseline of each row, except of the rows that only serve as baselines."""
        return {
            row.name: row.against or self.rows[0].name
            for row in self.rows
            if row.against is not None or (row is not self.rows[0] and not self._is_baseline(row.name))
        }

    def _is_baseline(self, name: str) -> bool:
        return any(row.against == name for row in self.rows)
