"""`wellcond report`: a page about runs and comparisons."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from wellcond.cli.compare import compare
from wellcond.cli.options import DEFAULT_COMPARISON, Debug
from wellcond.cli.reporting import reporting, say, stderr


def report(
    runs: Annotated[list[Path] | None, typer.Argument(help="folders of runs or comparisons, or their parents")] = None,
    out: Annotated[Path, typer.Option(help="output folder; an existing report is replaced")] = Path("report"),
    debug: Debug = False,
) -> None:
    """Write one self-contained HTML page, and its figures as PNG and SVG.

    Without RUNS it reports on the comparison in comparison/; if there is none, the default one is run first.
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
