"""The examples in the docstrings of wellcond.linalg run and print what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import wellcond.linalg

MODULES = [m.name for m in pkgutil.walk_packages(wellcond.linalg.__path__, "wellcond.linalg.")]


@pytest.mark.parametrize("name", MODULES)
def test_examples_print_what_they_say(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
