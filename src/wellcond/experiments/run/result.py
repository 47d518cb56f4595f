"""What one run found: `result.json`, with the conditioning of its layers and the machine.

Errors and accuracies are fractions in the files and percent in the printed tables.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from wellcond.experiments.errors import RunError
from wellcond.experiments.files import write_json
from wellcond.experiments.run.config import RunConfig

RESULT, CONDITION, METRICS = "result.json", "condition.csv", "metrics.csv"


@dataclass(frozen=True)
class LayerCondition:
    """The conditioning of one layer's input covariance over one run; medians are over the recorded steps.

    Attributes:
        layer: its name in the model.
        kappa: median κ(P), without ε.
        kappa_eps: median κ(P + εI), what the solver sees.
        numerical_rank, dim: median numerical rank of P and its size.
        effective_rank: median (tr P)² / tr P².
        failures: decompositions that failed at first, over the whole run.
        records: how many measurements the medians are over.
    """

    layer: str
    kappa: float
    kappa_eps: float
    numerical_rank: float
    dim: int
    effective_rank: float
    failures: int
    records: int


@dataclass(frozen=True)
class RunResult:
    """One finished run.

    Attributes:
        config: what was run.
        folder: where.
        test_error, test_accuracy, test_loss: on the test images, seen once, with the last epoch's weights.
        best_val_accuracy, best_epoch: of `best.ckpt`, on the validation images; epochs count from 0.
        steps: optimizer steps in all.
        seconds: training time, summed over the sessions of a resumed run.
        seconds_per_step: median over steps (of which only every `monitor_every`-th measures κ).
        conditions: one entry for each observed layer.
        environment: versions and machine.
    """

    config: RunConfig
    folder: str
    test_error: float
    test_accuracy: float
    test_loss: float
    best_val_accuracy: float
    best_epoch: int
    steps: int
    seconds: float
    seconds_per_step: float
    conditions: tuple[LayerCondition, ...]
    environment: dict[str, str]

    def save(self) -> None:
        """Write `result.json` into the run's folder, which marks the run as finished."""
        values = asdict(self)
        del values["folder"]  # a run may be moved
        write_json(Path(self.folder) / RESULT, values)


def load_result(folder: Path) -> RunResult | None:
    """The result of a finished run, or None if it has not finished.

    Raises:
        RunError: `result.json` is there and is not a run's.
    """
    path = folder / RESULT
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text())
        values["config"] = RunConfig.from_dict(values["config"])
        values["conditions"] = tuple(LayerCondition(**_floats(LayerCondition, c)) for c in values["conditions"])
        return RunResult(folder=str(folder), **_floats(RunResult, values))
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"'{path}' is not the result of a run ({error}); delete it and use --resume") from error


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
