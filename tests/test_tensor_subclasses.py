"""Matrices of a subclass of Tensor that wraps another, as libraries of quantisation make: it has no ``tolist``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from wellcond.linalg import invsqrtm, logm, polar, sqrtm, whiten


class Wrapped(Tensor):
    """Any operation, on the tensor inside."""

    inside: Tensor

    @staticmethod
    def __new__(cls, inside):
        kind = {"dtype": inside.dtype, "device": inside.device, "strides": inside.stride()}
        wrapped = Tensor._make_wrapper_subclass(cls, inside.size(), **kind)
        wrapped.inside = inside
        return wrapped

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(cls, lambda wrapped: wrapped.inside, (args, kwargs or {}))
        return tree_map_only(Tensor, cls, function(*args, **kwargs))


FUNCTIONS = {
    "sqrtm": lambda A: sqrtm(A @ A.mT + torch.eye(A.shape[-2], dtype=A.dtype)),
    "invsqrtm": lambda A: invsqrtm(A.mT @ A, eps=1e-2),
    "logm": lambda A: logm(A.mT @ A, eps=1e-2),
    "polar": polar,
    "whiten": lambda A: whiten(A.mT, eps=1e-2),
}


@pytest.mark.parametrize("shape", [(6, 4), (3, 6, 4), (90, 6, 4)], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_matrices_of_a_wrapper_subclass(name, shape):
    A = torch.randn(shape, dtype=torch.float64)
    got = FUNCTIONS[name](Wrapped(A))
    assert type(got) is Wrapped and torch.equal(got.inside, FUNCTIONS[name](A))
