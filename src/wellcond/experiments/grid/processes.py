"""Several runs at once on this machine, in worker processes (loky, as vendored by joblib).

Each worker has an executor of its own with a single process. If a process dies (out of memory, or killed by a user), no
other is affected, and its run is known and continues from its checkpoint in a new process. A worker trains many runs
one after another, so that it imports PyTorch and loads the images once.
"""

from __future__ import annotations

import contextlib
import math
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
from wellcond.experiments.grid.attempt import Executor, Outcome, Outcomes, Task, attempt_elsewhere, use_one_thread

with needs_train_extra():
    from joblib.externals.loky import ProcessPoolExecutor, process_executor
    from joblib.externals.loky.backend import resource_tracker as loky_tracker

MAX_DEATHS = 3
"""How often the process of a run may die before the run is given up."""
POLL_SECONDS = 0.1  # interval at which a worker checks that its parent is alive
SHUTDOWN_SECONDS = 10.0
"""How long a worker may take to exit before it is killed."""
IGNORE_LEAKS = "ignore:resource_tracker:UserWarning"
"""A killed process leaves semaphores behind; the resource tracker removes them and need not warn."""


def in_processes(jobs: int) -> Executor:
    """An executor with ``jobs`` workers. They end when its generator is closed, by Ctrl-C or an error; resuming
    continues every run from its last checkpoint."""

    def train(tasks: Sequence[Task]) -> Outcomes:
        waiting = deque((index, 0) for index in range(len(tasks)))
        idle = [_Worker() for _ in range(min(jobs, len(tasks)))]
        workers = list(idle)  # also the one that is between the two when Ctrl-C comes
        busy: dict[Future[Outcome], tuple[_Worker, int, int]] = {}
        try:
            while waiting or busy:
                while waiting and idle:
                    worker, (index, deaths) = idle.pop(), waiting.popleft()
                    busy[worker.submit(tasks[index])] = (worker, index, deaths)
                for future in wait(busy, return_when=FIRST_COMPLETED).done:
                    worker, index, deaths = busy.pop(future)
                    if isinstance(error := future.exception(), (BrokenProcessPool, Terminated)):
                        _shut_down([worker])
                        workers.remove(worker)
                        workers.append(_Worker())
                        idle.append(workers[-1])
                        if deaths + 1 < MAX_DEATHS:
                            waiting.appendleft((index, deaths + 1))
                        else:
                            yield index, Outcome(f"its process died {MAX_DEATHS} times: killed, or out of memory")
                        continue
                    idle.append(worker)
                    yield index, Outcome(f"{type(error).__name__}: {error}") if error else future.result()
        finally:
            _shut_down(workers)

    return train


class _Worker:
    """A process that trains one run after another. It starts with the first task."""

    def __init__(self) -> None:
        environment = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": _start_trackers()}
        self._executor = ProcessPoolExecutor(1, env=environment, initializer=_initialise, initargs=(os.getpid(),))
        self._pid: Future[int] | None = None

    def submit(self, task: Task) -> Future[Outcome]:
        if self._pid is None:
            with _sigint_blocked():  # until the new process has set its own handlers
                self._pid = self._executor.submit(os.getpid)
        return self._executor.submit(_train, task)

    @property
    def pid(self) -> int | None:
        """The process id, if the process has started and can be signalled."""
        started = os.name == "posix" and self._pid and self._pid.done() and not self._pid.exception()
        return self._pid.result() if self._pid and started else None

    def shut_down(self, kill: bool, wait: bool) -> None:
        self._executor.shutdown(wait=wait, kill_workers=kill)


def _shut_down(workers: Sequence[_Worker]) -> None:
    """Interrupt running workers as by Ctrl-C, so that they exit cleanly; kill those that do not exit in time, or that
    have not started."""
    pids = [worker.pid for worker in workers]
    for worker, pid in zip(workers, pids, strict=True):
        worker.shut_down(kill=pid is None, wait=False)
        _signal(pid, signal.SIGTERM)
    deadline = time.monotonic() + SHUTDOWN_SECONDS
    insisted = False
    try:
        while any(_signal(pid, 0) for pid in pids) and time.monotonic() < deadline:
            if not insisted and time.monotonic() > deadline - SHUTDOWN_SECONDS / 2:  # in mid-batch still
                insisted = any([_signal(pid, signal.SIGTERM) for pid in pids])
            time.sleep(POLL_SECONDS / 10)
    finally:  # a second Ctrl-C is for those that do not exit
        for worker, pid in zip(workers, pids, strict=True):
            _signal(pid, signal.SIGKILL)
            worker.shut_down(kill=True, wait=True)


def _signal(pid: int | None, number: int) -> bool:
    """Send a signal; whether the process exists."""
    if pid is None:
        return False
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def _start_trackers() -> str:
    """Start the resource trackers, with their warnings about leaks ignored; returns the warning filters.

    Starting a tracker unblocks SIGINT, which would expose a worker that is just starting.
    """
    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = filters = f"{before},{IGNORE_LEAKS}" if before else IGNORE_LEAKS
    try:
        for tracker in (multiprocessing.resource_tracker, loky_tracker) if os.name == "posix" else ():
            tracker.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONWARNINGS"]
        else:
            os.environ["PYTHONWARNINGS"] = before
    return filters


@contextlib.contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Block SIGINT here, and in processes started inside until they call `_initialise`."""
    if os.name != "posix":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _initialise(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent shuts the workers down
    if os.name == "posix":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # except during training
    # loky would replace a process that has grown by 300 MB: by the images that it keeps for the next run.
    process_executor._MAX_MEMORY_LEAK_SIZE = math.inf
    threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()
    use_one_thread()


def _train(task: Task) -> Outcome:
    """`attempt_elsewhere`, during which SIGTERM raises `Terminated`."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        return attempt_elsewhere(task)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _terminate(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # only once, so as not to disturb the shutdown
    raise Terminated


def _exit_with(parent: int) -> None:
    """Exit when the parent was killed: training on would lock the folder against a resumed grid."""
    from multiprocessing import active_children

    while os.name != "posix" or os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    for child in active_children():
        child.kill()
    os._exit(1)
