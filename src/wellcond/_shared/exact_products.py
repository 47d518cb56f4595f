"""Spectral work in full float32 precision, whatever precision the user has chosen for float32 matrix products.

``torch.set_float32_matmul_precision("high")`` rounds the factors to TF32 on CUDA, to about 1e-3, and "medium" to
bfloat16: good enough for a linear layer, but it ruins an orthogonal matrix. The setting is global, so it is changed
only for the duration of the work. With several threads, the first to enter changes it and the last to leave restores
it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from .autograd import differentiated_again
from .torch_internals import is_compiling, under_forward_mode, under_functorch

_ROUNDED = ("tf32", "bf16")


def products_are_rounded() -> bool:
    """Whether products of float32 matrices are computed in less than float32."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # since torch 2.9, if precision was set through the newer names
        return any(backend.fp32_precision in _ROUNDED for backend in _backends())


# The compiler cannot trace this; it treats the answer as a constant and recompiles when the setting changes.
products_are_rounded._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def _backends() -> tuple[Any, ...]:
    mkldnn: Any = torch.backends.mkldnn
    return (torch.backends.cuda.matmul, *([mkldnn.matmul] if hasattr(mkldnn, "matmul") else []))


def _make_products_exact() -> Callable[[], None] | None:
    """Returns a function that restores the setting, or None if nothing had to change."""
    if not products_are_rounded():
        return None
    newer = [(backend, backend.fp32_precision) for backend in _backends() if hasattr(backend, "fp32_precision")]
    try:
        older = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
    except RuntimeError:
        older = None
        for backend, _ in newer:
            backend.fp32_precision = "ieee"

    def back() -> None:
        if older is not None:
            torch.set_float32_matmul_precision(older)
        for backend, precision in newer:
            if backend.fp32_precision != precision:
                backend.fp32_precision = precision

    return back


def _make_convolutions_exact() -> Callable[[], None] | None:
    """The same for convolutions on CUDA, which use TF32 unless the user disables it."""
    cudnn: Any = torch.backends.cudnn
    try:
        if not cudnn.allow_tf32:
            return None
        cudnn.allow_tf32 = False
        # The line above leaves convolutions to torch.backends.fp32_precision, if that is set.
        if hasattr(cudnn, "conv") and cudnn.conv.fp32_precision in _ROUNDED:
            cudnn.conv.fp32_precision = "ieee"
        return lambda: setattr(cudnn, "allow_tf32", True)
    except RuntimeError:
        before, cudnn.conv.fp32_precision = cudnn.conv.fp32_precision, "ieee"
        return lambda: setattr(cudnn.conv, "fp32_precision", before)


class _Shared:
    """One global setting, held by any number of threads."""

    def __init__(self, change: Callable[[], Callable[[], None] | None]) -> None:
        self._change, self._lock, self._holders = change, Lock(), 0
        self._back: Callable[[], None] | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        with self._lock:
            if self._holders == 0:
                self._back = self._change()
            self._holders += 1
        try:
            yield
        finally:
            with self._lock:
                self._holders -= 1
                if self._holders == 0 and self._back is not None:
                    back, self._back = self._back, None
                    back()


_products, _convolutions = _Shared(_make_products_exact), _Shared(_make_convolutions_exact)


def _user_rounds() -> bool:
    """:func:`products_are_rounded` as the user set it, even while another thread holds the products exact."""
    return _products._back is not None or products_are_rounded()


_user_rounds._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


@contextmanager
def exact_products(*, convolutions: bool = False) -> Iterator[None]:
    """A context in which products of float32 matrices, and convolutions if asked for, are computed in float32.

    Does nothing in compiled code, which keeps the setting that it was compiled with.
    """
    if is_compiling():
        yield
        return
    with _products.held():
        if not convolutions:
            yield
            return
        with _convolutions.held():
            yield


def exactly(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """``function(*inputs)`` with exact products, in the forward and the backward pass.

    Compiled code and the transforms of ``torch.func`` use double precision instead.
    """
    if not _user_rounds() or inputs[0].dtype == torch.float64:
        return function(*inputs)
    if is_compiling() or under_functorch() or under_forward_mode():
        return function(*(x.double() for x in inputs)).to(inputs[0].dtype)
    return _Exactly.apply(function, *inputs)  # pyright: ignore[reportReturnType]


class _Exactly(torch.autograd.Function):
    """A function that keeps its graph, and differentiates it with exact products."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        own = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
        # Hide the inner graph from saved-tensor hooks of others, such as checkpointing, which count saved tensors.
        untouched = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
        with exact_products(), untouched, torch.set_grad_enabled(any(ctx.needs_input_grad)):
            result = function(*own)
        ctx.function, ctx.inside = function, (own, result)
        ctx.save_for_backward(*inputs)
        return result.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        inputs, again = ctx.saved_tensors, differentiated_again()
        own, result = ctx.inside
        with exact_products():
            if again:
                with torch.enable_grad():
                    own = [x.view_as(x) for x in inputs]  # so that hooks on the inputs do not run here
                    result = ctx.function(*own)
            asked = [x for x, needed in zip(own, ctx.needs_input_grad[1:], strict=True) if needed]
            found = iter(torch.autograd.grad(result, asked, grad, retain_graph=True, create_graph=again))
        return None, *(next(found) if needed else None for needed in ctx.needs_input_grad[1:])
