"""Runs small enough for tests, and the comparison of what two runs left behind."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from typing import Any

import torch

from wellcond.experiments.files import read_csv
from wellcond.experiments.run.config import RunConfig, run_config


def small(**options: Any) -> RunConfig:
    """Four steps an epoch of a narrow network on few digits, measured at every other step."""
    defaults: dict[str, Any] = {
        "data": "digits",
        "limit": 130,
        "width": 8,
        "batch_size": 32,
        "epochs": 3,
        "monitor_every": 2,
        "lr": 0.05,
    }
    return run_config(**{**defaults, **options})


def checkpoint(folder: Path, name: str = "last.ckpt") -> dict[str, Any]:
    """A checkpoint of a run, read as safely as it must be readable."""
    return torch.load(folder / "checkpoints" / name, weights_only=True)


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two nested structures differ; tensors must be equal bit for bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape
        # through bytes, so that -0.0, NaN and the last bit count
        same = same and one.contiguous().numpy().tobytes() == other.contiguous().numpy().tobytes()
        return [] if same else [path]
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [*one, *(key for key in other if key not in one)]
        missing = object()
        return [d for k in keys for d in differences(one.get(k, missing), other.get(k, missing), f"{path}/{k}")]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        return [d for i, pair in enumerate(zip(one, other, strict=True)) for d in differences(*pair, f"{path}/{i}")]
    return [] if type(one) is type(other) and (one == other or one != one) else [path]


def differences_of_runs(one: Path, other: Path) -> list[str]:
    """Where two runs differ in anything but time: last and best checkpoint, metrics, condition numbers."""
    found = []
    for name in ("last.ckpt", "best.ckpt"):
        states = [checkpoint(folder, name) for folder in (one, other)]
        for state in states:
            state["callbacks"].pop("RunLog")  # holds times
        found += differences(*states, path=name)
    rows = [read_csv(folder / "metrics.csv") for folder in (one, other)]
    for row in rows[0] + rows[1]:
        for name in ("seconds", "seconds_total", "images_per_second"):
            row.pop(name)
    found += differences(*rows, path="metrics.csv")
    if (one / "condition.csv").read_bytes() != (other / "condition.csv").read_bytes():
        found.append("condition.csv")
    return found


def full_disk_after(bytes_free: int, monkeypatch: Any) -> None:
    """Let `os.write` write that many bytes, then fail as a full disk does: a short write, then ENOSPC."""
    left, real = [bytes_free], os.write

    def write(descriptor: int, data: Any) -> int:
        if left[0] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = real(descriptor, bytes(data[: left[0]]))
        left[0] -= written
        return written

    monkeypatch.setattr(os, "write", write)


def fail_in_rank_1(message: str) -> None:
    """Work for two processes of which one fails while the other waits for it, as in a collective operation."""
    if os.environ["RANK"] == "1":
        raise ValueError(message)
    signal.pause()


def terminate_rank_1() -> None:
    """Work for two processes of which one gets SIGTERM while the other waits for it."""
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    signal.pause()
