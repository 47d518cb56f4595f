"""Runs on the machines of a Ray cluster, each a task of as many CPUs as it has threads.

A worker that dies is replaced by Ray, and its run goes on from its checkpoint, which must therefore be in a folder
that all machines share. What a run writes and reads is the same as on one machine.
"""

from __future__ import annotations

import os
import re
import socket
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wellcond.experiments import folders
from wellcond.experiments.errors import ConfigError, RunError
from wellcond.experiments.grid.attempt import Executor, Outcome, Outcomes, Task, alone_on_its_cpu, attempt_elsewhere

MOST_DEATHS = 3
PATIENCE = 5.0  # seconds until a cluster has answered


def on_ray(executor: str, jobs: int | None) -> Executor:
    """On the cluster at ``ray://HOST:PORT``; by ``ray`` on that of RAY_ADDRESS, or one that this machine belongs to, or
    else one made on this machine with ``jobs`` workers (by default its cores). At most ``jobs`` runs at once.

    Raises:
        ImportError: Ray is not installed.
        ConfigError: the address cannot be understood, or nobody answers there.
    """
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise ImportError('--executor ray needs the package ray: pip install "wellcond[ray]"') from None
    address = None if executor == "ray" else executor
    _refuse_unreachable(address or os.environ.get("RAY_ADDRESS"))

    def train(tasks: Sequence[Task]) -> Outcomes:
        mine = not ray.is_initialized()
        if mine:
            _join(ray, address, jobs)
        try:
            yield from _train(ray, tasks, jobs or len(tasks))
        finally:
            if mine:
                ray.shutdown()

    return train


def _join(ray: Any, address: str | None, jobs: int | None) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    try:
        try:
            ray.init(address or "auto", **quiet)  # "auto": of RAY_ADDRESS, or one that runs on this machine
        except ConnectionError:
            if address or os.environ.get("RAY_ADDRESS"):
                raise
            ray.init("local", num_cpus=jobs, include_dashboard=False, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise RunError(f"the Ray cluster cannot be used: {' '.join(str(error).split())}") from error


def _train(ray: Any, tasks: Sequence[Task], most: int) -> Outcomes:
    gpus = ray.cluster_resources().get("GPU", 0) > 0
    waiting = deque((place, 0) for place in range(len(tasks)))
    busy: dict[Any, tuple[int, int]] = {}
    try:
        while waiting or busy:
            while waiting and len(busy) < most:
                place, deaths = waiting.popleft()
                config = tasks[place].config
                needs = {"num_cpus": (config.threads or 1) * config.devices, "num_gpus": config.devices if gpus else 0}
                # Deaths are counted here, so that a run that always kills its worker does not go on for ever.
                work = ray.remote(max_retries=0, **needs)(_on_a_worker)
                busy[work.remote(Task(config, tasks[place].folder.absolute()), os.getcwd())] = (place, deaths)
            for done in ray.wait(list(busy), num_returns=1)[0]:
                place, deaths = busy.pop(done)
                try:
                    yield place, ray.get(done)
                except ray.exceptions.RayTaskError as error:
                    yield place, Outcome(" ".join(str(error.cause).split()), str(error))
                except ray.exceptions.RayError as error:  # its worker, or the machine, died
                    if deaths + 1 < MOST_DEATHS:
                        waiting.appendleft((place, deaths + 1))
                    else:
                        why = " ".join(str(error).split())
                        yield place, Outcome(f"its worker died {MOST_DEATHS} times: {why}", str(error))
    finally:
        for unfinished in busy:
            ray.cancel(unfinished, force=True)


def _on_a_worker(task: Task, place: str) -> Outcome:
    """`attempt_elsewhere` where the command was typed, as paths may be relative."""
    if Path(place).is_dir():
        os.chdir(place)
    comparison = task.folder.parents[1]
    if not (comparison / folders.CONFIG).exists():
        host = socket.gethostname()
        return Outcome(f"'{comparison}' is not there on the worker {host}: --out must be in a folder that all share")
    alone_on_its_cpu()
    return attempt_elsewhere(task)


def _refuse_unreachable(address: str | None) -> None:
    """Ray itself would wait half a minute, and write a page."""
    if address in (None, "", "auto", "local"):
        return
    found = re.fullmatch(r"(?:ray://)?\[?([^/\[\]]+?)\]?:(\d{1,5})", address)
    if found is None or not 0 < int(found[2]) < 65536:
        raise ConfigError(f"a Ray cluster is at ray://HOST:PORT, such as ray://head:10001; got '{address}'")
    try:
        socket.create_connection((found[1], int(found[2])), timeout=PATIENCE).close()
    except OSError as error:
        why = error.strerror or str(error)
        raise ConfigError(f"no Ray cluster answers at '{address}' ({why}): start one by 'ray start --head'") from None
