"""Treatments and monitor on ``meta``: shapes and dtypes without values, to look at a model that is nowhere yet."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from wellcond.monitor import ConditionMonitor
from wellcond.nn import DecorrelatedBatchNorm2d
from wellcond.orthogonality import (
    convolution_singular_values,
    orthogonal_weight,
    pre_spectral_layers,
    spectral_norm,
    treat,
    weight_matrices,
)


def model() -> nn.Sequential:
    with torch.device("meta"):
        return nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            DecorrelatedBatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 8, 3, padding=1, groups=2),
            DecorrelatedBatchNorm2d(8),
        )


def images() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8, device="meta")


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW], ids=["SGD", "AdamW"])
@pytest.mark.parametrize(
    ("spec", "options"),
    [
        ("nog+ow+olr+ol", {}),
        ("sn+nog+olr", {"olr": {"rule": "exact", "direction": "update"}}),
        ("ow+nog", {"ow": {"map": "cayley"}, "nog": {"on": "update", "scale": "gradient"}}),
        ("ow+nog", {"ow": {"map": "householder"}, "nog": {"solver": "svd"}}),
        ("nog+ol", {"nog": {"solver": "minimax"}, "ol": {"form": "srip"}}),
        ("nog+ol", {"nog": {"solver": "muon"}, "ol": {"form": "double_soft"}}),
    ],
)
def test_a_treated_model_trains_is_saved_and_is_set_free(spec, options, optimizer):
    net = model()
    before = {name: (p.shape, p.dtype, p.device) for name, p in net.named_parameters()}
    optim = optimizer(net.parameters(), lr=0.1)
    handle = treat(net, optim, spec, options=options)
    for _ in range(2):
        optim.zero_grad()
        y = net(images())
        assert y.shape == (2, 8, 8, 8) and y.is_meta
        (y.sum() + handle.loss()).backward()
        handle.add_loss_gradient()
        optim.step()
    assert all(rate.is_meta and rate.shape == () for rate in handle.rates().values())
    assert "16 × 27" in handle.summary() and "2 of 4 × 72" in handle.summary()
    handle.load_state_dict(handle.state_dict())
    handle.remove()
    assert {name: (p.shape, p.dtype, p.device) for name, p in net.named_parameters()} == before


@pytest.mark.parametrize("kind", ["exp", "cayley", "householder", "soc", "sn", "operator"])
def test_a_parametrised_layer_has_output_and_gradients_of_the_right_shape(kind):
    layer = nn.Conv2d(3, 8, 3, padding=1, device="meta")
    if kind in ("sn", "operator"):
        spectral_norm(layer, **({"of": "operator", "input_size": 8} if kind == "operator" else {}))
    else:
        orthogonal_weight(layer, map=kind)
    x = images().requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert y.shape == (2, 8, 8, 8) and x.grad.shape == x.shape
    assert all(p.grad.shape == p.shape and p.grad.is_meta for p in layer.parameters())


def test_what_looks_at_weights_looks_at_shapes():
    layer = nn.Conv2d(3, 8, 3, device="meta")
    assert weight_matrices(layer).shape == (1, 8, 27)
    assert convolution_singular_values(layer, 8).shape == (3 * 64,)
    assert list(pre_spectral_layers(model())) == list(pre_spectral_layers(model(), images())) == ["0", "3"]


def test_a_model_treated_on_meta_gets_its_values_later():
    net = model()
    optim = torch.optim.SGD(net.parameters(), lr=0.1)
    treat(net, optim, "nog+olr")
    net.to_empty(device="cpu")
    assert not any(p.is_meta for p in net.parameters())


@pytest.mark.parametrize("counts_steps", [True, False])
def test_the_monitor_counts_steps_and_records_nothing(counts_steps):
    net = model()
    optim = torch.optim.SGD(net.parameters(), lr=0.1)
    with ConditionMonitor(net, every=1, optimizer=optim if counts_steps else None) as monitor:
        for _ in range(3):
            net(images()).sum().backward()
            optim.step()
    assert monitor.step == 3 and monitor.records == [] and monitor.statistics() == {}
    monitor.load_state_dict(monitor.state_dict())
