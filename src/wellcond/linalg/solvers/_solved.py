"""Roots by any solver as an autograd function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wellcond._shared.autograd import BatchedFunction
from wellcond._shared.checks import checks_values, hermitian, hermitian_part
from wellcond._shared.precision import full_precision

from ._residuals import warn_if_far
from ._solver import Done, Root, Solver, Tensors


class Solved(BatchedFunction):
    """Roots of a matrix by any solver. Saves the roots, the residuals, and P if the solver asks for it."""

    @staticmethod
    def forward(P: Tensor, solver: Solver, roots: tuple[Root, ...], eps: float) -> Tensors:
        P = hermitian(P)
        outputs, residuals = solver.forward(P, roots, eps)
        if solver.tolerance is not None and not solver.has_warned and checks_values(P) and P.numel():
            warn_if_far(solver, P, outputs, roots, eps)
        return (*outputs, *residuals)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        P, ctx.solver, ctx.roots, ctx.eps = inputs
        ctx.mark_non_differentiable(*output[len(ctx.roots) :])
        ctx.set_materialize_grads(False)
        saved = (P if ctx.solver.keeps_input else None, *output)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        done = _done(ctx)
        grads = grads[: len(done.roots)]
        if all(grad is None for grad in grads):
            return None, None, None, None
        with full_precision(done.outputs[0]):
            return ctx.solver.backward(done, grads), None, None, None

    @staticmethod
    def jvp(ctx: Any, dP: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        done = _done(ctx)
        with full_precision(dP):
            tangents = ctx.solver.jvp(done, hermitian_part(dP))
        return (*tangents, *(None for _ in done.residuals))


class Traced(torch.autograd.Function):
    """:class:`Solved` without jvp and vmap rule, which the compiler cannot trace; reads no values."""

    @staticmethod
    def forward(P: Tensor, solver: Solver, roots: tuple[Root, ...], eps: float) -> Tensors:
        outputs, residuals = solver.forward(hermitian_part(P), roots, eps)
        return (*outputs, *residuals)

    setup_context: Any = Solved.setup_context
    backward: Any = Solved.backward


def _done(ctx: Any) -> Done:
    P, *output = ctx.saved_tensors
    count = len(ctx.roots)
    return Done(ctx.roots, ctx.eps, P, tuple(output[:count]), tuple(output[count:]))
