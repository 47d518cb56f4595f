"""What the runs of a recipe are: the class of their configurations, and how one is made from options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from wellcond.experiments.latents.config import LatentsConfig, latents_config
from wellcond.experiments.run.config import RunConfig, run_config
from wellcond.experiments.run.parts import takes_solver


class RecipeTask(NamedTuple):
    """The class of a configuration, and what makes one from the given options."""

    config: type
    configure: Callable[..., Any]


def _classifier(**options: Any) -> RunConfig:
    """Without the solver where no layer takes one."""
    if not takes_solver(options.get("norm", RunConfig.norm), options.get("head", RunConfig.head)):
        options["solver"] = None
    return run_config(**options)


CLASSIFIER, GENERATOR = "classifier", "generator"
TASKS = {CLASSIFIER: RecipeTask(RunConfig, _classifier), GENERATOR: RecipeTask(LatentsConfig, latents_config)}
