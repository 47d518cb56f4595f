"""What users may rely on, as text: every public name with its signature, every option of the command.

`public_api.txt` is that text, kept; a difference is a change that users notice, and has to be meant.

    python tests/public_api.py      # write public_api.txt anew, then look at `git diff`
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import typer

KEPT = Path(__file__).with_name("public_api.txt")
PACKAGES = (
    "linalg",
    "nn",
    "nn.functional",
    "orthogonality",
    "monitor",
    "lightning",
    "transformers",
    "accelerate",
    "metrics",
    "sklearn",
)
OURS_TO_CALL = ("forward", "update", "compute", "fit", "transform", "state_dict", "load_state_dict")


def signature(function: Any) -> str:
    """Names, kinds and defaults of the parameters. Types are left out: they are written in several ways."""
    found = inspect.signature(function)
    bare = [
        p.replace(annotation=p.empty, default="..." if "object at 0x" in repr(p.default) else p.default)
        for p in found.parameters.values()
    ]
    return str(found.replace(parameters=bare, return_annotation=found.empty))


def members(cls: type, public: set[type]) -> Iterator[str]:
    """Public methods, properties and attributes that users of the class call.

    Those of a public base stand there, and those that a framework calls (``on_fit_start``, ``extra_repr``) are the
    framework's to change, but for ``forward`` and its like, whose arguments are ours.
    """
    ours = [base for base in cls.__mro__ if base.__module__.split(".")[0] == "wellcond"]
    theirs = [base for base in cls.__mro__ if base not in ours and base is not object]
    owners = [base for base in ours if base is cls or base not in public]
    names = {name for owner in owners for name in vars(owner) if not name.startswith("_")}
    names |= {name for owner in owners for name in getattr(owner, "__dataclass_fields__", {})}
    for name in sorted(names):
        if name not in OURS_TO_CALL and any(hasattr(base, name) for base in theirs):
            continue
        found = inspect.getattr_static(cls, name, None)
        if isinstance(found, (staticmethod, classmethod)):
            found = found.__func__
        yield f"{name}{signature(found)}" if inspect.isfunction(found) else name


def entries(module: ModuleType, public: set[type]) -> Iterator[str]:
    """A line for every public name of a package, and one for every member of a class, indented."""
    for name in sorted(module.__all__):
        found = getattr(module, name)
        full = f"{module.__name__}.{name}"
        if inspect.isclass(found):
            if issubclass(found, BaseException):  # what it can be caught by is what matters
                yield f"class {full} < {', '.join(base.__name__ for base in found.__bases__)}"
                continue
            yield f"class {full}{signature(found)}"
            yield from (f"    {member}" for member in members(found, public))
        elif inspect.isfunction(found):
            yield f"{full}{signature(found)}"
        else:
            values = get_args(found) or (found if isinstance(found, (dict, tuple)) else (type(found).__name__,))
            yield f"{full}: {', '.join(values)}"


def options() -> Iterator[str]:
    """Every subcommand of the command line with the names of its arguments and options."""
    from wellcond.cli import app

    group: Any = typer.main.get_command(app)
    for name, command in sorted(group.commands.items()):
        shown = [p for p in command.params if not getattr(p, "hidden", False)]
        yield f"$ wellcond {name}"
        for p in sorted(shown, key=lambda p: p.name):
            names = [p.name.upper()] if p.param_type_name == "argument" else [*p.opts, *p.secondary_opts]
            yield f"    {' / '.join(names)}"


def public_api() -> str:
    modules = [importlib.import_module(f"wellcond.{package}") for package in PACKAGES]
    public = {found for module in modules for name in module.__all__ if inspect.isclass(found := getattr(module, name))}
    lines = [line for module in modules for line in entries(module, public)]
    return "\n".join([*lines, *options()]) + "\n"


if __name__ == "__main__":
    KEPT.write_text(public_api(), encoding="utf-8")
    print(KEPT)
