"""Work for other processes that need nothing of ours: some of it kills its process."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def begin(parent: int) -> None:
    """Instead of what a process of a grid begins with."""


def live_or_die(task: str) -> str:
    """Of `die N FILE` the process dies the first N times."""
    word, *rest = task.split()
    if word == "die":
        count, file = int(rest[0]), Path(rest[1])
        with file.open("a") as tally:
            tally.write(".")
        if len(file.read_text()) <= count:
            os.kill(os.getpid(), signal.SIGKILL)
    return f"{task}, done in {os.getpid()}"


KEPT: list[bytes] = []


def grow(task: str) -> int:
    """Keep 400 MB, for long enough that loky looks at the memory again."""
    KEPT.append(b"1" * 400_000_000)
    time.sleep(1.2)
    return os.getpid()


def kill_rank_1() -> None:
    """Work for two processes of which one is killed while the other waits for it."""
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()
