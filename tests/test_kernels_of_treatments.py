"""What the treatments add to a step in kernels, on the way of a device, and that none of them waits for the host."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from treatment_models import batches
from wellcond.nn import SkewOrthogonalConv2d
from wellcond.orthogonality import treat

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "how_many_kernels.py"


@pytest.fixture(scope="module")
def kernels():
    spec = importlib.util.spec_from_file_location("how_many_kernels", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


# The spectral norm multiplies log2(d/(e·eps)) = 27 times: any decomposition of an accelerator asks the host.
BOUNDS = {"nog": (15, 24), "olr": (18, 18), "sn": (51, 16), "ow": (50, 50), "nog+ow+olr": (90, 100), "ol": (24, 24)}


@pytest.mark.parametrize("treatments", BOUNDS)
def test_a_treated_step_adds_no_more_operations_than_these(kernels, treatments):
    """Of a weight of 64 × 27: forward, backward and step, on an accelerator and on the CPU."""
    case = kernels.CASES[f"treated step adds, {treatments}"]
    device, cpu = BOUNDS[treatments]
    on_device = kernels.count_case(case)
    assert on_device.both <= device
    assert kernels.count_case(case, accelerator=False).both <= cpu
    assert not kernels.READS & {*on_device.forward, *on_device.backward}


def test_a_step_of_the_skew_orthogonal_convolution_too(kernels):
    def make(device):
        layer = SkewOrthogonalConv2d(64, 64).to(device)
        x = torch.randn(4, 64, 8, 8, device=device, requires_grad=True)
        return lambda x, *_: layer(x), (x, *layer.parameters())

    assert kernels.count(make("meta")).both <= 135


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_the_count_counts(kernels, device):
    def make(device):
        x = torch.randn(3, 3, device=device, requires_grad=True)
        return lambda x: (x @ x.mT).sum().view(1), (x,)

    counted = kernels.count(make(device))
    assert counted.forward == ["mm", "sum"]
    assert counted.backward.count("mm") == 2


@pytest.mark.parametrize("options", [{}, {"ow": {"map": "soc"}}], ids=["exp", "soc"])
def test_in_steady_state_no_value_goes_to_the_host(kernels, options):
    """On meta, where every way is that of a device; the loss, which the user reads, is left out."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1)).to("meta")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    spec = "nog+ow+olr" if options else "nog+ow+sn+olr+ol"
    treatment = treat(model, optimizer, spec, layers=["0"], options=options)
    x = batches(1)[0][0].to("meta")
    for _ in range(3):
        with kernels.Operations() as counted:
            optimizer.zero_grad()
            (model(x).sum() + treatment.loss()).backward()
            optimizer.step()
    assert len(counted.names) > 50
    assert not kernels.READS & set(counted.names)
