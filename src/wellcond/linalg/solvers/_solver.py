"""What a solver is: a way to compute matrix roots and their derivative.

Adding one means adding one file beside this, and importing it in ``__init__``. It has two methods: ``forward``, and
``lyapunov`` (:class:`LyapunovSolver`) or, where the derivative is another, ``backward``. ``_solved`` makes an autograd
function of them, with vmap, forward mode and higher derivatives.
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
