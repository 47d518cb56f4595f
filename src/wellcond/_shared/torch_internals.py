"""All uses of PyTorch's private API, in one place to check when PyTorch changes."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable)

is_compiling: Callable[[], bool] = torch.compiler.is_compiling


def is_exporting() -> bool:
    """Whether ``torch.export`` is running, which cannot leave the graph.

    The flag itself, since in code that torch 2.9 compiles ``torch.compiler.is_exporting()`` is taken to be true.
    """
    return torch.compiler._is_exporting_flag


def in_onnx_export() -> bool:
    """Whether ``torch.onnx.export`` is running, by either exporter."""
    # The first condition is false unless something is exported, and takes a tenth of a microsecond.
    return (is_exporting() or torch.jit.is_tracing()) and _says_onnx()


def _says_onnx() -> bool:
    return torch.onnx.is_in_onnx_export()


# The second strategy of torch.onnx runs the compiler, which would assume the answer is no.
_says_onnx._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


# Whether autocast is on for any device; assumed to be where PyTorch cannot say.
any_autocast: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)


def is_shape_only(x: Tensor) -> bool:
    """Whether ``x`` has no data: on ``meta``, or a fake tensor of the exporter."""
    return x.is_meta or (type(x) is not Tensor and isinstance(x, torch._subclasses.FakeTensor))


def has_values(x: Tensor) -> bool:
    """Whether ``x`` can be read now; nothing can while a CUDA graph is captured."""
    return not (is_shape_only(x) or (x.is_cuda and torch.cuda.is_current_stream_capturing()))


def called_by(*names: str) -> bool:
    """Whether the calling function was itself called by a function of one of these names; for use where a library does
    not reveal its intent otherwise."""
    frame = inspect.currentframe()
    caller = frame and frame.f_back and frame.f_back.f_back
    return caller is not None and caller.f_code.co_name in names


def under_functorch() -> bool:
    """Whether a ``torch.func`` transform is active; tensors then hide their values."""
    return torch._C._are_functorch_transforms_active()


def under_forward_mode() -> bool:
    """Whether forward-mode differentiation is active."""
    return torch.autograd.forward_ad._current_level >= 0


def under_vmap() -> bool:
    """Whether one of the active ``torch.func`` transforms is ``vmap``."""
    functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    stack = functorch.get_interpreter_stack()
    return any(level.key() == functorch.TransformType.Vmap for level in stack or ())


def uncompiled() -> AbstractContextManager[Any]:
    """What ``torch.compile`` was applied to runs in Python inside, where it calls every hook."""
    # Nothing is compiled before this module is imported, which takes seconds.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def in_backward_pass() -> bool:
    """Whether a backward pass is running, as when activation checkpointing repeats a forward pass."""
    return torch._C._current_graph_task_id() != -1


def running_functions() -> set[type]:
    """The classes derived from ``torch.autograd.Function`` whose forward pass runs now: of what is called there the
    autograd graph knows nothing."""
    found: set[type] = set()
    codes = set()  # those with a context have their class in it
    frame = inspect.currentframe()
    while frame is not None:
        first = frame.f_locals.get(frame.f_code.co_varnames[0]) if frame.f_code.co_argcount else None
        if isinstance(first, torch.autograd.function.BackwardCFunction):
            found.add(type(first)._forward_cls)  # pyright: ignore[reportAttributeAccessIssue]
        else:
            codes.add(frame.f_code)
        frame = frame.f_back
    classes: list[type] = [torch.autograd.Function]
    while classes:
        one = classes.pop()
        classes += one.__subclasses__()
        if getattr(inspect.unwrap(one.forward), "__code__", None) in codes:
            found.add(one)
    return found


def function_of(node: Any) -> type | None:
    """The class derived from ``torch.autograd.Function`` that a node of the graph is of; None for PyTorch's own."""
    return getattr(node, "_forward_cls", None)


def along_many_directions(*grads: Tensor | None) -> bool:
    """Whether this is ``autograd.grad(is_grads_batched=True)``, whose tensors hide their batch and lack ``out=``."""
    batched = torch._C._functorch.is_legacy_batchedtensor  # pyright: ignore[reportAttributeAccessIssue]
    return any(grad is not None and batched(grad) for grad in grads)


def apply_directly(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply`` without binding defaults and looking for transforms, which costs as much as a small product;
    only valid while no transform is active."""
    return super(torch.autograd.Function, function).apply(*args)  # pyright: ignore[reportAttributeAccessIssue]


# Unlike torch.compiler.disable it imports the compiler only on first use, which takes longer than importing all of
# wellcond; and torch.compiler.disable, called in a function that is being compiled, would break the graph itself.
@torch._disable_dynamo  # pyright: ignore[reportAttributeAccessIssue]
def run_in_python(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """``function(*args, **kwargs)`` in Python also in code that is compiled, with a single graph break."""
    return function(*args, **kwargs)


def in_breakable_graph() -> bool:
    """Whether this is being compiled to a graph that can break (an exported one cannot)."""
    return is_compiling() and not is_exporting()


def outside_the_compiler(function: F) -> F:
    """``function``, always run in Python, also in code that is compiled.

    An error that LAPACK raises inside compiled code does not reach the surrounding ``except``: the fall-back chain
    would be skipped and nothing counted. So the compiler has to break its graph here. An exported graph cannot break
    and runs without Python; it contains the operation itself.
    """

    @wraps(function)
    def call(*args: Any) -> Any:
        return run_in_python(function, *args) if in_breakable_graph() else function(*args)

    return cast(F, call)
