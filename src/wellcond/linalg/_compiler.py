"""What ``torch.compile`` must leave alone: decompositions that are caught when they fail.

A graph that calls LAPACK raises from the middle of compiled code, past the ``except`` that Python has around the call:
the fall-back chain would be skipped and nothing counted. So the compiler is made to break the graph around them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch

F = TypeVar("F", bound=Callable)


def outside_the_compiler(function: F) -> F:
    """``function``, run as it is written when the compiler meets it."""
    disabled: Any = None

    @wraps(function)
    def call(*args: Any) -> Any:
        nonlocal disabled
        if not torch.compiler.is_compiling():
            return function(*args)
        if disabled is None:
            # On first use: disabling loads the compiler, which takes longer than all of this library.
            disabled = torch.compiler.disable(function)
        return disabled(*args)

    return cast(F, call)
