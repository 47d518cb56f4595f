"""The house: data flows down the list of packages, no private module is imported elsewhere, no name hides another."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import wellcond

ROOT = Path(wellcond.__file__).parent
# From the ground up: a package imports only from those before it.
FLOORS = (
    "_shared",
    "linalg",
    "metrics",
    "sklearn",
    "nn",
    "orthogonality",
    "monitor",
    "lightning",
    "transformers",
    "accelerate",
    "experiments",
    "bench",
    "cli",
)
MAY_STAND_BESIDE = {("orthogonality", "nn"), ("transformers", "lightning"), ("accelerate", "lightning")}


def imports(path: Path) -> Iterator[str]:
    """Absolute names of the modules that a file imports from."""
    package = ".".join(("wellcond", *path.relative_to(ROOT).parent.parts))
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names if alias.name.startswith("_"))
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


FILES = sorted(ROOT.rglob("*.py"))


def floor(module: str) -> str:
    return module.split(".")[1] if module.count(".") else ""


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_imports_a_private_module_of_another_package_or_one_above(path):
    here = ("wellcond", *path.relative_to(ROOT).with_suffix("").parts)
    for module in imports(path):
        parts = tuple(module.split("."))
        if parts[0] != "wellcond":
            continue
        for depth, part in enumerate(parts):
            if part.startswith("_") and not part.startswith("__"):
                owner = parts[: min(depth, 2)]
                assert here[: len(owner)] == owner, f"{module} is private to {'.'.join(owner)}"
        mine, theirs = here[1], floor(module)
        if theirs in FLOORS and mine in FLOORS and mine != theirs:
            assert FLOORS.index(theirs) < FLOORS.index(mine), f"{'.'.join(here)} imports {module} from above"
            assert (mine, theirs) not in MAY_STAND_BESIDE, f"{'.'.join(here)} imports {module} from beside it"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_what_pytorch_keeps_private_is_asked_in_one_file(path):
    if path.name != "torch_internals.py":
        code = [line.split("#")[0] for line in path.read_text(encoding="utf-8").splitlines()]
        assert not [line for line in code if re.search(r"torch\._(?!_)|_current_level|compiler\.is_compiling", line)]


PACKAGES = [
    m.name
    for m in pkgutil.walk_packages(wellcond.__path__, "wellcond.")
    if m.ispkg and not m.name.startswith("wellcond._")
]


@pytest.mark.parametrize("name", PACKAGES)
def test_no_module_is_hidden_by_a_function_or_class_of_its_name(name):
    package = importlib.import_module(name)
    for module in pkgutil.iter_modules(package.__path__):
        found = getattr(package, module.name, None)
        assert found is None or inspect.ismodule(found), (
            f"{name}.{module.name} is a module and a {type(found).__name__}"
        )


def test_linalg_has_a_plain_top():
    assert len(list((ROOT / "linalg").glob("*.py"))) <= 14
