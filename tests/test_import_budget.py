"""Importing wellcond costs next to nothing beside torch: at most 0.1 s of processor time, and no package but torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PARTS = ("wellcond.linalg", "wellcond.nn", "wellcond.orthogonality", "wellcond.monitor")
# A collection of the objects of torch, 0.1 s by itself, falls to whatever is imported when its turn comes. The first
# import compiles, as the installation does; the least of the others is what a program pays.
SCRIPT = """
import gc, importlib, json, sys, time
import torch
parts, sys.pycache_prefix, sys.dont_write_bytecode = sys.argv[2:], sys.argv[1], False
gc.disable()
before, seconds = set(sys.modules), []
for _ in range(4):
    for name in set(sys.modules) - before:
        del sys.modules[name]
    started = time.process_time()
    for part in parts:
        importlib.import_module(part)
    seconds.append(time.process_time() - started)
print(json.dumps([min(seconds[1:]), sorted(set(sys.modules) - before)]))
"""
BUDGET = 0.1


@pytest.fixture(scope="module")
def fresh_import(tmp_path_factory: pytest.TempPathFactory) -> tuple[float, list[str]]:
    """Seconds of processor time, and the modules that were not there before, in a process of its own."""
    command = [sys.executable, "-c", SCRIPT, str(tmp_path_factory.mktemp("bytecode")), *PARTS]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    seconds, modules = json.loads(done.stdout)
    return seconds, modules


def test_nothing_is_imported_but_torch_and_the_standard_library(fresh_import: tuple[float, list[str]]) -> None:
    """Not even a part of torch that `import torch` leaves for later, such as its compiler."""
    modules = fresh_import[1]
    assert set(PARTS) <= set(modules)
    others = {name.split(".")[0] for name in modules} - {"wellcond"}
    assert others <= set(sys.stdlib_module_names)


def test_the_import_is_within_its_budget(fresh_import: tuple[float, list[str]]) -> None:
    assert fresh_import[0] <= BUDGET, f"{fresh_import[0]:.3f} s of processor time"
