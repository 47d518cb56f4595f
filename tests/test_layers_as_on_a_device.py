"""What decorrelated batch norm computes where an accelerator would run it, with values: that way is forced on the CPU.

Off the CPU the features are centred by their exact mean, nothing is cut to fit a cache, no memory is reused, and no
value is read.
"""

from __future__ import annotations

import copy

import pytest
import torch

import wellcond.linalg as wl
from wellcond.nn import DecorrelatedBatchNorm2d, IterNorm2d
from wellcond.nn._fused_passes import geometry, layout


@pytest.fixture
def as_on_a_device(monkeypatch):
    def forced(layer, x, w):
        real = geometry._geometry
        with monkeypatch.context() as patch, wl.value_checks(False):
            patch.setattr(geometry, "_geometry", lambda *args: real(*args[:-1], False))
            patch.setattr(layout, "LARGEST_KEPT", -1)
            return results(layer, x, w)

    return forced


def results(layer, x, w):
    """Output, gradients and statistics of one training step."""
    x = x.clone().requires_grad_()
    y = layer(x)
    gradients = torch.autograd.grad((y * w).sum(), [x, *layer.parameters()])
    return [y.detach(), *gradients, layer.running_mean, layer.running_cov]


INPUTS = {
    "plain": lambda x: x,
    "far": lambda x: x + 100.0,
    "a constant channel": lambda x: x.index_fill(1, torch.tensor([2]), 3.0),
    "a zero channel": lambda x: x.index_fill(1, torch.tensor([2]), 0.0),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "one image": lambda x: x[:1],
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("kind", [DecorrelatedBatchNorm2d, IterNorm2d])
def test_a_device_computes_what_the_cpu_does(kind, name, groups, dtype, as_on_a_device):
    torch.manual_seed(0)
    layer = kind(8, groups=groups, eps=1e-3, dtype=dtype)
    mixing = torch.randn(8, 8, dtype=dtype)
    x = INPUTS[name](torch.einsum("dc,nchw->ndhw", mixing, torch.randn(6, 8, 5, 5, dtype=dtype)))
    w = torch.randn_like(x)
    expected = results(copy.deepcopy(layer), x, w)
    found = as_on_a_device(layer, x, w)
    # Rounding, raised by 1/eps of the inverse root where a direction is null, and by the mean where that is large.
    tolerance = (1e4 if name != "far" else 1e6) * torch.finfo(dtype).eps
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= tolerance * other.abs().max()
