"""What a package offers by name: no function or class hides a module of the same name."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import pytest


@pytest.mark.parametrize("name", ["wellcond.nn", "wellcond.nn.functional"])
def test_no_function_or_class_has_the_name_of_a_module(name):
    package = importlib.import_module(name)
    modules = [module.name for module in pkgutil.iter_modules(package.__path__)]
    hidden = [m for m in modules if inspect.isroutine(found := getattr(package, m, None)) or inspect.isclass(found)]
    assert modules and not hidden
