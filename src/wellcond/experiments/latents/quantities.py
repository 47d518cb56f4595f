"""What is measured of a generator: how tables call each quantity, and which side of it is better."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from wellcond.experiments.latents.result import LatentsResult


class Quantity(NamedTuple):
    """A quantity of a run.

    Attributes:
        name: in the table of one generator.
        head: of its column where generators are compared.
        value: of a run, nan if it was not measured.
        better: −1 if small is better, 1 if large is; 0 if it is not compared, as it is not of the generator.
        is_ratio: it is compared by its common logarithm.
    """

    name: str
    head: str
    value: Callable[[LatentsResult], float]
    better: int
    is_ratio: bool = False

    def compared(self, run: LatentsResult) -> float:
        """The value, or its common logarithm."""
        return math.log10(self.value(run)) if self.is_ratio else self.value(run)


def _measured(name: str) -> Callable[[LatentsResult], float]:
    return lambda run: math.nan if run.measures is None else getattr(run.measures, name)


QUANTITIES = {
    "kappa_directions": Quantity("κ(U), largest", "log10 κ(U)", lambda run: run.kappa_directions, -1, True),
    "kappa_jacobian": Quantity("κ of the Jacobian", "log10 κ(J)", lambda run: run.kappa_jacobian, -1, True),
    "frechet_distance": Quantity("Fréchet distance", "Fréchet", _measured("frechet_distance"), -1),
    "path_length": Quantity("path length", "path length", _measured("path_length"), -1),
    "mig": Quantity("MIG", "MIG", _measured("mig"), 1),
    "disentanglement": Quantity("disentanglement (DCI)", "D", _measured("disentanglement"), 1),
    "completeness": Quantity("completeness (DCI)", "C", _measured("completeness"), 1),
    "informativeness": Quantity("informativeness (DCI)", "I", _measured("informativeness"), 1),
    "observer": Quantity("factors from real images", "observer", _measured("observer"), 0),
}
"""By the name in `result.json`; those of images need known factors."""
COMPARED = {name: quantity for name, quantity in QUANTITIES.items() if quantity.better}
