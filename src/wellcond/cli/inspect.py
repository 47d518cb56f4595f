"""`wellcond inspect`: the condition numbers of a network's layers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from wellcond.cli.options import DEFAULT_COMPARISON, Debug, listed
from wellcond.cli.reporting import console, reporting, say
from wellcond.cli.train import train_default


def inspect(
    run: Annotated[Path | None, typer.Argument(help="a run's folder or one of its checkpoints")] = None,
    model: Annotated[
        str | None, typer.Option(help="instead of RUN: timm:NAME, torchvision:NAME, transformers:NAME, MODULE:CALLABLE")
    ] = None,
    data: Annotated[str | None, typer.Option(help="images to use; default the run's, or digits for --model")] = None,
    split: Annotated[str, typer.Option(help="train, validation or test")] = "train",
    image_size: Annotated[int | None, typer.Option(help="as for train; default as in the run")] = None,
    batches: Annotated[int, typer.Option(help="maximum number of batches")] = 10,
    batch_size: Annotated[int | None, typer.Option(help="images per batch; default as in the run, else 128")] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option(help="names or patterns such as 'stage1.*.norm?'; default spectral layers, or norms"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="also write every batch's numbers to this .csv or .jsonl")] = None,
    picture: Annotated[Path | None, typer.Option(help="plot the eigenvalues here, as PNG and SVG")] = None,
    debug: Debug = False,
) -> None:
    """Condition numbers of the layers of a checkpoint, or of any importable model, on a data set.

    Without RUN the newest run in runs/ and comparison/ is used; if there is none, the default is trained first.
    """
    resume_commands: list[str] = []
    with reporting(debug, logging.INFO, resume_commands):
        from wellcond.experiments.inspect import inspect as inspect_run
        from wellcond.experiments.inspect import inspect_model, newest_run
        from wellcond.experiments.show.render import for_terminal

        options: dict[str, Any] = dict(
            data=data, image_size=image_size, split=split, batches=batches, batch_size=batch_size
        )
        options |= dict(layers=listed(layers or []), out=out, picture=picture)
        if model is None:
            run = run or newest_run((Path("runs"), DEFAULT_COMPARISON / "runs")) or train_default(resume_commands)
            found = inspect_run(run, **options)
        elif run is not None:
            raise ValueError(f"give a run or a --model, not both: '{run}', '{model}'")
        else:
            found = inspect_model(model, **options)
        console.print(for_terminal(found.table()))
        for line in found.lines():
            say(line)
        if picture is not None:
            say(f"eigenvalues plotted in {picture.with_suffix('.png')} and {picture.with_suffix('.svg')}")
