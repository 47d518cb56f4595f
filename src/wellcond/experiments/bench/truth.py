"""The truth that errors are measured against: double precision with derivatives by Daleckii and Krein's quotients.

Written out here once more, apart from ``wellcond.linalg``; on one small matrix it is held against 50 digits of mpmath
and against ``scipy.linalg.sqrtm`` (:func:`truth_of_the_truth`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from wellcond.experiments.bench.cases import LAYER_EPS, Case
from wellcond.experiments.bench.references import (
    CovariancePool,
    WhiteningBatchNorm2d,
    covariance_of,
    polar_by_root,
)


class ExactRoot(torch.autograd.Function):
    """P^{1/2} or P^{-1/2} in double precision; what is zero up to rounding stays zero and has no derivative."""

    @staticmethod
    def forward(ctx: Any, P: Tensor, power: float) -> Tensor:
        eigvals, U = torch.linalg.eigh((P + P.mT) / 2)
        cut = 10 * P.shape[-1] * torch.finfo(torch.float64).eps * eigvals.amax(-1, keepdim=True)
        s = torch.where(eigvals > cut, eigvals, 0.0).sqrt()
        values = s if power > 0 else torch.where(s > 0, 1 / s, 0.0)
        ctx.power = power
        ctx.save_for_backward(s, U)
        return (U * values.unsqueeze(-2)) @ U.mT

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        s, U = ctx.saved_tensors
        row, column = s.unsqueeze(-1), s.unsqueeze(-2)
        divisor = row + column if ctx.power > 0 else -(row + column) * row * column
        inside = U.mT @ ((grad + grad.mT) / 2) @ U
        return U @ torch.where(divisor != 0, inside / divisor, 0.0) @ U.mT, None


def exact_root(P: Tensor, power: float) -> Tensor:
    """:class:`ExactRoot` as a function."""
    return ExactRoot.apply(P, power)  # pyright: ignore[reportReturnType]


def exact_function(case: Case) -> Callable[[Tensor], Tensor]:
    """The function of a task with the exact root in it; takes and gives double precision."""
    sqrt, invsqrt = partial(exact_root, power=0.5), partial(exact_root, power=-0.5)
    if case.task == "whitening_layer":
        return WhiteningBatchNorm2d(case.channels, invsqrt, LAYER_EPS).double()
    return {
        "sqrt": sqrt,
        "invsqrt": invsqrt,
        "polar": partial(polar_by_root, root=invsqrt),
        "covariance_sqrt": lambda X: sqrt(covariance_of(X.flatten(2))),
        "pooling_layer": CovariancePool(sqrt),
    }[case.task]


def value_and_gradient(f: Callable[[Tensor], Tensor], X: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """f(X), and the gradient in X of its inner product with a direction."""
    X = X.detach().requires_grad_()
    out = f(X)
    (grad,) = torch.autograd.grad(out, X, direction)
    return out.detach(), grad


def symmetric_part(gradient: Tensor, case: Case) -> Tensor:
    """The gradient as it counts: of a symmetric matrix only the symmetric part does, and codes differ in the rest."""
    return (gradient + gradient.mT) / 2 if case.task in ("sqrt", "invsqrt") else gradient


def relative_error(got: Tensor, truth: Tensor) -> float:
    """The largest ‖got − truth‖/‖truth‖ over the first dimension, in double precision; inf for NaN."""
    got, truth = got.detach().to("cpu", torch.float64).flatten(1), truth.to("cpu").flatten(1)
    size = torch.linalg.vector_norm(truth, dim=1).clamp_min(torch.finfo(torch.float64).tiny)
    error = (torch.linalg.vector_norm(got - truth, dim=1) / size).max().item()
    return error if error == error else float("inf")


def truth_of_the_truth(d: int = 8) -> dict[str, float | None]:
    """Relative errors, against mpmath at 50 digits, of the truth and of scipy's root at d × d and κ = 1e4.

    None where the package is not installed.
    """
    from wellcond.experiments.bench.cases import make_input

    P = make_input(Case("sqrt", (1, d, d)), torch.float64, torch.device("cpu"))
    found: dict[str, float | None] = {"float64": None, "scipy.linalg.sqrtm": None}
    try:
        import mpmath
    except ImportError:
        return found
    with mpmath.workdps(50):
        eigvals, U = mpmath.eighe(mpmath.matrix(P[0].tolist()))
        root = U * mpmath.diag([mpmath.sqrt(value) for value in eigvals]) * U.H
        entries = [[[float(mpmath.re(root[i, j])) for j in range(d)] for i in range(d)]]
    truth = torch.tensor(entries, dtype=torch.float64)
    found["float64"] = relative_error(exact_root(P, 0.5), truth)
    try:
        from scipy.linalg import sqrtm
    except ImportError:
        return found
    found["scipy.linalg.sqrtm"] = relative_error(torch.as_tensor(sqrtm(P[0].numpy())).real.unsqueeze(0), truth)
    return found
