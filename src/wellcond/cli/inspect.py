"""`wellcond inspect`: the condition numbers of a network's layers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from wellcond.cli.options import DEFAULT_COMPARISON, Debug, listed
from wellcond.cli.reporting import console, reporting, say
from wellcond.cli.train import train_default


def inspect(
    run: Annotated[Path | None, typer.Argument(help="the folder of a run, or one of its checkpoints")] = None,
    model: Annotated[
        str | None, typer.Option(help="instead of RUN: timm:NAME, torchvision:NAME, transformers:NAME, MODULE:CALLABLE")
    ] = None,
    data: Annotated[str | None, typer.Option(help="images to look at; those of the run, of a model digits")] = None,
    split: Annotated[str, typer.Option(help="train, validation or test")] = "train",
    image_size: Annotated[int | None, typer.Option(help="as --image-size of train; by default as in the run")] = None,
    batches: Annotated[int, typer.Option(help="how many batches at most")] = 10,
    batch_size: Annotated[int | None, typer.Option(help="images in each; as in the run, of a model 128")] = None,
    layers: Annotated[
        list[str] | None, typer.Option(help="names or patterns as 'stage1.*.norm?'; default spectral layers, or norms")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="write every batch's numbers here too: .csv or .jsonl")] = None,
    picture: Annotated[Path | None, typer.Option(help="draw the eigenvalues of each layer here, PNG and SVG")] = None,
    debug: Debug = False,
) -> None:
    """Condition numbers of a checkpoint's layers on a data set, or of those of any model that can be imported.

    Without RUN it takes the newest run below runs/ and comparison/, and if there is none trains the default first.
    """
    again: list[str] = []
    with reporting(debug, logging.INFO, again):
        from wellcond.experiments.inspect import inspect as inspect_run
        from wellcond.experiments.inspect import inspect_model, newest_run
        from wellcond.experiments.show.render import for_terminal

        options = {
            **{"data": data, "image_size": image_size, "split": split, "batches": batches, "batch_size": batch_size},
            **{"layers": listed(layers or []), "out": out, "picture": picture},
        }
        if model is None:
            run = run or newest_run((Path("runs"), DEFAULT_COMPARISON / "runs")) or train_default(again)
            found = inspect_run(run, **options)
        elif run is not None:
            raise ValueError(f"give a run or a --model, not both: '{run}', '{model}'")
        else:
            found = inspect_model(model, **options)
        console.print(for_terminal(found.table()))
        for line in found.lines():
            say(line)
        if picture is not None:
            say(f"in {picture.with_suffix('.png')} and {picture.with_suffix('.svg')}: the eigenvalues")
