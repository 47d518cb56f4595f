"""The interface of solvers, which compute matrix roots and their derivatives.

To add one, add a file to this folder and import it in ``__init__``. A solver has two methods: ``forward``, and
``lyapunov`` (:class:`LyapunovSolver`) or, if its derivative is of another kind, ``backward``. ``_solved`` makes an
autograd function of them, with vmap, forward mode and higher derivatives.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal, NamedTuple

from torch import Tensor

from wellcond._shared.checks import hermitian_part
from wellcond._shared.products import plus_product, product

Root = Literal["sqrt", "invsqrt"]
Tensors = tuple[Tensor, ...]


class Done(NamedTuple):
    """What ``backward`` and ``jvp`` know of the forward pass."""

    roots: tuple[Root, ...]
    eps: float
    P: Tensor | None
    outputs: Tensors
    residuals: Tensors


class Solver(ABC):
    """A way to compute P^{1/2} and P^{-1/2} of Hermitian positive (semi)definite matrices (..., d, d).

    A subclass with a ``name`` is registered under it by its definition.

    Attributes:
        name: by which users select it.
        variants: values of the first constructor argument; ``"NAME:VARIANT"`` selects one.
        keeps_input: whether :meth:`backward` needs P, which is saved only then.
        traceable: whether forward and backward are tensor operations that read no values, so that ``torch.compile``
            captures them whole (``fullgraph=True``).
        tolerance: an approximate solver warns once if its relative residual exceeds it, or, in the 1st, 2nd, 4th, 8th,
            … check, its relative error along an eigenvector; checked when values are.
        has_warned: whether it has warned; nothing is checked after that.
        times_checked: how often it was checked.

    Example:
        >>> import torch
        >>> from wellcond.linalg import SOLVERS, Solver, sqrtm
        >>> solver = SOLVERS["newton_schulz"](steps=20)
        >>> isinstance(solver, Solver), sqrtm(torch.eye(2), solver=solver).trace().round().item()
        (True, 2.0)
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
        """The roots of P + εI, one tensor each, and the tensors that the derivative needs besides them."""

    @abstractmethod
    def backward(self, done: Done, grads: tuple[Tensor | None, ...]) -> Tensor:
        """The Hermitian gradient of P from those of the roots (None for a root without one), by differentiable
        operations."""

    def jvp(self, done: Done, dP: Tensor) -> Tensors:
        """The change of every root along the Hermitian direction dP."""
        raise NotImplementedError(f"solver '{self.name}' has reverse-mode derivatives only; take 'eigh'")


SOLVERS: dict[str, type[Solver]] = {}
"""Every solver by its name."""


class LyapunovSolver(Solver):
    """A solver whose derivative solves the Lyapunov equation of its roots, which is all that it has to implement.

    If the roots are not exact, neither is this derivative (as in the published layers of ``pade`` and ``taylor``).
    """

    @abstractmethod
    def lyapunov(self, Q: Tensor, G: Tensor, root: Root, done: Done) -> Tensor:
        """X with QX + XQ = G, for Hermitian G and a root Q from :meth:`forward`, by differentiable operations."""

    def derivative(self, root: Root, output: Tensor, direction: Tensor, done: Done) -> Tensor:
        """The derivative of a root along a Hermitian direction, which is self-adjoint (Higham 2008, ch. 6).

        From Q Q = P: Q dQ + dQ Q = dP. From S P S = I: dS = −S Y S with S Y + Y S = S dP S.
        """
        if root == "sqrt":
            return self.lyapunov(output, direction, root, done)
        inside = self.lyapunov(output, product(product(output, direction), output), root, done)
        return hermitian_part(plus_product(output, product(output, inside), output, beta=0.0, alpha=-1.0))

    def backward(self, done: Done, grads: tuple[Tensor | None, ...]) -> Tensor:
        """The Hermitian gradient of P from those of the roots (None for a root without one)."""
        terms = [
            self.derivative(root, output, hermitian_part(grad), done)
            for root, output, grad in zip(done.roots, done.outputs, grads, strict=True)
            if grad is not None
        ]
        return terms[0] if len(terms) == 1 else terms[0] + terms[1]

    def jvp(self, done: Done, dP: Tensor) -> Tensors:
        """The change of every root along the Hermitian direction dP."""
        return tuple(self.derivative(*pair, dP, done) for pair in zip(done.roots, done.outputs, strict=True))
