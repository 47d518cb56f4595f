"""How many operations the layers run where an accelerator would run them, and that none of them reads a value.

The counts are those of ``benchmarks/how_many_kernels.py``, on ``meta``; here they are bounds, so that they cannot grow.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import wellcond.linalg as wl
from wellcond.nn import DecorrelatedBatchNorm2d, IterNorm2d

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from how_many_kernels import READS, count, count_case, of_layer

# Both passes; what the formulas need, with γ, β and running statistics.
BOUNDS = {
    "plain": (lambda: DecorrelatedBatchNorm2d(64), 44),
    "groups": (lambda: DecorrelatedBatchNorm2d(64, groups=4), 49),
    "not affine": (lambda: DecorrelatedBatchNorm2d(64, affine=False), 41),
    "iterated": (lambda: IterNorm2d(64), 90),
}
LAYERS = {name: build for name, (build, _) in BOUNDS.items()} | {
    "relative": lambda: DecorrelatedBatchNorm2d(64, relative=True),
    "cholesky": lambda: DecorrelatedBatchNorm2d(64, method="cholesky"),
    "pca": lambda: DecorrelatedBatchNorm2d(64, method="pca"),
    "cumulative": lambda: DecorrelatedBatchNorm2d(64, momentum=None),
    "of whitening matrices": lambda: DecorrelatedBatchNorm2d(64, running="whitening"),
}


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("shape", [(16, 64, 14, 14), (128, 64, 32, 32)])
def test_a_layer_runs_no_more_operations_than_its_formula_has(name, shape):
    """Whatever the size of the batch: it is not cut into pieces for a cache that a device has not."""
    build, bound = BOUNDS[name]
    counted = count(of_layer(build, *shape)("meta"))
    assert counted.both <= bound, (counted.forward, counted.backward)


def test_the_table_of_the_benchmark_has_the_same_counts():
    from how_many_kernels import CASES

    assert count_case(CASES["DecorrelatedBatchNorm2d"]).both <= BOUNDS["plain"][1]


class Reads(TorchDispatchMode):
    """Operations that make the host wait for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in READS | {"item", "nonzero"}:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_layer_reads_a_value_on_a_device(name, dtype):
    layer = LAYERS[name]().to("meta")
    x = torch.empty(16, 64, 7, 7, device="meta", dtype=dtype, requires_grad=True)
    with Reads() as reads:
        y = layer(x)
        grads = torch.autograd.grad(y, (x, *layer.parameters()), torch.empty_like(y))
    assert not reads.names
    assert (y.shape, y.dtype) == (x.shape, dtype)
    assert [g.shape for g in grads] == [t.shape for t in (x, *layer.parameters())]


def test_without_checks_the_way_of_a_device_gives_what_the_checked_one_gives():
    """Constants and the ridge are then always accounted for, and nothing asks whether they have to be."""
    torch.manual_seed(0)
    x = torch.randn(16, 6, 5, 5, dtype=torch.float64)
    x[:, 2] = 7.7  # a constant channel
    g = torch.randn_like(x)
    results = []
    for checked in (True, False):
        for build in (DecorrelatedBatchNorm2d, IterNorm2d):
            layer = build(6, dtype=torch.float64)
            nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(1))
            z = x.clone().requires_grad_()
            with wl.value_checks(checked):
                y = layer(z)
                grads = torch.autograd.grad(y, (z, *layer.parameters()), g)
            results.append((y, *grads, layer.running_mean, layer.running_cov))
    for got, want in zip(results[2] + results[3], results[0] + results[1], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
