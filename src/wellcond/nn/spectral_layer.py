"""The SVD meta-layer: features or covariance in, a function of the covariance out (eq. 2–4 of the paper)."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from wellcond.linalg import Solver, covariance, covariance_sqrtm, invsqrtm, recording, sqrtm

from ._base import Observation, SpectralModule

MATRIX_FUNCTIONS: dict[str, Callable[..., Tensor]] = {"sqrt": sqrtm, "invsqrt": invsqrtm}


class SpectralLayer(SpectralModule):
    """f(P) of the covariance P of features, one matrix per leading index.

    Args:
        function: ``"sqrt"`` or ``"invsqrt"``.
        takes: ``"features"`` (..., d, n) or ``"covariance"`` (..., d, d).
        eps: ε ≥ 0, added to the eigenvalues; the inverse root wants it positive. The square root of features with
            ε = 0 takes the factor form, whose gradient is bounded at any condition number.
        solver: as in :func:`wellcond.linalg.sqrtm`.

    Shape: (..., d, n) or (..., d, d) to (..., d, d), in the same dtype.

    Raises:
        ValueError: an unknown function (the nearest right name is in the message); what the function raises, naming
            the layer.

    Source: Song, Sebe and Wang, ECCV 2022, sect. 3.

    Example:
        >>> import torch
        >>> SpectralLayer("sqrt")(torch.randn(2, 16, 49)).shape
        torch.Size([2, 16, 16])
    """

    def __init__(
        self,
        function: str = "sqrt",
        takes: Literal["features", "covariance"] = "features",
        eps: float = 0.0,
        solver: str | Solver = "auto",
    ) -> None:
        super().__init__()
        if function not in MATRIX_FUNCTIONS:
            near = difflib.get_close_matches(function, MATRIX_FUNCTIONS, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise ValueError(f"unknown function '{function}'{hint} (known: {', '.join(MATRIX_FUNCTIONS)})")
        if takes not in ("features", "covariance"):
            raise ValueError(f"takes must be 'features' or 'covariance', got {takes!r}")
        self.function, self.takes, self.eps, self.solver = function, takes, eps, solver

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self._observers and self.takes == "features":
            self._observe(Observation(x.detach, self.eps))
        with recording(self.solver_events, self.describe):
            if self.takes == "features" and self.function == "sqrt" and self.eps == 0.0:
                return covariance_sqrtm(x, solver=self.solver)
            with torch.autocast(x.device.type, enabled=False):
                P = covariance(x) if self.takes == "features" else x
                return MATRIX_FUNCTIONS[self.function](P, eps=self.eps, solver=self.solver)

    def extra_repr(self) -> str:
        return f"{self.function!r}, takes={self.takes!r}, eps={self.eps}, solver={self.solver!r}"
