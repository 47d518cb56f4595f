"""What does every benchmark say, and what became slower since an earlier run?

Runs the scripts that measure speed, each of them several times in processes of its own, and writes one file: ratios to
a reference that was timed in turns in the same process (never seconds), and their noise, the range of the runs over
their median. Rounds go over all scripts, so that a load that comes and goes is part of the noise. The file is written
after every script; ``--resume`` goes on where a run was stopped.

With ``--against`` an earlier file, or ``--compare`` two of them, it lists what grew by more than the noise of both, and
ends with status 1 if anything did, is missing, or failed.

    python benchmarks/run_all.py --out today.json
    python benchmarks/run_all.py --out today.json --against yesterday.json
    python benchmarks/run_all.py --compare yesterday.json today.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from wellcond.bench.ratios import FORMAT, Change, changes, noise, only_in, read_values
from wellcond.bench.run import environment
from wellcond.experiments.files import write_json

HERE = Path(__file__).parent
SCRIPTS = (
    "how_many_kernels",
    "are_small_inputs_slow",
    "are_we_faster_than_autograd",
    "how_do_peers_compare",
    "how_fast_is_covariance_pooling",
    "how_fast_is_decorrelated_batchnorm",
    "how_much_do_treatments_cost",
    "how_much_does_every_norm_cost",
    "how_much_does_the_monitor_cost",
    "how_does_it_compile",
    "when_do_threads_pay",
    "when_does_the_factor_pay",
    "where_does_auto_cross_over",
)
ARGUMENTS = {"how_does_it_compile": ["--time"]}
# What must agree for two files to be comparable.
SAME = ("torch", "device", "threads")


def run_script(name: str, quick: bool) -> tuple[dict[str, float], str]:
    """The ratios of one run of a script, and why there are none."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ratios.json"
        command = [sys.executable, str(HERE / f"{name}.py"), "--ratios", str(path)]
        command += ARGUMENTS.get(name, []) + ["--quick"] * quick
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode or not path.exists():
            lines = done.stderr.strip().splitlines()
            return {}, lines[-1] if lines else f"status {done.returncode}"
        return json.loads(path.read_text(encoding="utf-8")), ""


def add_run(found: dict[str, Any], ratios: Mapping[str, float], failure: str) -> None:
    """One more run of a script in the place of the file that is the script's."""
    found["runs"] += 1
    if failure:
        found["failures"].append(failure)
    for name, value in ratios.items():
        entry = found["ratios"].setdefault(name, {"runs": []})
        entry["runs"].append(value)
        entry["ratio"], entry["noise"] = statistics.median(entry["runs"]), noise(entry["runs"])


def measure(out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run what is still to be run, and keep the file up to date."""
    wanted = [name for name in SCRIPTS if not options.only or name in options.only]
    everything: dict[str, Any] = {
        "format": FORMAT,
        "quick": options.quick,
        "environment": environment(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "scripts": {},
    }
    if options.resume and out.exists():
        everything, _ = read_values(out)
        if everything["quick"] != options.quick:
            raise SystemExit(f"{out} was {'' if everything['quick'] else 'not '}made with --quick: resume it likewise")
        for found in everything["scripts"].values():  # failed runs are tried again
            found["runs"] -= len(found["failures"])
            found["failures"] = []
    for round_ in range(options.runs):
        for name in wanted:
            found = everything["scripts"].setdefault(name, {"runs": 0, "failures": [], "ratios": {}})
            if found["runs"] > round_:
                continue
            start = time.monotonic()
            ratios, failure = run_script(name, options.quick)
            add_run(found, ratios, failure)
            write_json(out, everything)
            said = failure or f"{len(ratios)} ratios"
            print(f"{round_ + 1}/{options.runs} {name}: {said}, {time.monotonic() - start:.0f} s", flush=True)
    return everything


def table(found: list[Change]) -> str:
    rows = [
        f"| {c.script} | {c.name} | {c.before:.3g} | {c.after:.3g} | {c.growth:+.0%} | {c.noise:.0%} |" for c in found
    ]
    return "\n".join(["| script | ratio | before | now | change | noise |", "|---|---|---:|---:|---:|---:|", *rows])


def compare(before_path: Path, after_path: Path) -> bool:
    """Print what changed by more than the noise; whether nothing is slower, missing or failed."""
    (before, old), (after, new) = read_values(before_path), read_values(after_path)
    if before["quick"] != after["quick"]:
        raise SystemExit("one of the files was made with --quick and the other without: their shapes differ")
    for key in SAME:
        values = [everything["environment"].get(key) for everything in (before, after)]
        if values[0] != values[1]:
            print(f"note: {key} was {values[0]} and is {values[1]}; differences may be its")
    failed = [(name, f["failures"][-1]) for name, f in after["scripts"].items() if f["failures"]]
    found = changes(old, new)
    slower, faster = [c for c in found if c.is_slower], [c for c in found if c.is_faster]
    missing = [(script, name) for script, name in only_in(old, new) if script in new]
    for what, some in (("slower", slower), ("faster", faster)):
        print(f"\n{len(some)} of {len(found)} ratios are {what} by more than the noise")
        if some:
            print(table(some))
    for name, failure in failed:
        print(f"failed: {name}: {failure}")
    for script, name in missing:
        print(f"no longer measured: {script}: {name}")
    for script in sorted(set(old) - set(new)):
        print(f"not run: {script}")
    for script, name in only_in(new, old):
        print(f"new: {script}: {name}")
    return not (slower or missing or failed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the file to write")
    parser.add_argument("--against", type=Path, help="an earlier file to compare with")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("EARLIER", "LATER"), help="compare, and run nothing")
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, metavar="SCRIPT", help=f"of {', '.join(SCRIPTS)}")
    parser.add_argument("--runs", type=int, default=3, help="of each script; at least 2, which the noise is between")
    parser.add_argument("--quick", action="store_true", help="few shapes and timings")
    parser.add_argument("--resume", action="store_true", help="keep what --out holds already")
    options = parser.parse_args()
    if options.compare:
        try:
            sys.exit(not compare(*options.compare))
        except (OSError, ValueError) as error:
            parser.error(f"--compare: {error}")
    if options.out is None:
        parser.error("give --out FILE, or --compare EARLIER LATER")
    if options.runs < 2:
        parser.error(f"--runs must be at least 2, got {options.runs}: one run has no noise to compare with")
    if options.out.exists() and not options.resume:
        parser.error(f"{options.out} exists: give --resume to go on with it, or another --out")
    if options.against is not None:
        try:
            read_values(options.against)  # before hours of measuring
        except (OSError, ValueError) as error:
            parser.error(f"--against: {error}")
    everything = measure(options.out, options)
    print(f"wrote {options.out}")
    failed = any(found["failures"] for found in everything["scripts"].values())
    sys.exit(failed if options.against is None else not compare(options.against, options.out))


if __name__ == "__main__":
    main()
