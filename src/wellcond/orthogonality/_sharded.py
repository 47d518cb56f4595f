"""A weight that is sharded over processes (a DTensor of ``fully_shard`` or ``parallelize_module``), treated as a whole.

Singular values and products of a shard are not those of the matrix. So the matrix is gathered, every process computes
the same result from it, and keeps its own part. Gathering is the only communication.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, cast

from torch import Tensor, nn

from ._matrix import Target


def is_sharded(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor. Does not import ``torch.distributed``, which may be missing."""
    return hasattr(tensor, "full_tensor")


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on this module itself, which then gathers its weights in forward hooks."""
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__)


def whole(tensor: Tensor) -> Tensor:
    """The full tensor; differentiable. A collective operation: every process of the mesh must call it."""
    return cast(Any, tensor).full_tensor() if is_sharded(tensor) else tensor


def spread(tensor: Tensor, like: Tensor) -> Tensor:
    """The full ``tensor``, equal on every process, sharded like ``like``; differentiable, without communication."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    mesh = cast(Any, like).device_mesh
    everywhere = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(mesh, cast(Any, like).placements)


class _Gathered:
    """A :class:`Target` with whole parameter and gradient, gathered when ``parameter`` is first accessed."""

    def __init__(self, target: Target) -> None:
        self.name, self.where, self.view, self.layer = target.name, target.where, target.view, target.layer
        self._sharded = target.parameter

    @cached_property
    def parameter(self) -> nn.Parameter:
        parameter = nn.Parameter(whole(self._sharded.detach()), self._sharded.requires_grad)
        assert self._sharded.grad is not None
        parameter.grad = whole(self._sharded.grad)
        self._versions = parameter._version, parameter.grad._version
        return parameter

    def put_back(self) -> None:
        """Write changes to this process's shard."""
        if "parameter" not in self.__dict__:  # never gathered
            return
        gradient, sharded = self.parameter.grad, cast(Any, self._sharded.grad)
        assert gradient is not None
        if self.parameter._version != self._versions[0]:
            self._sharded.copy_(spread(self.parameter.detach(), self._sharded))
        if gradient._version != self._versions[1]:
            if any(placement.is_partial() for placement in sharded.placements):  # not yet summed
                self._sharded.grad = spread(gradient, self._sharded)
            else:
                sharded.copy_(spread(gradient, sharded))


@contextmanager
def gathered(target: Target) -> Iterator[Target]:
    """The target with a whole parameter and gradient; changes to them are written to the shards at the end.

    Nothing is gathered before the parameter is accessed. A weight that is not sharded is passed through.
    """
    if not is_sharded(target.parameter):
        yield target
        return
    stand_in = _Gathered(target)
    yield cast(Target, stand_in)
    stand_in.put_back()
