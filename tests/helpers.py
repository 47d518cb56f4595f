"""Makers of matrices whose answer is known beforehand, and references that share no code with the library.

Hermitian matrices with a given spectrum, features whose covariance has a given spectrum, matrix functions and their
derivatives in mpmath at 50 digits, and the relative error in the Frobenius norm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mpmath
import torch
from torch import Tensor

from wellcond.nn import DecorrelatedBatchNorm1d, DecorrelatedBatchNorm2d, DecorrelatedBatchNorm3d

DIGITS = 50
# Decorrelated batch norm by the number of dimensions of its input.
NORMS = {
    2: DecorrelatedBatchNorm1d,
    3: DecorrelatedBatchNorm1d,
    4: DecorrelatedBatchNorm2d,
    5: DecorrelatedBatchNorm3d,
}


def eps_of(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def unitary(rows: int, columns: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random orthonormal columns, made in double precision."""
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.linalg.qr(torch.randn(rows, columns, dtype=wide)).Q.to(dtype)


def hermitian_part(A: Tensor) -> Tensor:
    return (A + A.mH) / 2


def with_spectrum(eigvals: Sequence[float], dtype: torch.dtype = torch.float64, batch: tuple[int, ...] = ()) -> Tensor:
    """Exactly Hermitian matrices (*batch, d, d) of these eigenvalues in random bases, rounded once to ``dtype``."""
    wide = torch.complex128 if dtype.is_complex else torch.float64
    values = torch.tensor(eigvals, dtype=torch.float64)
    count = torch.Size(batch).numel()
    flat = []
    for _ in range(count):
        U = unitary(len(values), len(values), wide)
        flat.append(hermitian_part((U * values) @ U.mH))
    P = torch.stack(flat) if flat else torch.zeros(0, len(values), len(values), dtype=wide)
    return hermitian_part(P.reshape(*batch, len(values), len(values)).to(dtype))


def with_singular_values(m: int, n: int, sigma: Sequence[float], dtype: torch.dtype = torch.float64) -> Tensor:
    """A matrix (m, n) of these min(m, n) singular values, or of the rank that they suffice for."""
    values, r = torch.tensor(sigma, dtype=dtype), len(sigma)
    return (unitary(m, r, dtype) * values) @ unitary(n, r, dtype).mH


def geometric(d: int, kappa: float) -> list[float]:
    """d eigenvalues falling evenly from 1 to 1/κ on a logarithmic axis."""
    return [kappa ** (-i / max(d - 1, 1)) for i in range(d)]


def features_with(eigvals: Sequence[float], samples: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Features (d, n) of zero mean whose covariance (divisor n) has these eigenvalues; at most n − 1 may be nonzero."""
    wide = torch.complex128 if dtype.is_complex else torch.float64
    values = torch.tensor(eigvals, dtype=torch.float64)
    rank = int((values != 0).sum())
    assert rank < samples, "centred features of n samples have rank n − 1 at most"
    # Orthonormal rows orthogonal to the vector of ones: drop the first column of a basis that starts with it.
    start = torch.cat([torch.ones(samples, 1, dtype=wide), torch.randn(samples, rank, dtype=wide)], 1)
    rows = torch.linalg.qr(start).Q[:, 1:].mH
    U = unitary(len(values), len(values), wide)[:, values != 0]
    return ((U * (values[values != 0] * samples).sqrt()) @ rows).to(dtype)


def images_with(eigvals: Sequence[float], shape: Sequence[int], dtype: torch.dtype = torch.float64) -> Tensor:
    """A batch (N, C, *spatial) of zero mean whose C channels have a covariance of these eigenvalues."""
    X = features_with(eigvals, torch.Size(shape).numel() // shape[1], dtype)
    return X.view(shape[1], shape[0], *shape[2:]).transpose(0, 1).contiguous()


def channels_first(y: Tensor) -> Tensor:
    """(C, N·L) of (N, C, *spatial)."""
    return y.transpose(0, 1).flatten(1)


def as_tuple(out: Any) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def inverse_root_by_iteration(P: Tensor, steps: int = 40) -> Tensor:
    """P^(-1/2) by Denman and Beavers (1976): neither it nor its derivative divides by differences of eigenvalues."""
    size = P.diagonal().sum().detach()
    Y, Z = P / size, torch.eye(len(P), dtype=P.dtype)
    for _ in range(steps):
        Y, Z = (Y + torch.linalg.inv(Z)) / 2, (Z + torch.linalg.inv(Y)) / 2
    return Z / size.sqrt()


def relative_error(got: Tensor, truth: Tensor) -> float:
    """‖got − truth‖/‖truth‖ in the Frobenius norm over everything, in double precision; inf for NaN."""
    wide = torch.complex128 if truth.is_complex() or got.is_complex() else torch.float64
    difference = torch.linalg.vector_norm(got.detach().to(wide) - truth.detach().to(wide))
    error = (difference / torch.linalg.vector_norm(truth.to(wide)).clamp_min(torch.finfo(torch.float64).tiny)).item()
    return error if error == error else float("inf")


def weighted_sum(out: Any, phase: float = 1.0) -> Tensor:
    """A real scalar of any (tuple of) outputs, every entry with its own weight, so that each gradient counts.

    The weights are sines of unequal steps and not random numbers, which ``vmap`` would not draw.
    """
    total = torch.zeros((), dtype=torch.float64)
    for o in as_tuple(out):
        steps = torch.arange(o.numel(), dtype=torch.float64).reshape(o.shape)
        weights = torch.sin(phase + 1.7 * steps)
        total = total + (weights * o.real).sum()
        if o.is_complex():
            # Under vmap the imaginary part of a lazy conjugate has no batching rule in torch.
            total = total + (torch.cos(phase + 2.3 * steps) * o.resolve_conj().imag).sum()
    return total


# ---------------------------------------------------------------------------------------------- mpmath, 50 digits


def _to_mp(A: Tensor) -> Any:
    return mpmath.matrix([[mpmath.mpmathify(x) for x in row] for row in A.tolist()])


def _from_mp(M: Any, like: Tensor) -> Tensor:
    wide = torch.complex128 if like.is_complex() else torch.float64
    convert = complex if like.is_complex() else (lambda z: float(mpmath.re(z)))
    return torch.tensor([[convert(M[i, j]) for j in range(M.cols)] for i in range(M.rows)], dtype=wide)


def mp_eigh(P: Tensor) -> tuple[list[Any], Any]:
    """Eigenvalues (ascending) and eigenvectors of one Hermitian matrix at 50 digits."""
    with mpmath.workdps(DIGITS):
        values, U = mpmath.eighe(_to_mp(P))
        return list(values), U


def mp_function(P: Tensor, f: Callable[[Any], Any]) -> Tensor:
    """f(P) at 50 digits, rounded once to double precision; ``f`` takes and gives mpmath numbers."""
    with mpmath.workdps(DIGITS):
        values, U = mp_eigh(P)
        return _from_mp(U * mpmath.diag([f(x) for x in values]) * U.H, P)


def mp_derivative(P: Tensor, G: Tensor, f: Callable[[Any], Any]) -> Tensor:
    """The Fréchet derivative of f at P along Hermitian G at 50 digits, by the plain quotient (f(a) − f(b))/(a − b).

    The quotient loses digits when eigenvalues meet, of which there are fifty; the spectrum has to be simple.
    """
    with mpmath.workdps(DIGITS):
        values, U = mp_eigh(P)
        inside = U.H * _to_mp(hermitian_part(G)) * U
        for i, a in enumerate(values):
            for j, b in enumerate(values):
                inside[i, j] *= mpmath.diff(f, a) if i == j else (f(a) - f(b)) / (a - b)
        return _from_mp(U * inside * U.H, P)
