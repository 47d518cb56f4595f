"""The configurations of a grid: every combination of norm, head, treatment and seed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from wellcond.experiments.errors import ConfigError
from wellcond.experiments.run.config import NO_TREATMENT, RunConfig, run_config
from wellcond.experiments.run.parts import NORMS, is_treatable, takes_solver


def grid(
    norms: Sequence[str], heads: Sequence[str], treats: Sequence[str], seeds: Iterable[int], **options: Any
) -> list[RunConfig]:
    """Every combination once. Combinations without a spectral layer are untreated; those without a solver take none.

    Raises:
        ConfigError: an invalid `RunConfig`, or a treatment or solver that no combination takes.
    """
    parts = [(norm, head) for head in heads for norm in norms]
    nowhere_treatable = not any(is_treatable(norm, head) for norm, head in parts)
    nowhere_solver = not any(takes_solver(norm, head) for norm, head in parts)
    solver = options.pop("solver", None)
    seeds, configs = list(seeds), []
    for norm, head in dict.fromkeys(parts):
        # What no combination takes is passed on, for RunConfig to reject.
        own = dict(options, norm=norm, head=head)
        own["solver"] = solver if nowhere_solver or takes_solver(norm, head) else None
        treatable = nowhere_treatable or is_treatable(norm, head)
        for treat in dict.fromkeys(treat if treatable else NO_TREATMENT for treat in treats):
            configs += [run_config(**own, treat=treat, seed=seed) for seed in seeds]
    return configs


def refuse_unused(asked: Iterable[str], configs: Sequence[RunConfig]) -> None:
    """Reject options that were given but that no run uses.

    Raises:
        ConfigError: names the option and what it belongs to.
    """
    norms = "norms 'zca' and 'iter', and the norm is another"
    belongs_to: dict[str, str] = {}
    if not any(NORMS[config.norm].spectral for config in configs):
        belongs_to |= dict.fromkeys(("eps", "groups", "running", "norm_weight"), norms)
    if not any("ow" in config.treat.split("+") for config in configs):
        belongs_to["ow_map"] = "treatment 'ow', and there is none"
    for name in asked:
        if name in belongs_to:
            raise ConfigError(f"--{name.replace('_', '-')} is an option of {belongs_to[name]}; leave it out")
