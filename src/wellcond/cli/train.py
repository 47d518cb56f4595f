"""`wellcond train`: one run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from wellcond.cli.options import Debug, Overwrite, Resume, takes_run_options
from wellcond.cli.reporting import console, reporting, say
from wellcond.experiments.folders import read_config
from wellcond.experiments.run.config import RunConfig, refuse_what_nothing_takes, run_config


@takes_run_options()
def train(
    asked: dict[str, Any],
    out: Annotated[Path | None, typer.Option(help="the run's folder; by default runs/…")] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Train one network: weights, metrics, condition numbers and logs in one folder, and the test error."""
    again: list[str] = []
    with reporting(debug, logging.WARNING if console.is_terminal else logging.INFO, again):
        config = run_config(**asked)
        folder = out or run_folder(config)
        if resume and not overwrite:  # what is held there; `run` refuses what was asked beside it
            config = RunConfig.from_dict({**read_config(folder, "run"), **asked})
        refuse_what_nothing_takes(asked, [config])
        from wellcond.experiments.results.tables import run_table
        from wellcond.experiments.run.train import run
        from wellcond.experiments.show.render import for_terminal

        again.append(f"wellcond train --out {folder} --resume")
        result = run(config, folder, resume=resume, overwrite=overwrite, progress=console.is_terminal)
        console.print(for_terminal(run_table(result)))
        say(f"in {folder}")


def run_folder(config: RunConfig) -> Path:
    """Where it goes if nothing is said."""
    return Path("runs") / f"{Path(config.data).name}-{config.model}-{config.folder_name}"


def train_default(again: list[str]) -> Path:
    from wellcond.experiments.run.train import run as run_training

    config = run_config()
    folder = run_folder(config)
    again.append(f"wellcond train --out {folder} --resume")
    say(f"there is no run yet: training the default into {folder}")
    run_training(config, folder, progress=console.is_terminal)
    return folder
