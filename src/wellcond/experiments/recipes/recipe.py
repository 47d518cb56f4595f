"""A recipe: rows of run options, at a scale, as configurations; and what the paper found for each row."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from wellcond._shared.names import require_known
from wellcond.experiments.errors import ConfigError
from wellcond.experiments.run.config import RunConfig, run_config
from wellcond.experiments.run.parts import takes_solver

ASIDE = {"seed", "threads", "workers", "monitor_every"}
"""Options that change how a run is made, and not what it finds."""

FULL = "full"
"""The scale of the recipe as it stands."""


class PaperFigures(NamedTuple):
    """What the paper reports of a row, in percent; None where it does not."""

    error: float
    std: float | None = None
    min: float | None = None
    top5_error: float | None = None
    failures: int | None = None


@dataclass(frozen=True)
class Row:
    """A line of the table: its name, the options in which it departs from the others, the name of the row that it is
    compared with (the first, where there is none), and the paper's figures by data set."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    against: str | None = None
    paper: Mapping[str, PaperFigures] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """An experiment: what is run, how often, and what is shown of it (``table`` or ``figure``)."""

    name: str
    title: str
    about: str
    options: Mapping[str, Any]
    rows: tuple[Row, ...]
    scales: Mapping[str, Mapping[str, Any]]
    seeds: int
    shows: str

    def with_rows(self, names: Sequence[str]) -> Recipe:
        """With these rows alone, and those that they are compared with.

        Raises:
            ConfigError: an unknown name, with the nearest right one.
        """
        for name in names:
            require_known(name, [row.name for row in self.rows], f"row of recipe '{self.name}'", error=ConfigError)
        first = self.rows[0].name
        wanted = {*names, *(row.against or first for row in self.rows if row.name in names)}
        return replace(self, rows=tuple(row for row in self.rows if row.name in wanted))

    def configs(self, scale: str = FULL, seeds: int | None = None, **options: Any) -> dict[str, list[RunConfig]]:
        """The runs of each row, seeded 0, 1, …: with the recipe's options, changed by the scale, by the row and by
        ``options``, in this order. No option may be one that a row is about.

        Raises:
            ConfigError: an unknown scale, no seed, an option that cannot be, or two rows that come out the same.
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

    def _config(self, row: Row, scale: str, options: Mapping[str, Any]) -> RunConfig:
        if clash := row.options.keys() & options.keys():
            raise ConfigError(
                f"{sorted(clash)[0]} is what row '{row.name}' of recipe '{self.name}' is about, and cannot be the same "
                "in all rows: leave that row out by --rows, or change a copy of the recipe"
            )
        chosen = {**self.options, **self.scales.get(scale, {}), **row.options, **options}
        if not takes_solver(chosen.get("norm", RunConfig.norm), chosen.get("head", RunConfig.head)):
            chosen["solver"] = None  # of the others
        try:
            return run_config(**chosen)
        except ConfigError as error:
            raise ConfigError(f"recipe '{self.name}', row '{row.name}': {error}") from None

    def heading(self, configs: Iterable[RunConfig]) -> str:
        """The title, with all in which these runs are not those of the recipe at its full scale."""
        chosen, full = next(iter(configs)), next(iter(self.configs(seeds=1).values()))[0]
        varied = {*ASIDE, *(name for row in self.rows for name in row.options)}
        departures = [
            f"{said.name} {getattr(chosen, said.name)}"
            for said in fields(RunConfig)
            if said.name not in varied and getattr(chosen, said.name) != getattr(full, said.name)
        ]
        return self.title + (f" — at another scale: {', '.join(departures)}" if departures else "")

    def paper(self, data: str) -> dict[str, PaperFigures]:
        """The paper's figures by row, where the data set (or the folder that holds it) has the name of one of its."""
        key = re.sub("[^a-z0-9]", "", Path(data).name.lower())
        return {row.name: row.paper[key] for row in self.rows if key in row.paper}

    def against(self) -> dict[str, str]:
        """For each row, except those that others are compared with, the row that it is compared with."""
        return {
            row.name: row.against or self.rows[0].name
            for row in self.rows
            if row.against is not None or (row is not self.rows[0] and not self._is_baseline(row.name))
        }

    def _is_baseline(self, name: str) -> bool:
        return any(row.against == name for row in self.rows)
