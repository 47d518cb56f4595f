"""The examples in the docstrings of every package run and print what they say."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import wellcond

ROOT = Path(wellcond.__file__).parent
MODULES = [
    ".".join(("wellcond", *path.relative_to(ROOT).with_suffix("").parts))
    for path in sorted(ROOT.rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_print_what_they_say(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write a file
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted and not found.failed
