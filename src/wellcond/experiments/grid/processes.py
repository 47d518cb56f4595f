"""Several runs at once on this machine, each in a process of its own (loky, by way of joblib).

Every place for a run has an executor with a single process. So a process that dies, by the system when memory is
short or by a user, breaks no other, and it is known which run it had: that run goes on from its checkpoint in a new
process. A process trains many runs, one after the other: it imports PyTorch and loads the images once.
"""

from __future__ import annotations

import contextlib
import multiprocessing.resource_tracker
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool

from wellcond.experiments.errors import Terminated, needs_train_extra
from wellcond.experiments.grid.attempt import Executor, Outcome, Outcomes, Task, alone_on_its_cpu, attempt_elsewhere

with needs_train_extra():
    from joblib.externals.loky import ProcessPoolExecutor
    from joblib.externals.loky.backend import resource_tracker as loky_tracker

MOST_DEATHS = 3
"""How often the process of one run may die before that run is given up."""
LOOK_EVERY = 0.1  # seconds between two looks at whether the process that began the grid is still there
TIME_TO_END = 10.0
"""Seconds that a process has to leave what it does, or to exit, before it is killed."""
NO_LEAKS = "ignore:resource_tracker:UserWarning"
"""A process that is killed leaves semaphores of its imports; its tracker removes them, and need not tell the user."""


def in_processes(jobs: int) -> Executor:
    """So many at once. When the iterator is closed, by Ctrl-C or an error, the processes end: every run goes on from
    its last checkpoint another time."""

    def train(tasks: Sequence[Task]) -> Outcomes:
        waiting = deque((place, 0) for place in range(len(tasks)))
        free = [_Process() for _ in range(min(jobs, len(tasks)))]
        busy: dict[Future[Outcome], tuple[_Process, int, int]] = {}
        try:
            while waiting or busy:
                while waiting and free:
                    process, (place, deaths) = free.pop(), waiting.popleft()
                    busy[process.begin(tasks[place])] = (process, place, deaths)
                for future in wait(busy, return_when=FIRST_COMPLETED).done:
                    process, place, deaths = busy.pop(future)
                    if isinstance(died := future.exception(), (BrokenProcessPool, Terminated)):
                        _end([process])
                        free.append(_Process())
                        if deaths + 1 < MOST_DEATHS:
                            waiting.appendleft((place, deaths + 1))
                        else:
                            yield place, Outcome(f"its process died {MOST_DEATHS} times: killed, or out of memory")
                        continue
                    free.append(process)
                    yield place, Outcome(f"{type(died).__name__}: {died}") if died else future.result()
        finally:
            _end([*free, *(process for process, *_ in busy.values())])

    return train


class _Process:
    """A process that trains one run after another. It starts with the first."""

    def __init__(self) -> None:
        quiet = _start_trackers()
        environment = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": quiet}
        self._executor = ProcessPoolExecutor(1, env=environment, initializer=_begin, initargs=(os.getpid(),))
        self._number: Future[int] | None = None

    def begin(self, task: Task) -> Future[Outcome]:
        if self._number is None:
            with _deaf_to_interrupts():  # until the process has said what it does on them
                self._number = self._executor.submit(os.getpid)
        return self._executor.submit(_train, task)

    @property
    def number(self) -> int | None:
        """Of the process, where it has begun and may be signalled."""
        began = os.name == "posix" and self._number and self._number.done() and not self._number.exception()
        return self._number.result() if self._number and began else None

    def end(self, kill: bool, wait: bool) -> None:
        self._executor.shutdown(wait=wait, kill_workers=kill)


def _end(processes: Sequence[_Process]) -> None:
    """A run that is under way is left as by Ctrl-C, and the process exits by itself, so that it leaves nothing behind.
    One that does not in time is killed, and so is one that has not begun."""
    numbers = [process.number for process in processes]
    for process, number in zip(processes, numbers, strict=True):
        process.end(kill=number is None, wait=False)
        _signal(number, signal.SIGTERM)
    deadline = time.monotonic() + TIME_TO_END
    while any(_signal(number, 0) for number in numbers) and time.monotonic() < deadline:
        time.sleep(LOOK_EVERY / 10)
    for process, number in zip(processes, numbers, strict=True):
        _signal(number, signal.SIGKILL)
        process.end(kill=True, wait=True)


def _signal(number: int | None, which: int) -> bool:
    """Whether there was such a process."""
    if number is None:
        return False
    try:
        os.kill(number, which)
    except ProcessLookupError:
        return False
    return True


def _start_trackers() -> str:
    """Where they do not run yet; what they would warn of is left out, and the filters that do it are returned.

    The start of a tracker would let Ctrl-C through to a process that is starting.
    """
    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = quiet = f"{before},{NO_LEAKS}" if before else NO_LEAKS
    try:
        for tracker in (multiprocessing.resource_tracker, loky_tracker) if os.name == "posix" else ():
            tracker.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONWARNINGS"]
        else:
            os.environ["PYTHONWARNINGS"] = before
    return quiet


@contextlib.contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Ctrl-C waits, in the processes that start inside too: there until `_begin`."""
    if os.name != "posix":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the process that began the grid ends the others
    if os.name == "posix":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # but in a training
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    alone_on_its_cpu()


def _train(task: Task) -> Outcome:
    """`attempt_elsewhere`; SIGTERM ends it by `Terminated`."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        return attempt_elsewhere(task)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _terminate(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once: the end is not to be disturbed
    raise Terminated


def _end_with(parent: int) -> None:
    """End this process when its parent was killed: it would train on, and keep a resumed grid out of the folder."""
    from multiprocessing import active_children

    while os.name != "posix" or os.getppid() == parent:
        time.sleep(LOOK_EVERY)
    for child in active_children():
        child.kill()
    os._exit(1)
