"""Spectral work in the full precision of float32, whatever the user has chosen for products of float32 matrices.

``torch.set_float32_matmul_precision("high")`` rounds what is multiplied to TF32 on CUDA, some 1e-3, and "medium" to
bfloat16: enough for a linear layer, and the end of an orthogonal matrix. The setting is the whole process's, so it is
changed for the length of the work alone; with several threads the first to come changes it and the last to leave sets
it back.
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
    except RuntimeError:  # since torch 2.9, where the newer names were used and this one knows nothing of it
        return any(backend.fp32_precision in _ROUNDED for backend in _backends())


# The compiler, which cannot look into it, takes the answer for good, and compiles again when the setting changes.
products_are_rounded._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def _backends() -> tuple[Any, ...]:
    mkldnn: Any = torch.backends.mkldnn
    return (torch.backends.cuda.matmul, *([mkldnn.matmul] if hasattr(mkldnn, "matmul") else []))


def _make_products_exact() -> Callable[[], None] | None:
    """What sets it back, where anything was changed."""
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
    """The same for convolutions on CUDA, which are in TF32 unless the user says otherwise."""
    cudnn: Any = torch.backends.cudnn
    try:
        if not cudnn.allow_tf32:
            return None
        cudnn.allow_tf32 = False
        # Which leaves it to torch.backends.fp32_precision, where that is set.
        if hasattr(cudnn, "conv") and cudnn.conv.fp32_precision in _ROUNDED:
            cudnn.conv.fp32_precision = "ieee"
        return lambda: setattr(cudnn, "allow_tf32", True)
    except RuntimeError:
        before, cudnn.conv.fp32_precision = cudnn.conv.fp32_precision, "ieee"
        return lambda: setattr(cudnn.conv, "fp32_precision", before)


class _Shared:
    """One setting of the process, held by any number of threads."""

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
    """`products_are_rounded`, also while another thread has them exact for its own work."""
    return _products._back is not None or products_are_rounded()


_user_rounds._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


@contextmanager
def exact_products(*, convolutions: bool = False) -> Iterator[None]:
    """A context in which products of float32 matrices, and convolutions if asked for, are computed in float32.

    Compiled code has the setting that it was compiled with, and is left alone.
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
    """``function(*inputs)`` with exact products, there and in the backward pass, where others run the operations.

    In compiled code and in the transforms of ``torch.func`` the same is had by double precision.
    """
    if not _user_rounds() or inputs[0].dtype == torch.float64:
        return function(*inputs)
    if is_compiling() or under_functorch() or under_forward_mode():
        return function(*(x.double() for x in inputs)).to(inputs[0].dtype)
    return _Exactly.apply(function, *inputs)  # pyright: ignore[reportReturnType]


class _Exactly(torch.autograd.Function):
    """A function whose graph is kept inside, and gone through under the guard."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        own = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
        # Not for the hooks of others, such as checkpoint's, who count what a forward pass saves.
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
                    own = [x.view_as(x) for x in inputs]  # the hooks of the inputs themselves are not to run here
                    result = ctx.function(*own)
            asked = [x for x, needed in zip(own, ctx.needs_input_grad[1:], strict=True) if needed]
            found = iter(torch.autograd.grad(result, asked, grad, retain_graph=True, create_graph=again))
        return None, *(next(found) if needed else None for needed in ctx.needs_input_grad[1:])
