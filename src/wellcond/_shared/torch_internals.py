"""Everything that is asked of PyTorch under a name that is not public, in one place to look at when PyTorch changes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable)

is_compiling: Callable[[], bool] = torch.compiler.is_compiling
# Since torch 2.7.
is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)


def in_onnx_export() -> bool:
    """Whether ``torch.onnx.export`` is running, by either exporter."""
    # The first of these settles it in a tenth of a microsecond wherever nothing is exported.
    return (is_exporting() or torch.jit.is_tracing()) and _says_onnx()


def _says_onnx() -> bool:
    return torch.onnx.is_in_onnx_export()


# What torch.onnx tries second is the compiler, which takes the answer for no unless it is told to ask.
_says_onnx._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


# Whether autocast is on for some device; yes where PyTorch does not say.
any_autocast: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)


def is_shape_only(x: Tensor) -> bool:
    """Whether ``x`` is on ``meta``, or a fake of the exporter."""
    return x.is_meta or (type(x) is not Tensor and isinstance(x, torch._subclasses.FakeTensor))


def has_values(x: Tensor) -> bool:
    """Whether ``x`` can be read now; while a CUDA graph is captured nothing can."""
    return not (is_shape_only(x) or (x.is_cuda and torch.cuda.is_current_stream_capturing()))


def called_by(name: str) -> bool:
    """Whether the function that asks was called by one of this name, where PyTorch says in no other way what it is
    about to do."""
    frame = inspect.currentframe()
    caller = frame and frame.f_back and frame.f_back.f_back
    return caller is not None and caller.f_code.co_name == name


def under_functorch() -> bool:
    """Whether a transform of ``torch.func`` is running: tensors then hide their values."""
    return torch._C._are_functorch_transforms_active()


def under_forward_mode() -> bool:
    """Whether a level of forward-mode differentiation is open."""
    return torch.autograd.forward_ad._current_level >= 0


def in_backward_pass() -> bool:
    """Whether the calling code runs inside a backward pass, as when activation checkpointing repeats a forward one."""
    return torch._C._current_graph_task_id() != -1


def along_many_directions(*grads: Tensor | None) -> bool:
    """Whether ``autograd.grad(is_grads_batched=True)`` asks: such tensors hide their batch and know no ``out=``."""
    batched = torch._C._functorch.is_legacy_batchedtensor  # pyright: ignore[reportAttributeAccessIssue]
    return any(grad is not None and batched(grad) for grad in grads)


def apply_directly(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply`` without its binding of defaults and search for transforms, which cost what a small product
    does; for use where no transform is active."""
    return super(torch.autograd.Function, function).apply(*args)  # pyright: ignore[reportAttributeAccessIssue]


# Unlike torch.compiler.disable it loads the compiler at the first call: that takes longer than all of this library. And
# done within a function that is being compiled, disabling would be a break of the graph by itself.
@torch._disable_dynamo  # pyright: ignore[reportAttributeAccessIssue]
def as_written(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """``function(*args, **kwargs)``, run by Python where the compiler meets it: its graph breaks once for all of it."""
    return function(*args, **kwargs)


def in_a_graph_that_breaks() -> bool:
    """Whether the compiler is at work, whose graph can break (an exported one cannot)."""
    return is_compiling() and not is_exporting()


def outside_the_compiler(function: F) -> F:
    """``function``, run as it is written when the compiler meets it.

    A graph that calls LAPACK raises from the middle of compiled code, past the ``except`` that Python has around the
    call: the fall-back chain would be skipped and nothing counted. So the compiler is made to break the graph there. An
    exported graph cannot break and runs without Python: it holds the operation itself.
    """

    @wraps(function)
    def call(*args: Any) -> Any:
        return as_written(function, *args) if in_a_graph_that_breaks() else function(*args)

    return cast(F, call)
