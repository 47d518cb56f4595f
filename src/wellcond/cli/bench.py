"""`wellcond bench`: speed, memory and error of every solver on this machine."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from wellcond.cli.options import Debug, Overwrite, listed
from wellcond.cli.reporting import console, reporting, say


def bench(
    full: Annotated[bool, typer.Option("--full/--quick", help="all shapes (minutes), or a few (a minute)")] = False,
    task: Annotated[list[str] | None, typer.Option(help="repeat, or separate with commas; default all")] = None,
    shapes: Annotated[str | None, typer.Option(help="128x64x64 (matrices), 32x256x7x7 (maps), …")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default cuda if available")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or float64")] = "float32",
    seconds: Annotated[float | None, typer.Option(help="timing budget per case; default 1.5, with --full 8")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads")] = None,
    out: Annotated[Path, typer.Option(help="output folder")] = Path("benchmark"),
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Measure speed, memory and error of every solver and layer, against autograd and other installed packages."""
    with reporting(debug, logging.WARNING, []):
        from wellcond.bench import report
        from wellcond.bench.cases import parse_shapes
        from wellcond.bench.run import bench as run_bench
        from wellcond.experiments.show.render import for_terminal

        results, remarks = run_bench(
            out,
            full=full,
            tasks=listed(task) if task else None,
            shapes=parse_shapes(shapes) if shapes else None,
            device=device,
            dtype=dtype,
            seconds=seconds,
            threads=threads,
            overwrite=overwrite,
            finished=lambda index, count, result: say(f"[{index + 1}/{count}] {report.line(result)}"),
        )
        for table in report.tables(results):
            console.print(for_terminal(table))
        for line in remarks:
            say(line)
        say(f"in {out}: bench.json, tables.md, speed.png, speed.svg")
