"""Runs on a Ray cluster, one Ray task per run with as many CPUs as it has threads.

A dead worker is replaced, and its run continues from its checkpoint, which must be in a folder that all machines share.
A run reads and writes the same files as on one machine.
"""

from __future__ import annotations

import os
import re
import socket
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from wellcond.experiments import folders
from wellcond.experiments.errors import ConfigError, RunError
from wellcond.experiments.grid.attempt import Executor, Outcome, Outcomes, Task, attempt_elsewhere, use_one_thread

MAX_DEATHS = 3
CONNECT_SECONDS = 5.0


def on_ray(executor: str, jobs: int | None) -> Executor:
    """An executor for the cluster at ``ray://HOST:PORT``. For ``ray`` it is the cluster of RAY_ADDRESS, or that of this
    machine, or a new local one with ``jobs`` workers (by default one per core). At most ``jobs`` runs at once.

    Raises:
        ImportError: Ray is not installed.
        ConfigError: an invalid address, or no answer there.
    """
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise ImportError('--executor ray needs the package ray: pip install "wellcond[ray]"') from None
    address = None if executor == "ray" else executor
    _refuse_unreachable(address or os.environ.get("RAY_ADDRESS"))

    def train(tasks: Sequence[Task]) -> Outcomes:
        owned = not ray.is_initialized()
        if owned:
            _connect(ray, address, jobs)
        try:
            yield from _train(ray, tasks, jobs or len(tasks))
        finally:
            if owned:
                ray.shutdown()

    return train


def _connect(ray: Any, address: str | None, jobs: int | None) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    try:
        try:
            ray.init(address or "auto", **quiet)  # "auto": that of RAY_ADDRESS or of this machine
        except ConnectionError:
            if address or os.environ.get("RAY_ADDRESS"):
                raise
            ray.init("local", num_cpus=jobs, include_dashboard=False, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        why = " ".join(str(error).split())
        if "timeout" in why and "RAY_AUTH_MODE" not in os.environ:
            # Since Ray 2.60 a cluster may ask for a token; a client without one is left to wait.
            why += "; if the cluster asks for a token, set RAY_AUTH_MODE=token here too"
        raise RunError(f"the Ray cluster cannot be used: {why}") from error


def _train(ray: Any, tasks: Sequence[Task], max_running: int) -> Outcomes:
    gpus = ray.cluster_resources().get("GPU", 0) > 0
    waiting = deque((index, 0) for index in range(len(tasks)))
    running: dict[Any, tuple[int, int]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < max_running:
                index, deaths = waiting.popleft()
                config = tasks[index].config
                threads = config.threads or tasks[index].threads or 1
                needs = {"num_cpus": threads * config.devices, "num_gpus": config.devices if gpus else 0}
                # Retries are counted here, so that a run that always kills its worker is given up.
                work = ray.remote(max_retries=0, **needs)(_on_worker)
                task = replace(tasks[index], folder=tasks[index].folder.absolute())
                running[work.remote(task, os.getcwd())] = (index, deaths)
            for done in ray.wait(list(running), num_returns=1)[0]:
                index, deaths = running.pop(done)
                try:
                    yield index, ray.get(done)
                except ray.exceptions.RayTaskError as error:
                    yield index, Outcome(" ".join(str(error.cause).split()), str(error))
                except ray.exceptions.RayError as error:  # the worker or its machine died
                    if deaths + 1 < MAX_DEATHS:
                        waiting.appendleft((index, deaths + 1))
                    else:
                        why = " ".join(str(error).split())
                        yield index, Outcome(f"its worker died {MAX_DEATHS} times: {why}", str(error))
    finally:
        for unfinished in running:
            ray.cancel(unfinished, force=True)


def _on_worker(task: Task, working_directory: str) -> Outcome:
    """`attempt_elsewhere` in the working directory of the command, as paths may be relative."""
    if Path(working_directory).is_dir():
        os.chdir(working_directory)
    comparison = task.folder.parents[1]
    if not (comparison / folders.CONFIG).exists():
        host = socket.gethostname()
        return Outcome(
            f"'{comparison}' does not exist on worker {host}: --out must be in a folder that all machines share"
        )
    use_one_thread()
    return attempt_elsewhere(task)


def _refuse_unreachable(address: str | None) -> None:
    """Fail fast: Ray itself would wait half a minute and print a long error."""
    if address in (None, "", "auto", "local"):
        return
    found = re.fullmatch(r"(?:ray://)?\[?([^/\[\]]+?)\]?:(\d{1,5})", address)
    if found is None or not 0 < int(found[2]) < 65536:
        raise ConfigError(f"the address of a Ray cluster is ray://HOST:PORT, such as ray://head:10001; got '{address}'")
    try:
        socket.create_connection((found[1], int(found[2])), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        why = error.strerror or str(error)
        raise ConfigError(f"no Ray cluster answers at '{address}' ({why}): start one by 'ray start --head'") from None
