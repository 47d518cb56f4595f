"""How much faster is `wellcond compare --jobs 2` than one run after the other, at one CPU thread each?

A grid of ResNet-8 on digits, the same with one job and with two, in alternation; times are of the whole command, with
the start of Python, the imports of every process, the images, the tables and the figures. The issue asked for 1.7 on
two cores. It means something on a machine that does nothing else: the load before each is printed with it.

    python benchmarks/compare_jobs.py --runs 6 --epochs 40
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

WANTED = 1.7


def command(options: argparse.Namespace, jobs: int, out: Path) -> list[str]:
    grid = ["--norm", "zca", "--treat", "none", "--seeds", str(options.runs), "--model", "resnet8"]
    grid += ["--epochs", str(options.epochs), "--width", str(options.width), "--threads", "1"]
    return [sys.executable, "-m", "wellcond.cli", "compare", *grid, "--jobs", str(jobs), "--out", str(out)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=40, help="of each run")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="two runs of one epoch: whether it works")
    options = parser.parse_args()
    if options.quick:
        options.runs, options.epochs, options.width = 2, 1, 8
    seconds: dict[int, list[float]] = {1: [], options.jobs: []}
    print("| jobs | seconds | seconds of training in a run | load before |\n|---|---|---|---|")
    for _ in range(options.rounds):
        for jobs in seconds:
            load = os.getloadavg()[0]
            with tempfile.TemporaryDirectory() as folder:
                began = time.monotonic()
                subprocess.run(command(options, jobs, Path(folder) / "out"), check=True, stdout=subprocess.DEVNULL)
                seconds[jobs].append(time.monotonic() - began)
                each = pd.read_parquet(Path(folder) / "out" / "results.parquet").training_seconds
            print(f"| {jobs} | {seconds[jobs][-1]:.1f} | {each.mean():.1f} | {load:.1f} |", flush=True)
    ratio = min(seconds[1]) / min(seconds[options.jobs])
    print(f"--jobs {options.jobs} is {ratio:.2f} times as fast ({WANTED} wanted on two idle cores)")


if __name__ == "__main__":
    main()
