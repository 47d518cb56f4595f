"""Runs of a grid side by side: the same bits as one after another, and none is lost by what befalls another."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import types
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

import dying_work
from small_runs import differences_of_runs, small
from test_cli import SMALL, call, one_line
from wellcond.experiments.compare import compare
from wellcond.experiments.errors import RunError
from wellcond.experiments.grid import attempt, processes
from wellcond.experiments.grid.held import with_threads
from wellcond.experiments.results.parquet import read_results
from wellcond.experiments.run.training import Classifier

GRID = [replace(small(treat=treat, augment=True), threads=None) for treat in ("none", "nog", "nog+ow+olr")]
DIVERGES = small(norm="batch", lr=1e30)
NAMES = [config.folder_name for config in GRID]


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory):
    """The grid in this process, on one thread."""
    out = tmp_path_factory.mktemp("grid") / "out"
    compare(with_threads(GRID, [], apart=True), out)
    return out


def differing(one, other):
    return {name: found for name in NAMES if (found := differences_of_runs(one / "runs" / name, other / "runs" / name))}


def children():
    """The processes of runs that this one has started."""
    return [child for child in psutil.Process().children(recursive=True) if "LokyProcess" in " ".join(child.cmdline())]


@pytest.mark.slow
def test_two_at_once_of_which_one_is_killed_and_one_fails_give_the_bits_of_one_by_one(one_by_one, tmp_path, caplog):
    """The killed run goes on from its checkpoint in another process; every one is told once, and kept at once."""
    out, killed, told = tmp_path / "out", [], []

    def kill() -> None:
        while not any((out / "runs").glob("zca*/checkpoints/last.ckpt")):
            time.sleep(0.01)
        killed.extend(children())
        killed[0].kill()

    def finished(index, result):
        told.append(index)
        assert len(read_results(out)) == len(told)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    with (
        caplog.at_level(logging.WARNING, logger="wellcond"),
        pytest.raises(RunError, match=r"batch-seed0: .* diverged"),
    ):
        compare([DIVERGES, *GRID], out, jobs=2, finished=finished)
    killer.join()
    assert len(killed) == 2 and not killed[0].is_running()
    assert differing(one_by_one, out) == {}
    assert sorted(told) == [1, 2, 3]
    assert not children()  # they have ended with the grid
    held = json.loads((out / "config.json").read_text())["config"]["runs"]
    assert [config["threads"] for config in held] == [1] * 4  # so that it goes on in the same way, however many jobs
    before = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("zca*/*")}
    with pytest.raises(RunError, match=r"batch-seed0: .* diverged"):
        compare([DIVERGES, *GRID], out, resume=True)
    assert {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("zca*/*")} == before


def grid_of_two(out: Path) -> subprocess.Popen[str]:
    """The command, with a process group of its own."""
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\nfrom wellcond.cli import main; main()"
    )
    options = ["--limit", "130", "--width", "8", "--batch-size", "32", "--epochs", "3", "--monitor-every", "2"]
    options += ["--lr", "0.05", "--augment", "--norm", "zca", "--treat", "none,nog,nog+ow+olr", "--seeds", "1"]
    return subprocess.Popen(
        [sys.executable, "-c", code, "compare", *options, "--jobs", "2", "--out", str(out)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_what_ends_the_grid_ends_its_runs_and_it_goes_on(number, one_by_one, tmp_path):
    """Ctrl-C reaches all processes at once; SIGKILL one, and the others must see that nobody waits for them."""
    out = tmp_path / "out"
    process = grid_of_two(out)
    deadline = time.monotonic() + 120
    while not any((out / "runs").glob("*/metrics.csv")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    ours = psutil.Process(process.pid).children(recursive=True)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.kill()
    _, said = process.communicate(timeout=60)
    if number == signal.SIGINT:
        line = f"interrupted; what was saved is kept; go on with: wellcond compare --out {out} --resume --jobs 2"
        assert (process.returncode, said.splitlines()) == (130, [line])
    psutil.wait_procs(ours, timeout=5)
    assert not [child for child in ours if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    resumed = call("compare", "--out", out, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert differing(one_by_one, out) == {}


@pytest.mark.slow
def test_ctrl_c_while_the_processes_start_says_one_line(tmp_path):
    """It reaches a process that still imports, and has not been told to leave it to the first one."""
    line = "interrupted; what was saved is kept; go on with: wellcond compare --out {} --resume --jobs 2"
    for wait in (0.0, 0.6):
        out = tmp_path / str(wait)
        process = grid_of_two(out)
        while not (out / "runs").exists():
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(wait)
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=60)
        assert (process.returncode, said.splitlines()) == (130, [line.format(out)])


def test_a_run_that_fails_does_not_keep_the_others_from_finishing(tmp_path, caplog):
    """One diverges, and the folder of another is somebody else's; that one is trained once it is free."""
    configs = [small(epochs=1, lr=1e30), small(epochs=1, norm="batch"), small(epochs=1, seed=1)]
    out = tmp_path / "out"
    (out / "runs" / "batch-seed0").mkdir(parents=True)
    (out / "runs" / "batch-seed0" / "thesis.tex").write_text("years of work")
    (out / "config.json").write_text(json.dumps({"kind": "comparison", "config": {"runs": [configs[2].to_dict()]}}))
    with caplog.at_level(logging.WARNING, logger="wellcond"), pytest.raises(RunError) as failed:
        compare(configs, out, resume=True)
    said = str(failed.value)
    assert "\n" not in said
    assert "zca-seed0: training diverged at step" in said
    assert "batch-seed0" in said and "holds files that no run made" in said
    assert "go on with --resume" in said
    assert "zca-seed0 failed, the others go on: training diverged" in caplog.text
    assert [result.config.seed for result in read_results(out)] == [1]
    (out / "runs" / "batch-seed0" / "thesis.tex").unlink()
    with pytest.raises(RunError, match=r"^zca-seed0: training diverged") as failed:
        compare(configs, out, resume=True)
    assert "batch" not in str(failed.value)
    assert {result.config.label for result in read_results(out)} == {"zca", "batch"}


def test_a_full_disk_stops_the_grid(tmp_path, monkeypatch):
    """The next run would only train an epoch in vain."""
    begun = []

    def full(self, batch, index):
        begun.append(self.config.seed)
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Classifier, "training_step", full)
    with pytest.raises(RunError, match=r"No space left on device; 2 more were not trained; .* --resume"):
        compare([small(epochs=1, seed=seed) for seed in range(3)], tmp_path / "out")
    assert begun == [0]


def test_a_run_whose_process_dies_again_and_again_is_given_up(tmp_path, monkeypatch):
    """Of two at once: one that lives, one that dies once, one that always does; in the end no process is left."""
    monkeypatch.setattr(processes, "_train", dying_work.live_or_die)
    monkeypatch.setattr(processes, "_initialise", dying_work.begin)
    tasks = ["live", f"die 1 {tmp_path / 'once'}", f"die 99 {tmp_path / 'always'}", "live too"]
    ends = dict(processes.in_processes(2)(tasks))
    assert sorted(ends) == [0, 1, 2, 3]
    assert [ends[place].split(",")[0] for place in (0, 1, 3)] == [tasks[place] for place in (0, 1, 3)]
    assert ends[2].trouble == "its process died 3 times: killed, or out of memory"
    assert (tmp_path / "always").read_text() == "..."
    assert not children()


def test_a_process_that_keeps_images_stays(monkeypatch, recwarn):
    """Its id is known, so that it can be ended; and no warning of a leak is shown. loky looks by psutil."""
    monkeypatch.setattr(processes, "_train", dying_work.grow)
    ends = dict(processes.in_processes(1)(["first", "second"]))
    assert ends[0] == ends[1] != os.getpid()
    assert not recwarn.list


def test_a_process_loads_the_images_once(tmp_path, monkeypatch):
    """Until a run needs others."""
    loaded = []
    real = attempt.CLASSIFIERS
    counting = replace(real, load=lambda config: loaded.append(config) or real.load(config))
    monkeypatch.setattr(attempt, "_CACHE", {})
    configs = [small(epochs=1, seed=seed) for seed in range(2)] + [small(epochs=1, limit=100)]
    for place, config in enumerate(configs):
        assert attempt.attempt(attempt.Task(config, tmp_path / str(place), counting)) == attempt.Outcome()
    assert loaded == [configs[0], configs[2]]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--jobs", "0"], "error: jobs must be at least 1, got 0"),
        (["--jobs", "-3"], "error: jobs must be at least 1, got -3"),
        (["--executor", "slurm"], "error: executor must be ray or ray://HOST:PORT, got 'slurm'"),
        (["--executor", "ray://nowhere"], "error: the address of a Ray cluster is ray://HOST:PORT, such as"),
        (
            ["--executor", "ray://127.0.0.1:9"],
            "error: no Ray cluster answers at 'ray://127.0.0.1:9' (Connection",
        ),
    ],
    ids=lambda value: "=".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_nothing_is_written(options, says, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", types.ModuleType("ray"))  # whether it is installed or not
    refused = call("compare", *SMALL, *options, "--out", tmp_path / "out")
    assert refused.exit_code == 2
    assert one_line(refused).startswith(says)
    assert not (tmp_path / "out").exists()


def test_without_ray_it_is_said_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    refused = call("compare", *SMALL, "--executor", "ray", "--out", tmp_path / "out")
    assert refused.exit_code == 2
    assert one_line(refused) == 'error: --executor ray needs the package ray: pip install "wellcond[ray]"'


def test_threads_are_as_said_as_held_or_one_apart():
    free, said = replace(small(), threads=None), small(seed=1, threads=4)
    assert [c.threads for c in with_threads([free, said], [], apart=True)] == [1, 4]
    assert [c.threads for c in with_threads([free, said], [], apart=False)] == [None, 4]
    assert [c.threads for c in with_threads([free], [small(threads=2)], apart=True)] == [2]
    assert [c.threads for c in with_threads([free], [free], apart=True)] == [None]
    rows = [small(lr=0.1, threads=4), free]  # each goes on as it began, and so does a further seed
    assert with_threads([rows[0], replace(free, seed=5)], rows, apart=True) == [rows[0], replace(free, seed=5)]


@pytest.mark.parametrize("jobs", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_runs_whose_threads_are_open_go_on_with_those_of_the_finished_ones(tmp_path, jobs):
    grid = [replace(small(epochs=1, seed=seed), threads=None) for seed in range(2)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        compare(grid[:1], tmp_path / "out")
        torch.set_num_threads(1)
        compare(grid, tmp_path / "out", resume=True, jobs=jobs)
    finally:
        torch.set_num_threads(before)
    assert [result.environment["threads"] for result in read_results(tmp_path / "out")] == ["2", "2"]
