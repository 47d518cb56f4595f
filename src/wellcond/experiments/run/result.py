"""The result of a run, `result.json`: errors, conditioning of its layers, and environment.

Errors and accuracies are fractions in files and percentages in printed tables.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from wellcond._shared.machine import cpu_model
from wellcond.experiments.errors import RunError
from wellcond.experiments.files import write_json
from wellcond.experiments.run.config import RunConfig

RESULT, CONDITION, METRICS = "result.json", "condition.csv", "metrics.csv"
EARLIER_RESULT = "result.{}-epochs.json"
"""The result of a run before it was extended."""


@dataclass(frozen=True)
class LayerCondition:
    """The conditioning of one layer's input covariance over a run: medians over the recorded steps."""

    layer: str
    kappa: float  # κ(P), without ε
    kappa_eps: float  # κ(P + εI), as seen by the solver
    numerical_rank: float
    dim: int
    effective_rank: float  # (tr P)² / tr P²
    failures: int  # decompositions that failed at first
    records: int  # number of recorded steps

    @classmethod
    def of(cls, layer: str, found: Mapping[str, float]) -> LayerCondition:
        """From the monitor's statistics of the layer."""
        kinds: dict[str, Any] = {field.name: int if field.type == "int" else float for field in fields(cls)[1:]}
        return cls(layer, **{name: kind(found[name]) for name, kind in kinds.items()})


@dataclass(frozen=True)
class RunResult:
    """One finished run, tested once with the weights of the last epoch; epochs count from 0."""

    config: RunConfig
    folder: str
    test_error: float
    test_accuracy: float
    test_loss: float
    best_val_accuracy: float  # of `best.ckpt`
    best_epoch: int
    steps: int
    seconds: float  # training time, summed over resumed sessions
    seconds_per_step: float  # median
    conditions: tuple[LayerCondition, ...]
    environment: dict[str, str]
    test_top5_error: float | None = None  # only with more than five classes, and not in old results

    def save(self) -> None:
        """Write `result.json` to the run's folder, which marks the run as finished."""
        values = asdict(self)
        del values["folder"]  # the folder may be moved
        write_json(Path(self.folder) / RESULT, values)


def load_result(folder: Path, name: str = RESULT) -> RunResult | None:
    """The result of a finished run, None if unfinished; a `RunError` if the file is damaged."""
    path = folder / name
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text())
        values["config"] = RunConfig.from_dict(values["config"])
        values["conditions"] = tuple(LayerCondition(**_floats(LayerCondition, c)) for c in values["conditions"])
        return RunResult(folder=str(folder), **_floats(RunResult, values))
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"'{path}' is not the result of a run ({error}); delete it and use --resume") from error


def earlier_epochs(folder: Path) -> list[int]:
    """The numbers of epochs after which a run was finished before it was extended."""
    marks = EARLIER_RESULT.split("{}")
    names = [path.name for path in folder.glob(EARLIER_RESULT.format("*"))]
    return sorted(int(name.removeprefix(marks[0]).removesuffix(marks[1])) for name in names)


def newest_earlier_result(folder: Path) -> RunResult | None:
    """The last result of a run before it was extended, or None."""
    epochs = earlier_epochs(folder)
    return load_result(folder, EARLIER_RESULT.format(epochs[-1])) if epochs else None


def _floats(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the strings `inf` and `nan` in the float fields of a dataclass back to numbers."""
    numbers = {field.name for field in fields(kind) if field.type == "float"}
    return {name: float(value) if name in numbers else value for name, value in values.items()}


def versions() -> dict[str, str]:
    """Versions of wellcond, PyTorch and Python, the system, and the number of PyTorch threads."""
    import torch

    import wellcond

    return {
        "wellcond": wellcond.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": str(torch.get_num_threads()),
    }


def hardware() -> dict[str, str]:
    """The CPU, the number of cores available to this process, and the GPU if any."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {"cpu": cpu_model(), "cores": str(cores), **gpu}
