"""The subcommands, in the order of the help."""

from __future__ import annotations

from typing import Annotated

import typer

import wellcond
from wellcond.cli.bench import bench
from wellcond.cli.compare import compare
from wellcond.cli.data import data
from wellcond.cli.inspect import inspect
from wellcond.cli.latents import latents
from wellcond.cli.recipes import recipes
from wellcond.cli.report import report
from wellcond.cli.reporting import say
from wellcond.cli.train import train

app: typer.Typer = typer.Typer(
    help="Spectral layers that stay well-conditioned: train, measure and compare.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def common(
    version: Annotated[bool, typer.Option("--version", help="print the version and exit")] = False,
) -> None:
    if version:
        say(f"wellcond {wellcond.__version__}")
        raise typer.Exit


for _command in (train, compare, recipes, data, inspect, report, latents, bench):
    app.command()(_command)
