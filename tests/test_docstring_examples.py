"""The examples in the docstrings of wellcond.linalg and wellcond.nn run and print what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import wellcond.linalg
import wellcond.nn

MODULES = [
    module.name
    for package in (wellcond.linalg, wellcond.nn)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_print_what_they_say(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
