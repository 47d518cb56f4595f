"""What of a covariance is rounding in its own precision: the smallest ridge that it can do with, and constant channels.

Forming P = Σ x xᵀ/M and decomposing it each leave errors of about eps·λmax on every eigenvalue. A smaller ε is no
ridge: along directions without variance P + εI is that rounding, and the derivative of its inverse root, of size
ε^{-3/2}, amplifies it until the weights before the layer are not finite. So ε stands for at least eps·tr P. In float32
with ε = 1e-5 that begins where the variances of a group add up to 84, and it changes what belongs to an eigenvalue λ by
eps·tr P/(2λ) of itself: no more than that rounding does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wellcond._shared.checks import readable
from wellcond._shared.torch_internals import is_compiling


def with_ridge(P: Tensor, eps: float, *, relative: bool) -> tuple[Tensor, float]:
    """P (G, d, d) and the ε that make P + εI, where as much is on the diagonal of P already as the given ε lacks.

    A relative ε is in units of the mean variance, of which eps·tr P is d·eps.
    """
    if relative:
        return P, max(eps, torch.finfo(P.dtype).eps * P.shape[-1])
    lacking = lacking_ridge(P, eps)
    if not is_compiling() and readable(P) and not lacking.any():
        return P, eps
    return P + torch.diag_embed(lacking.expand(*P.shape[:-1])), eps


def lacking_ridge(P: Tensor, eps: float) -> Tensor:
    """(G, 1) what ε lacks of eps·tr P; 0 where it is more."""
    minimum = torch.finfo(P.dtype).eps
    return (P.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True) - eps / minimum).clamp_min(0.0) * minimum


def without_constants(P: Tensor, mean: Tensor) -> Tensor:
    """P (G, d, d) with rows and columns of zeros for the channels that are constant up to rounding.

    The mean (G, d, 1) of a constant is off by eps·|mean| or so, which shows as a variance of (eps·mean)². With a
    relative ε there may be nothing larger to outweigh it.
    """
    floor = (torch.finfo(P.dtype).eps * mean.detach()).square()
    constant = P.detach().diagonal(dim1=-2, dim2=-1).unsqueeze(-1).abs() <= floor  # NaN is not, and is refused later
    if not is_compiling() and readable(P) and not constant.any():
        return P
    return torch.where(constant | constant.mT, 0.0, P)


def varying(P: Tensor, mean: Tensor) -> Tensor:
    """(G, d, d) of 1, and of 0 in the rows and columns that :func:`without_constants` clears; nothing is read."""
    rounding = torch.finfo(P.dtype).eps ** 2
    variance = P.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    channels = torch.addcmul(variance, mean, mean, value=-rounding).gt_(0.0)
    return torch.bmm(channels, channels.mT)


def mean_ridge(P: Tensor, eps: float, *, relative: bool, unit: Tensor | None = None) -> float:
    """The absolute ε that :func:`with_ridge` stands for, the mean over the groups; ``P`` is c² P."""
    minimum = torch.finfo(P.dtype).eps
    traces = P.diagonal(dim1=-2, dim2=-1).double().sum(-1)
    if unit is not None:
        traces = traces / unit.flatten().double().square()
    ridges = max(eps / P.shape[-1], minimum) * traces if relative else (minimum * traces).clamp_min(eps)
    return ridges.mean().item()
