"""Python functions in parallel, on the threads of PyTorch's own operations.

A separate thread pool would compete with them: after every parallel operation OpenMP's threads spin for milliseconds,
waiting for the next one, and a LAPACK routine called from another thread starts yet another team. Neither happens on
OpenMP's own threads.

The entry point is the function that GNU's compiler calls for a parallel region, a stable interface that the runtimes of
Intel and LLVM on Linux export as well. It is looked up in the runtime that PyTorch is linked to. In the region every
thread tells MKL to use one thread. That is not only faster: once ``torch.set_num_threads`` has been called, MKL no
longer notices that it is in a parallel region, and the threads of several routines deadlock (geqrf) or mix up their
rows (getrf, PyTorch issue 142815). With any other LAPACK, which is untested here, there is no team.
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
_loaded_by = os.getpid()
_PF_FORKNOEXEC = 0x40  # Linux sets this flag in a process that was forked and has not called exec since


class _Runtime(NamedTuple):
    """``GOMP_parallel(body, data, threads, flags)`` and ``MKL_Set_Num_Threads_Local(count)``, returning the former."""

    region: Callable[..., None]
    mkl_threads: Callable[[int], int]

    @contextmanager
    def mkl_alone(self) -> Iterator[None]:
        """In this block MKL uses the calling thread only."""
        torch.get_num_threads()  # its first call in a thread sets MKL's number: that must not undo ours
        before = self.mkl_threads(1)
        try:
            yield
        finally:
            self.mkl_threads(before)


@lru_cache(maxsize=1)
def _runtime() -> _Runtime | None:
    """None if PyTorch does not run on OpenMP and MKL, or does not export them."""
    if not torch.backends.mkl.is_available() or "parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return None
    try:
        found = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))  # with what it is linked to
        everywhere = ctypes.CDLL(None)  # a preloaded runtime takes precedence, for PyTorch too
        region: Any = (everywhere if hasattr(everywhere, "GOMP_parallel") else found).GOMP_parallel
        mkl_threads: Any = found.MKL_Set_Num_Threads_Local
    except (OSError, AttributeError):
        return None
    region.argtypes, region.restype = (_Body, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    mkl_threads.argtypes, mkl_threads.restype = (ctypes.c_int,), ctypes.c_int
    return _Runtime(region, mkl_threads)


@lru_cache(maxsize=1)
def _forked_before_import() -> bool:
    """Whether the process was forked before this library was imported, as by a server that had loaded PyTorch."""
    try:
        stat = Path("/proc/self/stat").read_text()
        return bool(int(stat.rpartition(")")[2].split()[6]) & _PF_FORKNOEXEC)
    except (OSError, ValueError, IndexError):
        return False


def available() -> bool:
    """Whether :func:`side_by_side` can be called.

    Not in a forked process, whose OpenMP has the records of the team but not its threads, and would deadlock.
    """
    return os.getpid() == _loaded_by and _runtime() is not None and not _forked_before_import()


def side_by_side(tasks: Sequence[Callable[[], T]]) -> list[T]:
    """The results of the tasks, in order; without gradients and autocast. An idle thread takes the next task.

    Raises:
        BaseException: the first error of a task, after all have ended.
    """
    runtime = _runtime()
    assert runtime is not None
    results: list[Any] = [None] * len(tasks)
    errors: list[BaseException] = []
    waiting = deque(enumerate(tasks))

    def work() -> None:
        with torch.no_grad(), runtime.mkl_alone():  # both apply to one thread
            while True:
                try:
                    i, task = waiting.popleft()
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

    # Always the whole team: GNU's runtime ends threads that a smaller team does not need.
    runtime.region(body, None, torch.get_num_threads(), 0)
    if errors:
        raise errors[0]
    return results
