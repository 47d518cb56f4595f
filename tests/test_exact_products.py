"""A lower precision of float32 products is the user's for his own, and does not reach spectral work."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from wellcond._shared.exact_products import exact_products, exactly, products_are_rounded
from wellcond._shared.skew_convolution import kernel_of_the_exponential
from wellcond.nn import SkewOrthogonalConv2d
from wellcond.orthogonality import OrthogonalLoss, orthogonal_weight, spectral_norm, treat

PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "addbmm", "dot", "mv"}
CONVOLUTIONS = {"convolution", "convolution_backward", "mkldnn_convolution"}


@pytest.fixture(params=["high", "medium"])
def rounded(request):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


class Precisions(TorchDispatchMode):
    """The setting at every product of float32 matrices."""

    def __init__(self, kinds=PRODUCTS):
        super().__init__()
        self.kinds, self.seen = kinds, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.removeprefix("aten::") in self.kinds and args[0].dtype == torch.float32:
            tf32 = torch.backends.cudnn.allow_tf32 if self.kinds is CONVOLUTIONS else products_are_rounded()
            self.seen.append(tf32)
        return func(*args, **(kwargs or {}))


def weight_of(layer):
    return lambda: layer.weight


CASES = {
    **{m: lambda m=m: weight_of(orthogonal_weight(nn.Linear(6, 9), map=m)) for m in ("exp", "cayley", "householder")},
    "sn": lambda: weight_of(spectral_norm(nn.Conv2d(6, 4, 3, groups=2))),
    "soc": lambda: SkewOrthogonalConv2d(3, 4).kernel,
    "ol": lambda: OrthogonalLoss(nn.Linear(6, 9)),
    "srip": lambda: OrthogonalLoss(nn.Linear(6, 9), form="srip"),
}


@pytest.mark.parametrize("case", CASES)
def test_forward_and_backward_are_exact_and_the_users_products_are_as_he_said(case, rounded):
    function = CASES[case]()
    with Precisions() as inside:
        value = function()
        value.square().sum().backward()
    assert inside.seen and not any(inside.seen)
    with Precisions() as outside:
        torch.ones(2, 2) @ torch.ones(2, 2)
    assert outside.seen == [True] and torch.get_float32_matmul_precision() == rounded


def test_the_products_that_follow_the_layer_are_the_users(rounded):
    layer = orthogonal_weight(nn.Linear(6, 9, bias=False))
    with Precisions() as seen:
        layer(torch.randn(2, 6)).sum().backward()
    assert seen.seen[0] is False and seen.seen.count(True) >= 2  # of the input, and of its gradient


def test_the_polar_factor_of_a_step_is_exact(rounded):
    layer = nn.Linear(70, 80)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    treat(layer, optimizer, "nog+olr", layers=[layer], options={"nog": {"solver": "minimax"}})
    layer(torch.randn(2, 70)).sum().backward()
    with Precisions() as seen:
        optimizer.step()
    assert len(seen.seen) > 30 and not any(seen.seen)


def test_the_kernel_of_the_exponential_is_exact_in_its_convolutions_too():
    L = SkewOrthogonalConv2d(3, 3).kernel().detach()
    before = torch.backends.cudnn.allow_tf32
    with Precisions(CONVOLUTIONS) as seen:
        kernel_of_the_exponential(L, in_channels=3, out_channels=3, stride=1, terms=3)
    assert seen.seen == [False] * 3 and torch.backends.cudnn.allow_tf32 is before


@pytest.mark.parametrize("case", ["exp", "sn"])
def test_values_and_derivatives_are_those_of_the_full_setting(case):
    torch.manual_seed(0)
    layer = orthogonal_weight(nn.Linear(5, 7)) if case == "exp" else spectral_norm(nn.Linear(5, 7))
    stored = layer.parametrizations.weight.original

    def derivatives():
        value = layer.weight
        (first,) = torch.autograd.grad(value.pow(3).sum(), stored, create_graph=True)
        return value, first, *torch.autograd.grad(first.square().sum(), stored)

    expected = derivatives()
    torch.set_float32_matmul_precision("high")
    try:
        got = derivatives()
    finally:
        torch.set_float32_matmul_precision("highest")
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_backward_pass_that_is_gone_through_twice_and_inputs_without_gradient(rounded):
    x, y = torch.randn(3, 3, requires_grad=True), torch.randn(3, 3)
    z = exactly(lambda a, b: a @ b, x, y)
    (first,) = torch.autograd.grad(z.sum(), x, retain_graph=True)
    (second,) = torch.autograd.grad(z.sum(), x)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, torch.ones(3, 3) @ y.T)
    assert not exactly(lambda a, b: a @ b, x.detach(), y).requires_grad


def test_compiled_and_functional_code_is_in_double_precision(rounded):
    layer = orthogonal_weight(nn.Linear(5, 9))
    parametrisation, stored = layer.parametrizations.weight[0], layer.parametrizations.weight.original.detach()
    with Precisions() as seen:
        mapped = torch.func.vmap(parametrisation)(stored[None])[0]
    assert not any(seen.seen)
    torch.testing.assert_close(mapped, layer.weight.detach(), rtol=1e-5, atol=1e-6)
    compiled = torch.compile(lambda s: parametrisation(s), fullgraph=True, backend="aot_eager")(stored)
    torch.testing.assert_close(compiled, layer.weight.detach(), rtol=1e-5, atol=1e-6)


def test_an_error_inside_and_several_threads_leave_the_setting(rounded):
    with pytest.raises(KeyError), exact_products(convolutions=True):
        raise KeyError
    assert products_are_rounded()
    inside, leave = threading.Barrier(2, timeout=10), threading.Event()
    found = []

    def first():
        with exact_products():
            inside.wait()
            leave.wait(10)

    thread = threading.Thread(target=first)
    thread.start()
    with exact_products():
        inside.wait()
        leave.set()
        thread.join()
        found.append(products_are_rounded())  # the other has left already
    assert found == [False] and products_are_rounded()


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="names of torch 2.9")
def test_the_newer_names_of_the_setting_are_known():
    backend = torch.backends.cuda.matmul
    before = backend.fp32_precision
    backend.fp32_precision = "tf32"
    try:
        assert products_are_rounded()
        with exact_products():
            assert backend.fp32_precision == "ieee"
        assert backend.fp32_precision == "tf32"
    finally:
        backend.fp32_precision = before
