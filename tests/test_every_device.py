"""Functions, layers, treatments and monitor on every device that there is, against the CPU in double precision.

On the CPU that is little; it shows that these tests are right where no other device is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import wellcond.linalg as wl
from function_table import FUNCTIONS, SPECTRA
from helpers import eps_of, relative_error
from wellcond.monitor import ConditionMonitor
from wellcond.nn import (
    DecorrelatedBatchNorm2d,
    GlobalCovariancePool2d,
    IterNorm2d,
    SkewOrthogonalConv2d,
    SpectralLayer,
    SubspaceLayer,
    TokenCovariancePool,
    WhiteningColoring,
    fold,
    replace_batchnorm,
)
from wellcond.orthogonality import convolution_singular_values, treat

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
EVERY_DEVICE = pytest.mark.parametrize("device", DEVICES)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def close(found: Tensor, truth: Tensor, device: str, times: float = 1.0) -> bool:
    """Whether it is where it should be, and equal up to rounding: 1e4 ε for matrices of condition up to 1e2 and the
    steps of a solver, ``times`` more behind a convolution, which cuDNN may take in TF32."""
    assert found.device.type == device
    return relative_error(found.cpu(), truth) < times * 1e4 * eps_of(found.dtype)


# -- functions ----------------------------------------------------------------------------------------------------


@EVERY_DEVICE
@DTYPES
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_and_its_gradient(name: str, dtype: torch.dtype, device: str) -> None:
    case = FUNCTIONS[name]

    def of(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.requires_grad_()
        y = case.f(x)
        y = torch.stack(y) if isinstance(y, tuple) else y
        weights = torch.linspace(-1.0, 2.0, y.numel(), dtype=torch.float64).cos().view(y.shape)
        (gradient,) = torch.autograd.grad((weights.to(y) * y).sum(), x)
        return y.detach(), gradient

    x = case.make(SPECTRA["distinct"], dtype, (3,))
    (value, gradient), (true_value, true_gradient) = of(x.to(device)), of(x.double())
    assert close(value, true_value, device)
    assert close(gradient, true_gradient, device, times=10.0)


@EVERY_DEVICE
@pytest.mark.parametrize("solver", wl.SOLVERS)
def test_every_solver(solver: str, device: str) -> None:
    x = FUNCTIONS["sqrtm"].make((2.0, 1.4, 0.8, 0.5), torch.float64, (5,))
    root = wl.sqrtm(x.to(device), solver=solver)
    assert root.device.type == device
    assert relative_error((root @ root).cpu(), x) < 1e-2


@EVERY_DEVICE
def test_a_bad_matrix_spares_the_others(device: str) -> None:
    x = FUNCTIONS["sqrtm"].make((2.0, 1.4, 0.8, 0.5), torch.float64, (5,)).to(device)
    x[3, 0, 0] = float("nan")
    found = wl.sqrtm_ex(x)
    good = [0, 1, 2, 4]
    assert torch.allclose((found.root @ found.root)[good], x[good])


# -- layers -------------------------------------------------------------------------------------------------------

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "norm": lambda: DecorrelatedBatchNorm2d(6),
    "norm, groups": lambda: DecorrelatedBatchNorm2d(6, groups=2),
    "norm, cholesky": lambda: DecorrelatedBatchNorm2d(6, method="cholesky"),
    "norm, minimax": lambda: DecorrelatedBatchNorm2d(6, solver="minimax"),
    "iterative norm": lambda: IterNorm2d(6),
    "head": lambda: GlobalCovariancePool2d(6, eps=1e-3),
    "head, isometric": lambda: GlobalCovariancePool2d(6, reduction=4, function="log", eps=0.1, isometric=True),
    "head, newton_schulz": lambda: GlobalCovariancePool2d(6, eps=1e-3, solver="newton_schulz"),
    "tokens": lambda: nn.Sequential(nn.Flatten(2), TokenCovariancePool(25, reduction=4, eps=1e-3)),
    "spectral": lambda: nn.Sequential(nn.Flatten(2), SpectralLayer("power", exponent=0.3, eps=0.1)),
    "convolution": lambda: SkewOrthogonalConv2d(6, 6),
    "subspace": lambda: nn.Sequential(nn.Flatten(), SubspaceLayer(150, 170)),
}


def trained(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Two forward passes and one backward pass in training, and one forward pass in evaluation."""
    layer.train()
    x = x.clone().requires_grad_()
    layer(x)
    y = layer(x)
    weights = torch.linspace(-1.0, 2.0, y.numel(), dtype=torch.float64).cos().view(y.shape)
    (weights.to(y) * y).sum().backward()
    found = {f"gradient of {name}": p.grad for name, p in layer.named_parameters() if p.grad is not None}
    found |= {name: b for name, b in layer.named_buffers() if b.is_floating_point()}
    with torch.no_grad():
        return found | {"output": y.detach(), "gradient": x.grad, "evaluated": layer.eval()(x)}


@EVERY_DEVICE
@DTYPES
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer(name: str, dtype: torch.dtype, device: str) -> None:
    layer = LAYERS[name]().to(dtype)
    x = torch.randn(12, 6, 5, 5, dtype=dtype)
    truth = trained(copy.deepcopy(layer).double(), x.double())
    found = trained(layer.to(device), x.to(device))
    assert found.keys() == truth.keys()
    assert [key for key in truth if not close(found[key], truth[key], device, times=10.0)] == []


@EVERY_DEVICE
def test_whitening_and_coloring(device: str) -> None:
    content, style = torch.randn(2, 4, 9, 9), torch.randn(2, 4, 7, 7) * 3
    layer = WhiteningColoring(1e-3)
    assert close(layer(content.to(device), style.to(device)), layer(content.double(), style.double()), device)


@EVERY_DEVICE
def test_a_state_goes_from_device_to_device(device: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), DecorrelatedBatchNorm2d(6), GlobalCovariancePool2d(6, eps=1e-3)).to(
        device
    )
    x = torch.randn(8, 3, 9, 9)
    model(x.to(device))
    here = nn.Sequential(nn.Conv2d(3, 6, 3), DecorrelatedBatchNorm2d(6), GlobalCovariancePool2d(6, eps=1e-3))
    here.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = model.eval()(x.to(device))  # of a convolution that cuDNN may take in TF32, hence 1e-3
        torch.testing.assert_close(here.eval()(x), expected.cpu(), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(model.cpu()(x), expected.cpu(), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(fold(model.to(device))(x.to(device)), expected, rtol=1e-3, atol=1e-3)


@EVERY_DEVICE
def test_autocast(device: str) -> None:
    """The covariance is not formed in half precision."""
    norm, x = DecorrelatedBatchNorm2d(6).to(device), torch.randn(16, 6, 5, 5, device=device).bfloat16()
    with torch.autocast(device, torch.bfloat16):
        mixed = norm(x)
    torch.testing.assert_close(mixed.float(), DecorrelatedBatchNorm2d(6).to(device)(x.float()), rtol=1e-2, atol=1e-2)


# -- treatments and monitor ---------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    replace_batchnorm(net)
    return net


def batches() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(16, 3, 7, 7, generator=generator) for _ in range(4))


@EVERY_DEVICE
@pytest.mark.parametrize("names", ["nog", "olr", "ol", "sn", "ow", "nog+ow+olr"])
@pytest.mark.parametrize("moved", [False, True], ids=["made there", "moved there"])
def test_a_treated_training(names: str, moved: bool, device: str) -> None:
    """Also of a model that is moved after it was treated, as the counters of the treatment are not."""
    found: dict[str, list[Tensor]] = {}
    for place in dict.fromkeys(("cpu", device)):
        net = network().double()
        net = net if moved else net.to(place)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        treatment = treat(net, optimizer, names)
        net.to(place)
        with ConditionMonitor(net, every=2, optimizer=optimizer) as monitor:
            for batch in batches():
                optimizer.zero_grad()
                x = batch.double().to(place)
                loss = (net(x) * torch.linspace(-1, 1, 8, dtype=x.dtype, device=x.device)).square().sum()
                (loss + treatment.loss()).backward()
                optimizer.step()
        assert [record.step for record in monitor.records] == [0, 2]
        if "nog" in names:
            assert treatment.nog.counts()["0"]["treated"] == 4
        if "olr" in names:
            assert treatment.olr.counts()["0"]["shortened"] <= 4
        found[place] = [net[0].weight.detach(), torch.tensor([r.kappa for r in monitor.records])]
    weight, kappa = found[device]
    assert close(weight, found["cpu"][0], device, times=1e4)  # nog divides by the least singular values of gradients
    torch.testing.assert_close(kappa, found["cpu"][1], rtol=1e-6, atol=0.0)


@EVERY_DEVICE
def test_singular_values_of_a_convolution(device: str) -> None:
    layer = nn.Conv2d(3, 5, 3, padding=1)
    truth = convolution_singular_values(layer.double(), 8).sort().values
    assert close(convolution_singular_values(layer.to(device), 8).sort().values, truth, device)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("name", ["norm, minimax", "iterative norm", "head, newton_schulz"])
def test_a_layer_of_products_does_not_wait_for_the_device(name: str) -> None:
    layer = LAYERS[name]().to("cuda")
    x = torch.randn(12, 6, 5, 5, device="cuda", requires_grad=True)
    with wl.value_checks(False):
        layer(x).sum().backward()
        torch.cuda.set_sync_debug_mode("error")
        try:
            layer(x).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
