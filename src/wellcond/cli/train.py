"""`wellcond train`: one run."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from wellcond.cli.options import Debug, Overwrite, Resume, takes_run_options
from wellcond.cli.reporting import console, reporting, say
from wellcond.experiments.folders import read_config
from wellcond.experiments.grid.configs import refuse_unused
from wellcond.experiments.run.config import RunConfig, run_config


@takes_run_options()
def train(
    asked: dict[str, Any],
    out: Annotated[Path | None, typer.Option(help="output folder; default runs/…")] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Train one network and test it; writes weights, metrics, condition numbers and logs to one folder."""
    resume_commands: list[str] = []
    with reporting(debug, logging.WARNING if console.is_terminal else logging.INFO, resume_commands):
        config = run_config(**asked)
        folder = out or run_folder(config)
        if resume and not overwrite:  # `run` rejects conflicting options
            given = {name: getattr(config, name) for name in asked}  # as they are written in a configuration
            config = RunConfig.from_dict({**read_config(folder, "run"), **given})
        refuse_unused(asked, [config])
        from wellcond.experiments.results.tables import run_table
        from wellcond.experiments.run.train import run
        from wellcond.experiments.show.render import for_terminal

        resume_commands.append(shlex.join(["wellcond", "train", "--out", str(folder), "--resume"]))
        result = run(config, folder, resume=resume, overwrite=overwrite, progress=console.is_terminal)
        console.print(for_terminal(run_table(result)))
        say(f"in {folder}")


def run_folder(config: RunConfig) -> Path:
    """The default output folder of a run."""
    return Path("runs") / f"{Path(config.data).name}-{config.model}-{config.folder_name}"


def train_default(resume_commands: list[str]) -> Path:
    """Train the default configuration; the folder of the run."""
    from wellcond.experiments.run.train import run as run_training

    config = run_config()
    folder = run_folder(config)
    resume_commands.append(shlex.join(["wellcond", "train", "--out", str(folder), "--resume"]))
    say(f"there is no run yet: training the default into {folder}")
    run_training(config, folder, progress=console.is_terminal)
    return folder
