"""`wellcond report`: a page on runs and comparisons."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from wellcond.cli.compare import compare
from wellcond.cli.options import DEFAULT_COMPARISON, Debug
from wellcond.cli.reporting import reporting, say, stderr


def report(
    runs: Annotated[list[Path] | None, typer.Argument(help="folders of runs or comparisons, or that hold such")] = None,
    out: Annotated[Path, typer.Option(help="the report's folder; one that is there is replaced")] = Path("report"),
    debug: Debug = False,
) -> None:
    """One page of HTML that needs nothing else, and its figures as PNG and SVG.

    Without RUNS it is on the comparison in the folder comparison/; if there is none, that is made first.
    """
    with reporting(debug, logging.WARNING, ["wellcond compare --resume"]):
        if not runs:
            runs = [DEFAULT_COMPARISON]
            if not DEFAULT_COMPARISON.exists():
                compare(out=DEFAULT_COMPARISON)
        from wellcond.experiments.report import report as write_report

        page, notes = write_report(runs, out)
        for note in notes:
            say(note, stderr)
        say(f"in {out}: {page.name}, condition.png, condition.svg, learning.png, learning.svg")
