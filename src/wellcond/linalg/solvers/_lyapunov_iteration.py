"""The Lyapunov equation QX + XQ = G from matrix products only: odd polynomials iterated to sign [[Q, G], [0, −Q]].

Roberts 1980 for the sign function; Song, Sebe and Wang, ICLR 2022, with the Newton–Schulz polynomial.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wellcond._shared.autograd import differentiated_again
from wellcond._shared.products import flat, positive_or_one
from wellcond._shared.torch_internals import along_many_directions, is_compiling

from ._minimax_polynomials import Coefficients, completed_square
from ._residuals import frobenius_norm


def lyapunov_iteration(Q: Tensor, G: Tensor, polynomials: Sequence[Coefficients], norm: Tensor | None = None) -> Tensor:
    """X with QX + XQ ≈ G for Hermitian Q ≥ 0 and G, after division by ``norm`` (..., 1, 1), by default ‖Q‖_F.

    A step is six products (four operations) with a polynomial of degree 3, nine (six operations) with one of degree 5.
    Parts of G between eigenvalues that the polynomials do not take to 1 are damped.
    """
    shape, d = G.shape, Q.shape[-1]
    in_place = not (differentiated_again() or is_compiling() or along_many_directions(Q, G))
    norm = positive_or_one(frobenius_norm(Q)) if norm is None else norm
    # Q and C of B = [[Q, C], [0, −Q]] are stored one above the other. B² = [[N, −D], [0, N]] with N = Q² and
    # D = CQ − QC, and the first row of B (a + b B² + c B⁴) is Q H and C H − Q T, with H = a + b N + c N² and
    # T = b D + c (N D + D N). We do not use that C is Hermitian: its rounding errors would grow.
    if in_place:
        column = Q.new_empty(flat(Q).shape[0], 2 * d, d)
        for X, half in (Q, column[:, :d]), (G, column[:, d:]):
            torch.div(flat(X), flat(norm), out=half)
    else:
        column = torch.cat([flat(Q / norm), flat(G / norm)], -2)
    eye = torch.eye(2 * d, d, dtype=Q.dtype, device=Q.device)
    for step, polynomial in enumerate(polynomials):
        Q, C = column[:, :d], column[:, d:]
        if polynomial[2] == 0.0:
            a, b, _ = polynomial
            even = _plus_below(torch.baddbmm(eye, column, Q, beta=a, alpha=b), Q, C, -b, in_place)
        else:
            shift, constant, c = completed_square(polynomial)
            even = _plus_below(torch.baddbmm(eye, column, Q, beta=shift), Q, C, -1.0, in_place)
            S, D = even[:, :d], even[:, d:]  # S = N + shift
            even = _plus_below(torch.baddbmm(eye, even, S, beta=constant, alpha=c), S, D, c, in_place)
        H, T = even[:, :d], even[:, d:]
        if step == len(polynomials) - 1:
            X = torch.baddbmm(torch.bmm(C, H), Q, T, beta=0.25, alpha=-0.25)
            return (X + X.mH).reshape(shape)
        column = _plus_below(torch.bmm(column, H), Q, T, -1.0, in_place)
    raise AssertionError("no polynomials")


def _plus_below(column: Tensor, A: Tensor, B: Tensor, alpha: float, in_place: bool) -> Tensor:
    """``column`` with α A B added to its lower half."""
    d = column.shape[-1]
    if in_place:
        column[:, d:].baddbmm_(A, B, alpha=alpha)
        return column
    return torch.cat([column[:, :d], torch.baddbmm(column[:, d:], A, B, alpha=alpha)], -2)
