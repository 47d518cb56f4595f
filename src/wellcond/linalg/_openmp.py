"""Python functions side by side on the threads that PyTorch's own operations run on.

A thread pool beside them would compete with them: after every parallel operation the threads of OpenMP wait for the
next one at full speed, for milliseconds, and a LAPACK routine that is called from a thread of its own starts yet
another team. On OpenMP's threads neither happens, and inside of its parallel region LAPACK keeps to one core.

The entry is the function that GNU's compiler calls for a parallel region, a stable interface that Intel's and LLVM's
runtimes export on Linux as well; it is looked up in the very runtime that PyTorch is linked to.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")
_Body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_in_forked_child = False  # where the threads of the team do not exist, and OpenMP would wait for them for ever


def _forked() -> None:
    global _in_forked_child
    _in_forked_child = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


@lru_cache(maxsize=1)
def _region() -> Callable[..., None] | None:
    """``GOMP_parallel(body, data, threads, flags)``: the body on every thread of a team; None where there is none."""
    if "parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return None
    for library in (Path(torch.__file__).parent / "lib").glob("libtorch_cpu.so"):
        try:
            region: Any = ctypes.CDLL(str(library)).GOMP_parallel  # in the library or in one that it needs
        except (OSError, AttributeError):
            continue
        region.argtypes, region.restype = (_Body, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
        return region
    return None


def threads() -> int:
    """How many threads :func:`side_by_side` has: PyTorch's, or 1 where its team cannot be reached."""
    return torch.get_num_threads() if not _in_forked_child and _region() is not None else 1


def side_by_side(tasks: Sequence[Callable[[], T]]) -> list[T]:
    """The results of the tasks, in order; without gradients. Each thread takes the next task that is left.

    Raises:
        Exception: of a task that failed, when all have ended.
    """
    results: list[Any] = [None] * len(tasks)
    errors: list[BaseException] = []
    left = deque(enumerate(tasks))

    @_Body
    def body(_: Any) -> None:
        with torch.no_grad():  # the mode belongs to a thread
            while True:
                try:
                    i, task = left.popleft()
                except IndexError:
                    return
                try:
                    results[i] = task()
                except BaseException as error:  # a callback cannot raise
                    errors.append(error)

    region = _region()
    assert region is not None
    region(body, None, threads(), 0)
    if errors:
        raise errors[0]
    return results
