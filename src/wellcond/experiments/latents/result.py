"""What a finished generator leaves: `result.json`, with its condition numbers and measures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from wellcond.experiments.errors import RunError
from wellcond.experiments.files import write_json
from wellcond.experiments.latents.config import LatentsConfig
from wellcond.experiments.run.result import RESULT


@dataclass(frozen=True)
class Measures:
    """How good and how disentangled the images of a generator are, by an observer that knows the factors.

    The first two are better small; the others, of at most 1, large.
    """

    frechet_distance: float  # to the test images, on the observer's features
    path_length: float  # mean square speed of the features along a path between two latents
    mig: float  # mutual information gap, mean over the factors
    disentanglement: float  # DCI
    completeness: float
    informativeness: float  # R² and accuracy of the factors from the latents, mean
    observer: float  # the same of the factors from real images: what could be reached


@dataclass(frozen=True)
class LatentsResult:
    """One finished run."""

    config: LatentsConfig
    folder: str
    steps: int
    seconds: float  # training time, summed over resumed sessions
    seconds_per_step: float
    kappa_directions: float  # κ(U) of the averaged weights, the largest over the layers, at the end
    kappa_jacobian: float  # κ(∂G/∂z) of the same, median over latents, at the end
    shortened: float | None  # share of the steps that olr shortened, mean over the layers
    measures: Measures | None  # None without known factors
    environment: dict[str, str]

    def save(self) -> None:
        """Write `result.json`, which marks the run as finished."""
        values = asdict(self)
        del values["folder"]  # the folder may be moved
        write_json(Path(self.folder) / RESULT, values)


def load_latents_result(folder: Path) -> LatentsResult | None:
    """The result of a finished run, None if unfinished; a `RunError` if the file is damaged."""
    path = folder / RESULT
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text())
        config = LatentsConfig.from_dict(values.pop("config"))
        measures = values.pop("measures")
        measures = Measures(**{name: float(value) for name, value in measures.items()}) if measures else None
        return LatentsResult(config, str(folder), measures=measures, **_floats(values))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"'{path}' is not the result of a generator ({error}); delete it and use --resume") from error


def _floats(values: Mapping[str, Any]) -> dict[str, Any]:
    """With the strings `inf` and `nan` of strict JSON as numbers again."""
    numbers = {field.name for field in fields(LatentsResult) if field.type == "float"}
    return {name: float(value) if name in numbers else value for name, value in values.items()}
