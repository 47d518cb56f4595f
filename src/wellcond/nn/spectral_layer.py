"""The SVD meta-layer: features or covariance in, a function of the covariance out (eq. 2–4 of the paper)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from wellcond._shared.checks import require_nonnegative
from wellcond._shared.names import require_known
from wellcond._shared.precision import full_precision, working_dtype
from wellcond._shared.torch_internals import has_values, run_in_python
from wellcond.linalg import (
    Solver,
    covariance,
    covariance_logm,
    covariance_powm,
    expm,
    invsqrtm,
    logm,
    matrix_spectrum,
    powm,
    sqrtm,
)
from wellcond.linalg.solvers import choose_solver

from ._base import Observation, SpectralModule, symbolic_call
from ._centred import centred, mean_of_samples

Takes = Literal["features", "covariance"]
Normalisation = Literal["trace", "frobenius"]
FUNCTIONS = ("sqrt", "invsqrt", "log", "power", "exp")
ROOTS = {"sqrt": sqrtm, "invsqrt": invsqrtm}


class SpectralLayer(SpectralModule):
    """f(P + εI) of the covariance P of features, one matrix per leading index.

    Args:
        function: ``"sqrt"``, ``"invsqrt"``, ``"log"``, ``"power"`` (with ``exponent``), ``"exp"``, or a callable
            on covariances (..., d, d).
        takes: ``"features"`` (..., d, n) or ``"covariance"`` (..., d, d).
        eps: ε ≥ 0, added to the eigenvalues; should be positive for the inverse root, the logarithm and negative
            powers. For features, roots (by eigendecomposition), logarithm and powers take the factor form: it works on
            the smaller side, and the gradient of the square root is bounded at any condition number.
        solver: of the two roots, a name of :data:`wellcond.linalg.SOLVERS` (``"svd:taylor"`` with a variant),
            ``"auto"`` or a solver object.
        exponent: of ``"power"``, any finite number, or a :class:`torch.nn.Parameter` of no dimension that is learned
            with the model (``eps`` must be positive then where the covariance is singular); 1/2 if not given.
        normalisation: divide P by its ``"trace"`` or ``"frobenius"`` norm c first: f(P/c + εI), the same for features
            of any scale. ``None`` for f(P + εI). The root compensated by √c is P^{1/2} again, that is ``None``.

    Shape: (..., d, n) or (..., d, d) to (..., d, d), in the same dtype (half precision is computed in float32).

    Raises:
        ValueError: an unknown function (the nearest right name is in the message); an exponent or a solver for a
            function that takes none; NaN or infinity in the input, or a singular covariance of which the function does
            not exist (naming the layer; checked on the CPU by default).

    Complexity: O(d n min(d, n)) for the covariance and O(d³), or O(n³) in the factor form with n < d.
    Source: Song, Sebe and Wang, ECCV 2022, sect. 3; Ionescu, Vantzos and Sminchisescu, ICCV 2015, for the logarithm.

    Example:
        >>> import torch
        >>> SpectralLayer("sqrt")(torch.randn(2, 16, 49)).shape
        torch.Size([2, 16, 16])
        >>> SpectralLayer("log", eps=1e-3)(torch.randn(2, 16, 49)).shape
        torch.Size([2, 16, 16])
    """

    function: str | Callable[[Tensor], Tensor]
    eps: float
    solver: str | Solver

    def __init__(
        self,
        function: str | Callable[[Tensor], Tensor] = "sqrt",
        takes: Takes = "features",
        eps: float = 0.0,
        solver: str | Solver = "auto",
        *,
        exponent: float | torch.nn.Parameter | None = None,
        normalisation: Normalisation | None = None,
    ) -> None:
        super().__init__()
        if not callable(function):
            require_known(function, FUNCTIONS, "function")
        require_known(takes, get_args(Takes), "takes")
        if normalisation is not None:
            require_known(normalisation, get_args(Normalisation), "normalisation")
        require_nonnegative(eps, "eps")
        if exponent is not None and function != "power":
            raise ValueError(f"exponent={exponent} is for function='power', not {function!r}")
        if exponent is not None:
            start = exponent.detach() if isinstance(exponent, Tensor) else exponent
            known = not isinstance(start, Tensor) or has_values(start)
            if getattr(start, "ndim", 0) > 0 or (known and not math.isfinite(start)):
                raise ValueError(f"exponent must be one finite number, got {start}")
        if isinstance(exponent, Tensor) and exponent.requires_grad and not isinstance(exponent, torch.nn.Parameter):
            raise TypeError("an exponent that is learned must be a torch.nn.Parameter, got a tensor that is none")
        if function not in ROOTS and solver != "auto":
            raise ValueError(f"solver={solver!r} is for {' and '.join(ROOTS)}, not {function!r}")
        choose_solver(solver)  # raises here, and not in the first step, if unknown
        self.function, self.eps, self.solver = function, eps, solver
        self.takes: Takes = takes
        self.normalisation: Normalisation | None = normalisation
        if not isinstance(exponent, torch.nn.Parameter):
            exponent = (0.5 if exponent is None else float(exponent)) if function == "power" else None
        self.exponent = exponent

    def forward(self, x: Tensor) -> Tensor:
        if (node := symbolic_call(self, x)) is not None:
            return node
        if self._breaks_graph():
            return run_in_python(SpectralLayer.forward, self, x)
        solver = self.solver if self.function in ROOTS else None
        with self._recording(solver), full_precision(x):
            work = _normalised(x.to(working_dtype(x.dtype)), self.takes, self.normalisation)
            return self._apply_function(work).to(x.dtype)

    def _is_traceable(self) -> bool:
        return self.function in ROOTS and choose_solver(self.solver).traceable

    def observed_features(self, x: Tensor) -> Observation:
        """Features of the covariance that the function is taken of; of a given covariance, in its eigenbasis."""
        x = _normalised(x.detach(), self.takes, self.normalisation)
        if self.takes == "covariance":
            eigvals, tolerance = matrix_spectrum(x)
            kept = torch.where(eigvals > tolerance.unsqueeze(-1), eigvals, 0.0)
            # d pairs of samples of opposite sign, so that the mean is 0.
            A = torch.diag_embed((x.shape[-1] * kept).sqrt())
            x = torch.cat([A, -A], -1)
        return Observation(x, self.eps)

    def _apply_function(self, x: Tensor) -> Tensor:
        if self.takes == "features":
            exponent = {"sqrt": 0.5, "invsqrt": -0.5}.get(str(self.function), self.exponent)
            if exponent is not None:
                return covariance_powm(x, exponent, eps=self.eps, solver=self.solver)
            if self.function == "log":
                return covariance_logm(x, eps=self.eps)
            x = covariance(x)
        if root := ROOTS.get(str(self.function)):
            return root(x, eps=self.eps, solver=self.solver)
        if self.function == "log":
            return logm(x, eps=self.eps)
        if self.exponent is not None:
            return powm(x, self.exponent, eps=self.eps)
        function = self.function if callable(self.function) else expm
        return function(x + self.eps * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device))

    def extra_repr(self) -> str:
        name = self.function if isinstance(self.function, str) else getattr(self.function, "__name__", "callable")
        learned = isinstance(self.exponent, torch.nn.Parameter)
        power = "" if self.exponent is None else f", exponent={'Parameter' if learned else self.exponent}"
        size = "" if self.normalisation is None else f", normalisation={self.normalisation!r}"
        return f"{name!r}, takes={self.takes!r}, eps={self.eps}, solver={self.solver!r}{power}{size}"


def _normalised(x: Tensor, takes: Takes, kind: Normalisation | None) -> Tensor:
    """Features (..., d, n) of zero mean and covariance P/c, or P/c of P (..., d, d); what is zero stays so.

    iSQRT-COV (Li et al., CVPR 2018) divides by c = tr P or ‖P‖_F for its iteration and multiplies the root by √c again,
    which changes nothing. Without the second step (P/tr P)^{1/2} = P^{1/2}/‖P^{1/2}‖_F is the Frobenius normalisation
    of MPN-COV (Li et al., ICCV 2017).
    """
    if kind is None:
        return x
    if takes == "features":
        x = centred(x, mean_of_samples(x))
    # Neither squares nor fourth powers then leave the range of the dtype. What follows divides by the size, so this
    # scale has no derivative.
    x = _divided(x, x.detach().abs().amax((-2, -1), keepdim=True))
    if takes == "covariance":
        trace = x.diagonal(dim1=-2, dim2=-1).real.sum(-1)[..., None, None]
        return _divided(x, trace if kind == "trace" else torch.linalg.matrix_norm(x, keepdim=True))
    d, n = x.shape[-2:]
    if kind == "trace":
        return _divided(x, x.abs().square().sum((-2, -1), keepdim=True) / n, root=True)
    return _divided(x, torch.linalg.matrix_norm(x.mH @ x if n < d else x @ x.mH, keepdim=True) / n, root=True)


def _divided(x: Tensor, size: Tensor, *, root: bool = False) -> Tensor:
    """x over the size, or its root; over 1 where it is zero."""
    size = torch.where(size > 0, size, 1.0)
    return x / (size.sqrt() if root else size)
