"""`wellcond data`: an overview of a data set."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from wellcond.cli.options import Debug
from wellcond.cli.reporting import console, reporting, say


def data(
    source: Annotated[str, typer.Argument(metavar="PATH", help="as for train --data")] = "digits",
    image_size: Annotated[int | None, typer.Option(help="as for train")] = None,
    decode: Annotated[bool, typer.Option("--decode", help="decode every image, to find truncated ones")] = False,
    debug: Debug = False,
) -> None:
    """Show a data set: images by split and class, sizes and modes, and what was skipped and why."""
    with reporting(debug, logging.WARNING, []):
        from wellcond.experiments.data.overview import overview
        from wellcond.experiments.results.images import images_table
        from wellcond.experiments.show.render import for_terminal

        found = overview(source, image_size=image_size, decode=decode)
        console.print(for_terminal(images_table(found)))
        for line in found.lines():
            say(line)
        if found.trouble:
            raise ValueError(found.trouble)
