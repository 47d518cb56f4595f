"""Runs of a grid on a Ray cluster of two workers: the same bits as here, and none lost when a worker dies."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from small_runs import differences_of_runs, small
from test_cli import call, one_line
from wellcond.experiments.compare import compare
from wellcond.experiments.errors import RunError
from wellcond.experiments.grid import ray_cluster
from wellcond.experiments.grid.held import with_threads

# Before the import, which reads it. Otherwise Ray asks for a token where the user has one, and its client sends none.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
ray = pytest.importorskip("ray")

GRID = [replace(small(treat=treat, augment=True), threads=None) for treat in ("none", "nog", "nog+ow+olr")]
NAMES = [config.folder_name for config in GRID]
OPTIONS = [
    "--limit",
    "130",
    "--width",
    "8",
    "--batch-size",
    "32",
    "--epochs",
    "3",
    "--monitor-every",
    "2",
    "--lr",
    "0.05",
]
OPTIONS += ["--augment", "--norm", "zca", "--treat", "none,nog,nog+ow+olr", "--seeds", "1"]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The grid in this process, on one thread."""
    out = tmp_path_factory.mktemp("grid") / "out"
    compare(with_threads(GRID, [], apart=True), out)
    return out


@pytest.fixture(scope="module")
def cluster():
    """A cluster of two workers on this machine, its address for clients, and the processes of its workers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "ray.scripts.scripts"]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])  # for what workers unpickle
    options = ["--head", "--port=0", "--num-cpus=2", f"--ray-client-server-port={port}", "--include-dashboard=false"]
    subprocess.run(
        [*command, "start", *options], check=True, capture_output=True, env={**os.environ, "PYTHONPATH": path}
    )
    yield f"ray://127.0.0.1:{port}"
    subprocess.run([*command, "stop", "--force"], check=True, capture_output=True)


def workers():
    """The processes in which runs are trained now."""
    named = {p: p.info["cmdline"] or [] for p in psutil.process_iter(["cmdline"])}
    return [process for process, line in named.items() if line and line[0].startswith("ray::_on_worker")]


@pytest.mark.slow
def test_a_cluster_of_this_machine_is_made_where_there_is_none(here, tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    out = tmp_path / "out"
    done = call("compare", *OPTIONS, "--executor", "ray", "--jobs", "2", "--out", out)
    assert done.exit_code == 0, done.output
    assert "[3/3]" in done.stdout
    assert not ray.is_initialized()
    assert {n: d for n in NAMES if (d := differences_of_runs(here / "runs" / n, out / "runs" / n))} == {}


@pytest.mark.slow
def test_a_worker_that_is_killed_loses_nothing(here, cluster, tmp_path):
    """By the address of a cluster, as from another machine; the killed run goes on from its checkpoint."""
    out, killed = tmp_path / "out", []

    def kill() -> None:
        while not (any((out / "runs").glob("*/checkpoints/last.ckpt")) and workers()):
            time.sleep(0.01)
        killed.append(workers()[0])
        killed[0].kill()

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    told = []
    compare(GRID, out, executor=cluster, finished=lambda index, result: told.append(index))
    killer.join()
    assert killed and not killed[0].is_running()
    assert sorted(told) == [0, 1, 2]
    assert {n: d for n in NAMES if (d := differences_of_runs(here / "runs" / n, out / "runs" / n))} == {}


def die(task, place):
    os.kill(os.getpid(), 9)


@pytest.mark.slow
def test_a_run_whose_worker_dies_again_and_again_is_given_up(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_cluster, "_on_worker", die)
    with pytest.raises(RunError, match=r"zca\+nog-seed0: its worker died 3 times: .*go on with --resume"):
        compare(GRID[1:2], tmp_path / "out", executor=cluster)
    assert not ray.is_initialized()


@pytest.mark.parametrize("mode", [None, "token"])
def test_a_cluster_that_lets_a_client_wait_may_ask_for_a_token(mode, monkeypatch):
    """As Ray 2.60 does where its user has one, while its client sends none unless told."""
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    if mode:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)

    class Waiting:
        def init(self, *args, **options):
            raise ConnectionError("ray client connection timeout")

    with pytest.raises(RunError, match="cannot be used: ray client connection timeout") as refused:
        ray_cluster._connect(Waiting(), "ray://head:10001", None)
    assert ("set RAY_AUTH_MODE=token here too" in str(refused.value)) == (mode is None)


def test_an_address_that_does_not_answer_is_refused_at_once(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))  # bound, and not listening
        address = f"ray://127.0.0.1:{probe.getsockname()[1]}"
        began = time.monotonic()
        refused = call("compare", *OPTIONS, "--executor", address, "--out", tmp_path / "out")
    assert refused.exit_code == 2
    assert one_line(refused).startswith(f"error: no Ray cluster answers at '{address}'")
    assert time.monotonic() - began < 2 * ray_cluster.CONNECT_SECONDS
    assert not (tmp_path / "out").exists()


def test_a_folder_that_a_worker_does_not_see_is_said(tmp_path):
    task = ray_cluster.Task(GRID[0], tmp_path / "elsewhere" / "runs" / "zca-seed0")
    before = os.getcwd()
    trouble = ray_cluster._on_worker(task, str(tmp_path / "not there")).trouble
    assert "does not exist on worker" in trouble and "--out must be in a folder that all machines share" in trouble
    assert os.getcwd() == before
