"""`wellcond latents`: one generator."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from wellcond.cli.options import Debug, Overwrite, Resume, takes_options_of
from wellcond.cli.reporting import console, reporting, say
from wellcond.experiments.folders import read_config
from wellcond.experiments.latents.config import LatentsConfig, latents_config, refuse_unused


@takes_options_of(latents_config())
def latents(
    asked: dict[str, Any],
    out: Annotated[Path | None, typer.Option(help="output folder; default generators/…")] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Train one generator and measure its latent directions; writes weights, samples, traversals and metrics."""
    resume_commands: list[str] = []
    with reporting(debug, logging.WARNING if console.is_terminal else logging.INFO, resume_commands):
        config = latents_config(**asked)
        folder = out or Path("generators") / config.folder_name
        if resume and not overwrite:  # `train_generator` rejects conflicting options
            given = {name: getattr(config, name) for name in asked}  # as they are written in a configuration
            config = LatentsConfig.from_dict({**read_config(folder, "generator"), **given})
        refuse_unused(asked, config)
        from wellcond.experiments.latents.table import generator_table
        from wellcond.experiments.latents.train import train_generator
        from wellcond.experiments.show.render import for_terminal

        resume_commands.append(shlex.join(["wellcond", "latents", "--out", str(folder), "--resume"]))
        result = train_generator(config, folder, resume=resume, overwrite=overwrite, progress=console.is_terminal)
        console.print(for_terminal(generator_table(result)))
        say(f"in {folder}: traversal.png, samples, metrics.csv, result.json")
