"""Data sets by name, a module each: ``load() -> Source`` and, where its training departs from the paper's, ``RECIPE``.

A new data set is a new module here and nothing else. None of them imports torch before it is loaded, so that the
names and recipes are known to ``wellcond --help``.
"""

from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType

NAMED: dict[str, ModuleType] = {
    module.name: import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)
}
