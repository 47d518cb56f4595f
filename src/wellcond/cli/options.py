"""Options shared by several commands, including those of a run."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from wellcond.experiments.run.command_line import said_default
from wellcond.experiments.run.config import run_config

DEFAULT_COMPARISON = Path("comparison")

Resume = Annotated[bool, typer.Option("--resume", help="continue what the output folder holds")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="delete what the output folder holds and start over")]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]


def takes_run_options(**instead: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """`takes_options_of` a `RunConfig`."""
    return takes_options_of(run_config(), **instead)


def takes_options_of(example: Any, **instead: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make every field of a configuration an option of a command, which receives the given ones as a dictionary.

    The help has the defaults of its class, and those of the `example` where they differ.
    `instead` overrides the annotations of some fields, or adds options.
    """
    kinds = get_type_hints(type(example))
    options = {
        f.name: Annotated[
            kinds[f.name] | None, typer.Option(help=f.metadata["help"], show_default=said_default(f, example))
        ]
        for f in fields(example)
    }
    options |= instead

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def called(**given: Any) -> None:
            asked = {name: value for name in options if (value := given.pop(name, None)) is not None}
            command(asked, **given)

        _, *own = inspect.signature(command, eval_str=True).parameters.values()
        kind = inspect.Parameter.KEYWORD_ONLY
        shared = [inspect.Parameter(name, kind, default=None, annotation=a) for name, a in options.items()]
        called.__signature__ = inspect.Signature(  # pyright: ignore[reportFunctionMemberAccess]
            [*shared, *(parameter.replace(kind=kind) for parameter in own)]
        )
        called.__name__, called.__doc__ = command.__name__, command.__doc__
        return called

    return decorate


def listed(values: list[str]) -> list[str]:
    """All values of an option that may be repeated or comma-separated."""
    return [value.strip() for text in values for value in text.split(",")]
