"""Shared by all autograd functions: a vmap rule, and the question whether a result is differentiated again."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from .torch_internals import (
    apply_directly,
    is_compiling,
    is_exporting,
    run_in_python,
    under_forward_mode,
    under_functorch,
)


class BatchedFunction(torch.autograd.Function):
    """An autograd function whose operations broadcast over leading dimensions, so that vmap adds one more in front.

    Tensors that are not mapped are expanded before the call, so that autograd sums their gradients.
    """

    vmap: Any

    def __init_subclass__(cls) -> None:
        def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
            front = [_to_front(arg, dim, info.batch_size) for arg, dim in zip(args, in_dims, strict=True)]
            out = cls.apply(*front)
            return out, (0,) * len(out) if isinstance(out, tuple) else 0

        # ``apply`` binds its arguments to the signature in every call; this saves inspecting it every time.
        cls.forward.__signature__ = inspect.signature(cls.forward)  # pyright: ignore[reportFunctionMemberAccess]
        cls.vmap = staticmethod(vmap)  # pyright: ignore[reportAttributeAccessIssue]

    @classmethod
    def call(cls, *args: Any) -> Any:
        """``apply`` without binding defaults and looking for transforms, which costs as much as a small product."""
        if is_exporting():  # an exported graph holds plain operations only
            return cls.forward(*args)
        if is_compiling():  # it knows no function with a rule for the forward mode
            return run_in_python(_apply, cls, *args)
        if under_functorch():
            return cls.apply(*args)
        return apply_directly(cls, *args)


def _apply(function: type[BatchedFunction], *args: Any) -> Any:
    return function.apply(*args)


class _Once(BatchedFunction):
    """A value that cannot be differentiated again with respect to its sources."""

    @staticmethod
    def forward(value: Tensor, message: str, *sources: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.message = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise NotImplementedError(ctx.message)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise NotImplementedError(ctx.message)


def once(value: Tensor, message: str, *sources: Tensor) -> Tensor:
    """``value``; differentiating it again with respect to ``sources`` raises instead of giving a wrong result."""
    return _Once.apply(value.detach(), message, *sources)  # pyright: ignore[reportReturnType]


def differentiated_again() -> bool:
    """Whether the current computation may itself be differentiated, in any mode."""
    return torch.is_grad_enabled() or under_forward_mode() or under_functorch()


def _to_front(arg: Any, dim: int | None, batch_size: int) -> Any:
    if not isinstance(arg, Tensor):
        return arg
    return arg.movedim(dim, 0) if dim is not None else arg.expand(batch_size, *arg.shape)
