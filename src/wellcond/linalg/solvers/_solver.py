"""What a solver is: a way to compute matrix roots and their derivative.

Adding one means adding one file beside this, and importing it in ``__init__``. It has two methods: ``forward``, and
``lyapunov`` (:class:`LyapunovSolver`) or, where the derivative is another, ``backward``. :class:`Solved` makes an
autograd function of them, with vmap, forward mode and higher derivatives.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from wellcond._shared.autograd import BatchedFunction
from wellcond._shared.checks import bad_indices, checks_values, hermitian, hermitian_part
from wellcond._shared.errors import ApproximateRootWarning, NotPositiveSemidefiniteError
from wellcond._shared.events import place
from wellcond._shared.precision import full_precision, widened
from wellcond._shared.products import identity, plus_product, positive_or_one, product
from wellcond._shared.torch_internals import is_compiling

from .._rank import matrix_tolerance

Root = Literal["sqrt", "invsqrt"]
Tensors = tuple[Tensor, ...]


class Done(NamedTuple):
    """What is known of a finished forward pass when it is differentiated."""

    roots: tuple[Root, ...]
    eps: float
    P: Tensor | None
    outputs: Tensors
    residuals: Tensors


class Solver(ABC):
    """One way to compute P^{1/2} and P^{-1/2} of Hermitian positive (semi)definite matrices.

    A subclass with a ``name`` is known by it as soon as it is defined.

    Attributes:
        name: the word by which users choose it.
        variants: words that the first argument of its constructor takes; ``"NAME:VARIANT"`` chooses one.
        keeps_input: whether :meth:`backward` wants P (it is saved only then).
        traceable: whether forward and backward are tensor operations that read no values, so that ``torch.compile``
            takes them whole (``fullgraph=True``).
        tolerance: of an approximate solver, the relative residual above which it warns, once (checked with the values);
            in the 1st, 2nd, 4th, 8th, … check also the relative error along an eigenvector.
        has_warned: whether it did; then nothing is checked any more.
        times_checked: how often it was.
    """

    name: ClassVar[str]
    variants: ClassVar[tuple[str, ...]] = ()
    keeps_input: ClassVar[bool] = False
    traceable: bool = False
    tolerance: float | None = None
    has_warned: bool = False
    times_checked: int = 0

    def __init_subclass__(cls) -> None:
        if "name" in cls.__dict__:
            SOLVERS[cls.name] = cls

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    @abstractmethod
    def forward(self, P: Tensor, roots: tuple[Root, ...], eps: float) -> tuple[Tensors, Tensors]:
        """The roots of P + εI, one tensor each, and the residuals that the derivative wants to see again."""

    @abstractmethod
    def backward(self, done: Done, grads: tuple[Tensor | None, ...]) -> Tensor:
        """The gradient of P (Hermitian), from those of the roots (None: that root has none), in operations that can be
        differentiated again."""

    def jvp(self, done: Done, dP: Tensor) -> Tensors:
        """The change of every root along the Hermitian direction dP."""
        raise NotImplementedError(f"solver '{self.name}' has reverse-mode derivatives only; take 'eigh'")


SOLVERS: dict[str, type[Solver]] = {}
"""Every solver by its name."""


class LyapunovSolver(Solver):
    """A solver whose derivative solves the Lyapunov equation of its roots: it says how, and the rest follows.

    Where the roots are not exact, neither is that derivative (as in the published layers of ``pade`` and ``taylor``).
    """

    @abstractmethod
    def lyapunov(self, Q: Tensor, G: Tensor, root: Root, done: Done) -> Tensor:
        """X with QX + XQ = G, G Hermitian and Q a root that :meth:`forward` gave, in differentiable operations."""

    def derivative(self, root: Root, output: Tensor, direction: Tensor, done: Done) -> Tensor:
        """The derivative of a root along a Hermitian direction, which is its own adjoint (Higham 2008, ch. 6).

        From Q Q = P: Q dQ + dQ Q = dP. From S P S = I: dS = −S Y S with S Y + Y S = S dP S.
        """
        if root == "sqrt":
            return self.lyapunov(output, direction, root, done)
        inside = self.lyapunov(output, product(product(output, direction), output), root, done)
        return hermitian_part(plus_product(output, product(output, inside), output, beta=0.0, alpha=-1.0))

    def backward(self, done: Done, grads: tuple[Tensor | None, ...]) -> Tensor:
        """The gradient of P (Hermitian), from those of the roots (None: that root has none)."""
        terms = [
            self.derivative(root, output, hermitian_part(grad), done)
            for root, output, grad in zip(done.roots, done.outputs, grads, strict=True)
            if grad is not None
        ]
        return terms[0] if len(terms) == 1 else terms[0] + terms[1]

    def jvp(self, done: Done, dP: Tensor) -> Tensors:
        """The change of every root along the Hermitian direction dP."""
        return tuple(self.derivative(*pair, dP, done) for pair in zip(done.roots, done.outputs, strict=True))


class Solved(BatchedFunction):
    """Roots of a matrix by any solver, as an autograd function: it saves the roots, the residuals and P if wanted."""

    @staticmethod
    def forward(P: Tensor, solver: Solver, roots: tuple[Root, ...], eps: float) -> Tensors:
        P = hermitian(P)
        outputs, residuals = solver.forward(P, roots, eps)
        if solver.tolerance is not None and not solver.has_warned and checks_values(P) and P.numel():
            _warn_if_far(solver, P, outputs, roots, eps)
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
    """:class:`Solved` as the compiler can trace it, which it cannot with a jvp and a vmap rule; values are not read."""

    @staticmethod
    def forward(P: Tensor, solver: Solver, roots: tuple[Root, ...], eps: float) -> Tensors:
        outputs, residuals = solver.forward(hermitian_part(P), roots, eps)
        return (*outputs, *residuals)

    setup_context = Solved.setup_context
    backward = Solved.backward


def require_scale(scale: Tensor, roots: tuple[Root, ...]) -> None:
    """Refuse the inverse root of a zero matrix in the solvers that see no eigenvalues."""
    if "invsqrt" not in roots or is_compiling() or not checks_values(scale):
        return
    if (scale <= 0).any():
        raise NotPositiveSemidefiniteError(
            f"P is zero{bad_indices((scale <= 0)[..., 0, 0])}{place()}, so P^(-1/2) does not exist; give eps > 0"
        )


def frobenius_norm(P: Tensor) -> Tensor:
    """‖P‖_F as (..., 1, 1), of whatever size: squares of entries beyond 1e19 or below 1e-19 leave float32."""
    if P.shape[-1] == 0:
        return P.real.new_zeros(*P.shape[:-2], 1, 1)
    largest = positive_or_one(largest_entry(P.detach()))
    return torch.linalg.matrix_norm(P / largest, keepdim=True) * largest


def largest_entry(P: Tensor) -> Tensor:
    """max |Pij| as (..., 1, 1)."""
    return torch.linalg.vector_norm(P, float("inf"), dim=(-2, -1), keepdim=True)


def relative_residual(P: Tensor, root: Tensor, which: Root, eps: float) -> Tensor:
    """(...,) ‖Q² − P‖/‖P‖ of a square root Q, ‖S P S − I‖/‖I‖ of an inverse one; P + εI for P, Frobenius norms."""
    eye = identity(P)
    if eps:
        P = torch.add(P, eye, alpha=eps)
    if which == "sqrt":
        return (frobenius_norm(plus_product(P, root, root, beta=-1.0)) / positive_or_one(frobenius_norm(P)))[..., 0, 0]
    rest = plus_product(eye, product(root, P), root, beta=-1.0)
    return torch.linalg.matrix_norm(rest) / max(P.shape[-1], 1) ** 0.5


def error_along_eigenvectors(P: Tensor, root: Tensor, which: Root, eps: float) -> Tensor:
    """(...,) max_i |uᵢᴴ Q uᵢ/√λᵢ − 1| of a square root Q of P + εI, over the eigenvalues that are not rounding; with
    1/√λᵢ of an inverse one.

    A small eigenvalue hardly weighs in ‖Q² − P‖/‖P‖: Q may be a thousand times too large along its eigenvector, or
    zero, and leave a residual of a few percent.
    """
    eigvals, U = torch.linalg.eigh(widened(P))
    eigvals = eigvals + eps
    along = (U.conj() * (widened(root) @ U)).sum(-2).real
    truth = eigvals.clamp_min(0.0).sqrt() if which == "sqrt" else eigvals.clamp_min(0.0).rsqrt()
    error = (along / truth - 1.0).abs()
    return torch.where(eigvals > matrix_tolerance(eigvals, P.dtype), error, 0.0).amax(-1)


def _warn_if_far(solver: Solver, P: Tensor, outputs: Tensors, roots: tuple[Root, ...], eps: float) -> None:
    assert solver.tolerance is not None
    solver.times_checked += 1
    measures = {"left a relative residual of {:.2g}": relative_residual}
    if solver.times_checked.bit_count() == 1:  # the 1st, 2nd, 4th, 8th, … time, for it costs an eigendecomposition
        measures["is off by {:.2g} of itself along an eigenvector"] = error_along_eigenvectors
    for text, measure in measures.items():
        worst = max(measure(P, out, which, eps).max().item() for out, which in zip(outputs, roots, strict=True))
        if not worst <= solver.tolerance:
            solver.has_warned = True
            warnings.warn(
                f"{solver!r} {text.format(worst)}{place()}: this is a damped root, not the root; "
                "take solver='eigh', more steps, or tolerance=None if that is what you want",
                ApproximateRootWarning,
                stacklevel=2,
            )
            return


def _done(ctx: Any) -> Done:
    P, *output = ctx.saved_tensors
    count = len(ctx.roots)
    return Done(ctx.roots, ctx.eps, P, tuple(output[:count]), tuple(output[count:]))
