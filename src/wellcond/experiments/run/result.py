"""What one run found: `result.json`, with the conditioning of its layers and the machine.

Errors and accuracies are fractions in the files and percent in the printed tables.
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
"""The result of a run before it was made longer."""


@dataclass(frozen=True)
class LayerCondition:
    """The conditioning of one layer's input covariance over one run; medians are over the recorded steps."""

    layer: str
    kappa: float  # κ(P), without ε
    kappa_eps: float  # κ(P + εI), what the solver sees
    numerical_rank: float
    dim: int
    effective_rank: float  # (tr P)² / tr P²
    failures: int  # decompositions that failed at first, over the whole run
    records: int  # how many measurements the medians are over

    @classmethod
    def of(cls, layer: str, found: Mapping[str, float]) -> LayerCondition:
        """From the statistics of a monitor."""
        kinds: dict[str, Any] = {field.name: int if field.type == "int" else float for field in fields(cls)[1:]}
        return cls(layer, **{name: kind(found[name]) for name, kind in kinds.items()})


@dataclass(frozen=True)
class RunResult:
    """One finished run: the test images are seen once, with the last epoch's weights; epochs count from 0."""

    config: RunConfig
    folder: str
    test_error: float
    test_accuracy: float
    test_loss: float
    best_val_accuracy: float  # on the validation images, of `best.ckpt`
    best_epoch: int
    steps: int
    seconds: float  # of training, summed over the sessions of a resumed run
    seconds_per_step: float  # median; of the steps only every `monitor_every`-th measures κ
    conditions: tuple[LayerCondition, ...]
    environment: dict[str, str]
    test_top5_error: float | None = None  # of more than five classes; results before it was measured have none

    def save(self) -> None:
        """Write `result.json` into the run's folder, which marks the run as finished."""
        values = asdict(self)
        del values["folder"]  # a run may be moved
        write_json(Path(self.folder) / RESULT, values)


def load_result(folder: Path, name: str = RESULT) -> RunResult | None:
    """The result of a finished run, or None if it has not finished; a `RunError` where the file is damaged."""
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
    """The numbers of epochs that a run had finished with before it was made longer."""
    marks = EARLIER_RESULT.split("{}")
    names = [path.name for path in folder.glob(EARLIER_RESULT.format("*"))]
    return sorted(int(name.removeprefix(marks[0]).removesuffix(marks[1])) for name in names)


def newest_earlier_result(folder: Path) -> RunResult | None:
    """The last result that a run had before it was made longer, or None."""
    epochs = earlier_epochs(folder)
    return load_result(folder, EARLIER_RESULT.format(epochs[-1])) if epochs else None


def _floats(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Undo `write_json` in the float fields of a dataclass: the strings `inf` and `nan` are numbers again."""
    numbers = {field.name for field in fields(kind) if field.type == "float"}
    return {name: float(value) if name in numbers else value for name, value in values.items()}


def versions() -> dict[str, str]:
    """What a number was made with: wellcond, PyTorch, Python, the system, and the threads that PyTorch uses."""
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
    """The processor, its cores that this process may use, and the GPU if there is one."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {"cpu": cpu_model(), "cores": str(cores), **gpu}
