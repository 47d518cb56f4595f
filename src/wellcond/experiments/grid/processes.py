"""Several runs at once on this machine, each in a process of its own (loky, by way of joblib).

Every place for a run has an executor with a single process. So a process that dies, by the system when memory is
short or by a user, breaks no other, and it is known which run it had: that run goes on from its checkpoint in a new
process. A process trains many runs, one after the other: it imports PyTorch and loads the images once.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from wellcond.experiments.errors import needs_train_extra
from wellcond.experiments.grid.attempt import Executor, Outcome, Outcomes, Task, alone_on_its_cpu, attempt_elsewhere

with needs_train_extra():
    from joblib.externals.loky import ProcessPoolExecutor

MOST_DEATHS = 3
"""How often the process of one run may die before that run is given up."""
LOOK_EVERY = 0.1  # seconds between two looks at whether the process that began the grid is still there


def in_processes(jobs: int) -> Executor:
    """So many at once. When the iterator is closed, by Ctrl-C or an error, the processes are killed: every run goes on
    from its last checkpoint another time."""

    def train(tasks: Sequence[Task]) -> Outcomes:
        waiting = deque((place, 0) for place in range(len(tasks)))
        free = [_one_process() for _ in range(min(jobs, len(tasks)))]
        busy: dict[Future[Outcome], tuple[Any, int, int]] = {}
        try:
            while waiting or busy:
                while waiting and free:
                    process, (place, deaths) = free.pop(), waiting.popleft()
                    busy[process.submit(attempt_elsewhere, tasks[place])] = (process, place, deaths)
                for future in wait(busy, return_when=FIRST_COMPLETED).done:
                    process, place, deaths = busy.pop(future)
                    if isinstance(died := future.exception(), BrokenProcessPool):
                        process.shutdown(kill_workers=True)
                        free.append(_one_process())
                        if deaths + 1 < MOST_DEATHS:
                            waiting.appendleft((place, deaths + 1))
                        else:
                            yield place, Outcome(f"its process died {MOST_DEATHS} times: killed, or out of memory")
                        continue
                    free.append(process)
                    yield place, Outcome(f"{type(died).__name__}: {died}") if died else future.result()
        finally:
            for process in [*free, *(process for process, *_ in busy.values())]:
                process.shutdown(kill_workers=True)

    return train


def _one_process() -> Any:
    environment = {"OMP_NUM_THREADS": "1"}
    return ProcessPoolExecutor(max_workers=1, env=environment, initializer=_begin, initargs=(os.getpid(),))


def _begin(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the process that began the grid ends the others
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    alone_on_its_cpu()


def _end_with(parent: int) -> None:
    """End this process when its parent was killed: it would train on, and keep a resumed grid out of the folder."""
    from multiprocessing import active_children

    while os.name != "posix" or os.getppid() == parent:
        time.sleep(LOOK_EVERY)
    for child in active_children():
        child.kill()
    os._exit(1)
