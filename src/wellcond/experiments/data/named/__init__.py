"""Named data sets, one module each; adding a data set only takes a new module.

A module has ``HUB``, the name on the Hugging Face hub, or ``load() -> Source``; and optionally ``SETTINGS``, which
override the paper's training options, and ``GENERATOR_SETTINGS``, the same for generators. torch must only be imported
in ``load``, so that ``wellcond --help`` is fast.
"""

from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType

NAMED: dict[str, ModuleType] = {
    module.name: import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)
}
