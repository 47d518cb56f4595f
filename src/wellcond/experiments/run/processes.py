"""Process management around training: spawning, threads, process groups, and Lightning's log output.

Spawned processes get the environment variables that `torchrun` would set, so that Lightning's DDP works the same way.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import logging
import os
import signal
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

from wellcond.experiments.errors import RunError, Terminated

INTERRUPTED = 130
"""Exit status after Ctrl-C, by shell convention 128 + SIGINT."""
DEADLY = [getattr(signal, name) for name in ("SIGKILL", "SIGSEGV", "SIGBUS", "SIGABRT") if hasattr(signal, name)]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress Lightning's warnings and hints; errors are still logged."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Let torch use `count` CPU threads inside; None changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def group_ends_first() -> Iterator[None]:
    """Several processes train inside. Their group, if it is still there at the end of this process, is then destroyed.

    A thread of gloo may let go of a tensor while the interpreter finalizes, and such a process ends with SIGABRT though
    its work is done (https://github.com/pytorch/pytorch/issues/190489, seen with PyTorch 2.13). The threads end with
    their group, once it is destroyed and nothing holds it any more. Not after an error: to end them is to wait for what
    they do, and another process may be dead.
    """
    # Its default arguments hold the group that there is when it is first imported, which torch.optim does.
    import torch.distributed.nn  # noqa: F401

    atexit.unregister(_destroy_group)
    yield
    atexit.register(_destroy_group)


def _destroy_group() -> None:
    gc.collect()  # a wrapped model that is nothing but garbage holds the group
    if dist.is_initialized():
        dist.destroy_process_group()


def spawn(work: Callable[..., None], count: int, *arguments: Any) -> None:
    """Call `work(*arguments)` in `count` new processes of one process group; returns when all have finished.

    The message of the first failing process becomes a `RunError`. Ctrl-C, or SIGTERM to any process, is raised once all
    have ended.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    failures = multiprocessing.get_context("spawn").SimpleQueue()
    context = multiprocessing.start_processes(
        _in_process, (count, port, failures, work, arguments), nprocs=count, join=False, start_method="spawn"
    )
    assert context is not None  # None only with join=True
    try:
        while not context.join():
            pass
    except KeyboardInterrupt:
        _end(context.processes)
        raise
    except (multiprocessing.ProcessExitedException, multiprocessing.ProcessRaisedException) as ended:
        code = ended.exit_code if isinstance(ended, multiprocessing.ProcessExitedException) else None
        if code == INTERRUPTED:
            raise KeyboardInterrupt from None
        if code == -signal.SIGTERM:
            raise Terminated from None
        if not failures.empty():
            raise RunError(failures.get()) from None
        # If one process died, the others fail too, and any of them may be reported first.
        for rank, process in enumerate(context.processes):
            code = process.exitcode if process is not None else None
            if code is not None and -code in DEADLY:
                raise RunError(
                    f"process {rank} of {count} died from {signal.Signals(-code).name} (killed, out of memory, or a "
                    "crash in a library); what was saved is kept: go on with --resume"
                ) from ended
        raise


def _end(processes: Any) -> None:
    """Send SIGINT to the remaining processes, wait up to ten seconds, then kill them."""
    for process in processes:
        if process.is_alive() and process.pid is not None:
            os.kill(process.pid, signal.SIGINT)
    deadline = time.monotonic() + 10
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


def _in_process(
    rank: int, count: int, port: int, failures: Any, work: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    os.environ |= dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
    os.environ |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(count))
    os.environ |= {"NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        work(*arguments)
    except (RunError, ValueError, OSError) as error:
        failures.put(str(error))
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
