"""What the processes of a group do in tests, and how one that a test has spawned ends."""

from __future__ import annotations

import atexit
import os
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from wellcond.experiments.run import train
from wellcond.experiments.run.config import RunConfig
from wellcond.experiments.run.run_folder import BEGINNING


def leave() -> NoReturn:
    """End this process at once: a thread of gloo that frees a tensor while the interpreter finalizes would abort it."""
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


def train_and_name_the_last_threads(config: RunConfig, folder: Path) -> None:
    def write() -> None:
        tasks = Path("/proc/self/task").iterdir()
        (folder / os.environ["RANK"]).write_text("\n".join((task / "comm").read_text().strip() for task in tasks))

    atexit.register(write)  # the first, thus called last
    train._process(config, folder / "run", BEGINNING, progress=False)
