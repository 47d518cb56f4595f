"""Rounding in a covariance: the minimum ridge that its precision requires, and constant channels.

Forming P = Σ x xᵀ/M and decomposing it both perturb every eigenvalue by about eps·λmax. A smaller ε does not
regularise: along directions without variance P + εI is rounding, and the derivative of its inverse root, of size
ε^{-3/2}, amplifies it until the weights before the layer overflow. So the ridge is at least eps·tr P. In float32 with ε
= 1e-5 this takes effect once the variances of a group add up to 84. It changes λ^{-1/2} by a relative eps·tr P/(2λ), no
more than the rounding does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wellcond._shared.checks import readable
from wellcond._shared.torch_internals import is_compiling


def with_ridge(P: Tensor, eps: float, *, relative: bool) -> tuple[Tensor, float]:
    """P (G, d, d), plus on its diagonal the part of the ridge that ``eps`` lacks, and the ε that is still to be added.

    A relative ε is in units of the mean variance; in these units the minimum eps·tr P is d·eps.
    """
    if relative:
        return P, max(eps, torch.finfo(P.dtype).eps * P.shape[-1])
    lacking = lacking_ridge(P, eps)
    if not is_compiling() and readable(P) and not lacking.any():
        return P, eps
    return P + torch.diag_embed(lacking.expand(*P.shape[:-1])), eps


def lacking_ridge(P: Tensor, eps: float) -> Tensor:
    """max(eps·tr P − ε, 0), as (G, 1)."""
    minimum = torch.finfo(P.dtype).eps
    return (P.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True) - eps / minimum).clamp_min(0.0) * minimum


def without_constants(P: Tensor, mean: Tensor) -> Tensor:
    """P (G, d, d) with zero rows and columns for the channels that are constant up to rounding.

    The computed mean (G, d, 1) of a constant has an error of about eps·|mean|, which appears as a variance of
    (eps·mean)². A relative ε may be smaller than that.
    """
    floor = (torch.finfo(P.dtype).eps * mean.detach()).square()
    constant = P.detach().diagonal(dim1=-2, dim2=-1).unsqueeze(-1).abs() <= floor  # False for NaN, which raises later
    if not is_compiling() and readable(P) and not constant.any():
        return P
    return torch.where(constant | constant.mT, 0.0, P)


def varying(P: Tensor, mean: Tensor) -> Tensor:
    """The mask (G, d, d) that is 0 in the rows and columns that :func:`without_constants` clears; reads no value."""
    rounding = torch.finfo(P.dtype).eps ** 2
    variance = P.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    channels = torch.addcmul(variance, mean, mean, value=-rounding).gt_(0.0)
    return torch.bmm(channels, channels.mT)


def mean_ridge(P: Tensor, eps: float, *, relative: bool, unit: Tensor | None = None) -> float:
    """The absolute ridge of :func:`with_ridge`, averaged over the groups; ``P`` is ``unit``² times the covariance."""
    minimum = torch.finfo(P.dtype).eps
    traces = P.diagonal(dim1=-2, dim2=-1).double().sum(-1)
    if unit is not None:
        traces = traces / unit.flatten().double().square()
    ridges = max(eps / P.shape[-1], minimum) * traces if relative else (minimum * traces).clamp_min(eps)
    return ridges.mean().item()
