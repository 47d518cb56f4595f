"""Reference implementations without this library, and the ground truth for all errors.

With ``torch.linalg.eigh`` and ``torch.linalg.svd`` autograd divides by differences of eigenvalues. The iteration is
that of iSQRT-COV (Li et al., CVPR 2018), coupled Newton–Schulz on P/tr P, with autograd through every step.

The ground truth is computed in float64 with the Daleckii–Krein derivative, implemented here independently of
``wellcond.linalg``; :func:`ground_truth_errors` checks it on one small matrix against mpmath with 50 digits and against
``scipy.linalg.sqrtm``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from wellcond.bench.cases import LAYER_EPS, Case, make_input

Root = Callable[[Tensor], Tensor]

ISQRT_STEPS = 5


def root_by_eigh(P: Tensor, power: float) -> Tensor:
    """P^power through the eigendecomposition."""
    eigvals, U = torch.linalg.eigh(P)
    # A covariance of fewer samples than channels has eigenvalues around −eps.
    return (U * eigvals.clamp_min(0.0).pow(power).unsqueeze(-2)) @ U.mT


def root_by_svd(P: Tensor, power: float) -> Tensor:
    """P^power through the singular value decomposition, as in published SVD layers."""
    U, sigma, _ = torch.linalg.svd(P)
    return (U * sigma.pow(power).unsqueeze(-2)) @ U.mT


def root_by_isqrt(P: Tensor, power: float, steps: int = ISQRT_STEPS) -> Tensor:
    """P^{±1/2} by coupled Newton–Schulz, differentiated through all steps."""
    trace = P.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    eye = torch.eye(P.shape[-1], dtype=P.dtype, device=P.device).expand_as(P)
    Y, Z = P / trace, eye
    for _ in range(steps):
        M = (3 * eye - Z @ Y) / 2
        Y, Z = Y @ M, M @ Z
    return Y * trace.sqrt() if power > 0 else Z / trace.sqrt()


def covariance_of(X: Tensor) -> Tensor:
    """The covariance of (..., d, n) features."""
    centred = X - X.mean(-1, keepdim=True)
    return centred @ centred.mT / X.shape[-1]


def polar_by_svd(G: Tensor) -> Tensor:
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    return U @ Vh


class CovariancePool(nn.Module):
    """Global covariance pooling with a given root: the upper triangle of the root of each image's covariance."""

    def __init__(self, root: Root) -> None:
        super().__init__()
        self.root = root

    def forward(self, x: Tensor) -> Tensor:
        Q = self.root(covariance_of(x.flatten(2)))
        rows, columns = torch.triu_indices(*Q.shape[-2:], device=Q.device)
        return Q[:, rows, columns]


class WhiteningBatchNorm2d(nn.BatchNorm2d):
    """Plain decorrelated batch norm with a given inverse root, for timing in training mode only.

    The output is contiguous in NCHW, as in the published implementation.
    """

    running_cov: Tensor

    def __init__(self, num_features: int, inverse_root: Root, eps: float) -> None:
        super().__init__(num_features, eps)
        self.inverse_root = inverse_root
        self.register_buffer("running_cov", torch.eye(num_features))

    def forward(self, input: Tensor) -> Tensor:
        columns = input.transpose(0, 1).flatten(1)
        mean = columns.mean(1, keepdim=True)
        centred = columns - mean
        P = centred @ centred.mT / columns.shape[1]
        eye = torch.eye(P.shape[0], dtype=P.dtype, device=P.device)
        white = self.inverse_root(P + self.eps * eye) @ centred
        assert self.running_mean is not None  # for the type checker
        with torch.no_grad():
            self.running_mean.lerp_(mean.flatten(), 0.1)
            self.running_cov.lerp_(P, 0.1)
        y = self.weight[:, None] * white + self.bias[:, None]
        return y.view(input.shape[1], input.shape[0], *input.shape[2:]).transpose(0, 1).contiguous()


class ExactRoot(torch.autograd.Function):
    """P^{1/2} or P^{-1/2} in float64; eigenvalues at rounding level count as zero, with zero derivative."""

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


def with_root(case: Case, root: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    """The function of a task using ``root(P, power)``; a module if it has parameters."""
    sqrt, invsqrt = partial(root, power=0.5), partial(root, power=-0.5)
    if case.task == "pooling_layer":
        return CovariancePool(sqrt)
    if case.task == "whitening_layer":
        return WhiteningBatchNorm2d(case.channels, invsqrt, LAYER_EPS)
    return {
        "sqrt": sqrt,
        "invsqrt": invsqrt,
        "polar": lambda G: G @ invsqrt(G.mT @ G),
        "covariance_sqrt": lambda X: sqrt(covariance_of(X.flatten(2))),
    }[case.task]


def exact_function(case: Case) -> Callable[[Tensor], Tensor]:
    """The ground truth of a task; takes and returns float64."""
    f = with_root(case, exact_root)
    return f.double() if isinstance(f, nn.Module) else f


def value_and_gradient(f: Callable[[Tensor], Tensor], X: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """f(X), and the gradient of ⟨f(X), direction⟩ with respect to X."""
    X = X.detach().requires_grad_()
    out = f(X)
    (grad,) = torch.autograd.grad(out, X, direction)
    return out.detach(), grad


def symmetric_part(gradient: Tensor, case: Case) -> Tensor:
    """The part of the gradient that is compared: for symmetric inputs only the symmetric part is determined."""
    return (gradient + gradient.mT) / 2 if case.task in ("sqrt", "invsqrt") else gradient


def relative_error(got: Tensor, truth: Tensor) -> float:
    """The largest ‖got − truth‖/‖truth‖ over the first dimension, in float64; inf for NaN."""
    got, truth = got.detach().to("cpu", torch.float64).flatten(1), truth.to("cpu").flatten(1)
    size = torch.linalg.vector_norm(truth, dim=1).clamp_min(torch.finfo(torch.float64).tiny)
    error = (torch.linalg.vector_norm(got - truth, dim=1) / size).max().item()
    return error if error == error else float("inf")


def ground_truth_errors(d: int = 8) -> dict[str, float | None]:
    """Relative errors of the ground truth and of SciPy's root against mpmath with 50 digits, at d × d and κ = 1e4.

    None if the package is not installed.
    """
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
