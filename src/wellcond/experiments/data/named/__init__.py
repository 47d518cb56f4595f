"""Data sets by name, a module each; a new data set is a new module here and nothing else.

A module has ``HUB``, the name on the Hugging Face hub, or ``load() -> Source``; and, where the training departs from
the paper's, ``SETTINGS``. It imports torch in ``load`` only, so that ``wellcond --help`` knows the names and is quick.
"""

from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType

NAMED: dict[str, ModuleType] = {
    module.name: import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)
}
