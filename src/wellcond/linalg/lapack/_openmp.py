"""Python functions side by side on the threads that PyTorch's own operations run on.

A thread pool beside them would compete with them: after every parallel operation the threads of OpenMP wait for the
next one at full speed, for milliseconds, and a LAPACK routine that is called from a thread of its own starts yet
another team. On OpenMP's own threads neither happens.

The entry is the function that GNU's compiler calls for a parallel region, a stable interface that Intel's and LLVM's
runtimes export on Linux as well; it is looked up in the very runtime that PyTorch is linked to. Inside of the region
every thread tells MKL to work alone. That is not only faster: once ``torch.set_num_threads`` was called MKL does not
see by itself that it is in a region, and the threads of several routines then wait for each other for ever (geqrf), or
mix up their rows (getrf, PyTorch's issue 142815). With another LAPACK, where nobody has tried it, there is no team.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

T = TypeVar("T")
_Body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_in_forked_child = False  # where the threads of the team do not exist, and OpenMP would wait for them for ever


def _forked() -> None:
    global _in_forked_child
    _in_forked_child = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


class _Runtime(NamedTuple):
    """``GOMP_parallel(body, data, threads, flags)``; ``MKL_Set_Num_Threads_Local(count)``, which gives the former."""

    region: Callable[..., None]
    mkl_threads: Callable[[int], int]

    @contextmanager
    def mkl_alone(self) -> Iterator[None]:
        """In this block MKL does not use other threads than the calling one."""
        torch.get_num_threads()  # the first to ask in a thread has PyTorch set MKL's number there: not after us
        before = self.mkl_threads(1)
        try:
            yield
        finally:
            self.mkl_threads(before)


@lru_cache(maxsize=1)
def _runtime() -> _Runtime | None:
    """None where PyTorch does not run on OpenMP and MKL, or hides them."""
    if not torch.backends.mkl.is_available() or "parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return None
    try:
        found = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))  # and what it is linked to
        everywhere = ctypes.CDLL(None)  # a runtime that was preloaded stands before that, for PyTorch too
        region: Any = (everywhere if hasattr(everywhere, "GOMP_parallel") else found).GOMP_parallel
        mkl_threads: Any = found.MKL_Set_Num_Threads_Local
    except (OSError, AttributeError):
        return None
    region.argtypes, region.restype = (_Body, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    mkl_threads.argtypes, mkl_threads.restype = (ctypes.c_int,), ctypes.c_int
    return _Runtime(region, mkl_threads)


def threads() -> int:
    """How many threads :func:`side_by_side` has: PyTorch's, or 1 where its team cannot be reached."""
    return torch.get_num_threads() if not _in_forked_child and _runtime() is not None else 1


def side_by_side(tasks: Sequence[Callable[[], T]]) -> list[T]:
    """The results of the tasks, in order; without gradients and autocast. Each thread takes the next task that is left.

    Raises:
        BaseException: of a task that failed, when all have ended.
    """
    runtime = _runtime()
    assert runtime is not None
    results: list[Any] = [None] * len(tasks)
    errors: list[BaseException] = []
    left = deque(enumerate(tasks))

    def work() -> None:
        with torch.no_grad(), runtime.mkl_alone():  # both belong to a thread
            while True:
                try:
                    i, task = left.popleft()
                except IndexError:
                    return
                try:
                    results[i] = task()
                except BaseException as error:
                    errors.append(error)

    @_Body
    def body(_: Any) -> None:
        try:
            work()
        except BaseException as error:  # an interrupt between two tasks; a callback cannot raise
            errors.append(error)

    # Always the whole team: GNU's runtime ends the threads that a smaller one leaves out.
    runtime.region(body, None, threads(), 0)
    if errors:
        raise errors[0]
    return results
