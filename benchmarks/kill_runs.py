"""Does a training that was killed at any moment end with the weights of one that was not?

Each trial trains in a new process, which is killed (SIGKILL, that nothing can catch) once, and then goes on to the end.
Then every weight, buffer and momentum in its last checkpoint, its metrics and its condition numbers must be those of an
uninterrupted training, bit for bit. The moments:

- ``run``: any time in a run of three epochs;
- ``write``: in the middle of writing a file of it, a checkpoint more often than not (half of the bytes are written), or
  between two steps of its renaming;
- ``grid``: any time in a grid of three runs, one after another;
- ``jobs``: any time in that grid with two runs at once; the processes of the runs must end by themselves.

    python benchmarks/kill_runs.py --kills 50

The processes are forks of this one, which has imported PyTorch and computed nothing (so not on Windows).
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from wellcond.experiments.compare import compare
from wellcond.experiments.files import read_csv
from wellcond.experiments.run.config import RunConfig, run_config
from wellcond.experiments.run.train import run

SHARES = {"run": 0.4, "write": 0.3, "grid": 0.2, "jobs": 0.1}
TREATS = ("none", "nog", "nog+ow+olr")


def config(treat: str, threads: int | None = 1) -> RunConfig:
    options = {"data": "digits", "limit": 130, "width": 8, "batch_size": 32, "epochs": 3, "monitor_every": 2}
    return run_config(**options, treat=treat, augment=True, lr=0.05, threads=threads)


def train(out: Path) -> None:
    run(config(TREATS[-1]), out, resume=(out / "config.json").exists())


def train_grid(out: Path, jobs: int = 1) -> None:
    compare([config(treat) for treat in TREATS], out, resume=(out / "config.json").exists(), jobs=jobs)


def train_two_at_once(out: Path) -> None:
    train_grid(out, jobs=2)


WORK: dict[str, Callable[[Path], None]] = {
    "run": train,
    "write": train,
    "grid": train_grid,
    "jobs": train_two_at_once,
}


def in_fork(
    work: Callable[[Path], None], out: Path, kill_after: float | None = None, kill_at: int | None = None
) -> int:
    """Do it in a fork, killed after so many seconds or at so many calls that write; the signal it died by, or 0."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            logging.getLogger("wellcond").setLevel(logging.ERROR)
            if kill_at is not None:
                die_at(kill_at)
            work(out)
            status = 0
        except BaseException as error:
            print(f"  {type(error).__name__}: {error}", flush=True)
        finally:
            os._exit(status)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)  # not waited for yet: its number cannot be another's, dead or alive
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("a training failed that was not killed")
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def die_at(count: int) -> None:
    """Let this process kill itself at that call of what brings files to the disk; of a write half is done."""
    left = [count]

    def deadly(name: str) -> None:
        real = getattr(os, name)

        def call(*arguments: object, **options: object) -> object:
            left[0] -= 1
            if left[0] == 0:
                if name == "write":
                    descriptor, data = arguments
                    real(descriptor, bytes(memoryview(data)[: len(data) // 2]))  # type: ignore[arg-type]
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        setattr(os, name, call)

    for name in ("write", "fsync", "replace"):
        deadly(name)


def same(one: Path, other: Path) -> bool:
    """Whether two folders of a run differ in nothing but times."""
    states = [torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True) for folder in (one, other)]
    for state in states:
        state["callbacks"].pop("RunLog")  # holds times
    rows = [read_csv(folder / "metrics.csv") for folder in (one, other)]
    rows = [[{name: row[name] for name in row if "second" not in name} for row in table] for table in rows]
    conditions = [(folder / "condition.csv").read_bytes() for folder in (one, other)]
    return bits(states[0]) == bits(states[1]) and rows[0] == rows[1] and conditions[0] == conditions[1]


def bits(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [bits(item) for item in value]
    return repr(value)


def all_same(whole: Path, out: Path) -> bool:
    """Of a run, or of every run of a grid."""
    if not (whole / "runs").exists():
        return same(whole, out)
    return all(same(folder, out / "runs" / folder.name) for folder in (whole / "runs").iterdir())


def moment(kind: str, draw: random.Random, seconds: float) -> dict[str, Any]:
    return {"kill_at": draw.randint(1, 30)} if kind == "write" else {"kill_after": draw.uniform(0, seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--quick", action="store_true", help="six kills, none of two runs at once")
    options = parser.parse_args()
    kills = 6 if options.quick else options.kills
    shares = {kind: share for kind, share in SHARES.items() if not (options.quick and kind == "jobs")}
    kinds = random.Random(options.seed).choices(list(shares), list(shares.values()), k=kills - len(shares))
    draw, started = random.Random(options.seed + 1), time.monotonic()
    killed, equal, late = Counter[str](), Counter[str](), Counter[str]()
    folder = Path(tempfile.mkdtemp(prefix="kill_runs-"))
    try:
        whole, seconds = {}, {}
        for kind in shares:
            begin, whole[kind] = time.monotonic(), folder / f"whole-{kind}"
            in_fork(WORK[kind], whole[kind])
            seconds[kind] = time.monotonic() - begin
        for trial, kind in enumerate([*shares, *kinds]):
            out = folder / f"trial-{trial}"
            while not in_fork(WORK[kind], out, **moment(kind, draw, seconds[kind])):
                late[kind] += 1  # it had ended
                shutil.rmtree(out)
            in_fork(WORK[kind], out)
            killed[kind] += 1
            equal[kind] += all_same(whole[kind], out)
            print(f"\r{equal.total()} of {killed.total()} equal", end="", file=sys.stderr, flush=True)
            shutil.rmtree(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print("| moment | kills | bitwise equal | moments drawn after its end, and again |\n|---|---|---|---|")
    for kind in shares:
        print(f"| {kind} | {killed[kind]} | {equal[kind]} | {late[kind]} |")
    print(f"{equal.total()} of {killed.total()} equal to the last bit, in {time.monotonic() - started:.0f} s")
    if equal != killed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
