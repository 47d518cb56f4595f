"""The singular values of a convolution, against the dense matrix of the real one and against power iteration."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from treatment_models import batches, small_net, train
from wellcond.orthogonality import convolution_singular_values, orthogonal_weight, spectral_norm, treat

EPS = torch.finfo(torch.float32).eps
CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def circular(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer with circular padding to size/stride, written with PyTorch's own convolution."""
    extent = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    while any(extent):  # F.pad wraps round at most once
        step = [min(e, n) for e, n in zip(extent, x.shape[2:], strict=True)]
        x = F.pad(x, [p for e in reversed(step) for p in (0, e)], mode="circular")
        extent = [e - s for e, s in zip(extent, step, strict=True)]
    convolve = CONVOLVE[len(layer.kernel_size)]
    return convolve(x, layer.weight, None, layer.stride, 0, layer.dilation, layer.groups)


def adjoint_of(layer: nn.Module) -> nn.Module:
    """The convolution of which a transposed convolution is the adjoint."""
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(layer.kernel_size)]
    conv = kind(
        layer.out_channels, layer.in_channels, layer.kernel_size, layer.stride,
        dilation=layer.dilation, groups=layer.groups, bias=False,
    )  # fmt: skip
    conv.weight = layer.weight
    return conv.to(layer.weight.dtype)


def dense(layer: nn.Module, size: tuple[int, ...]) -> np.ndarray:
    """The matrix of the circular convolution, from the images of all unit vectors."""
    count = layer.in_channels * int(np.prod(size))
    basis = torch.eye(count, dtype=layer.weight.dtype).reshape(count, layer.in_channels, *size)
    return circular(layer, basis).flatten(1).T.detach().numpy()


CASES = {
    "1d": (lambda: nn.Conv1d(3, 5, 3), (7,)),
    "2d": (lambda: nn.Conv2d(2, 3, 3), (5, 4)),
    "3d": (lambda: nn.Conv3d(2, 2, (1, 2, 3)), (2, 3, 4)),
    "even kernel": (lambda: nn.Conv2d(3, 2, 2), (4, 6)),
    "1 x 1": (lambda: nn.Conv2d(3, 2, 1), (3, 3)),
    "kernel as large as the grid": (lambda: nn.Conv2d(1, 2, 3), (3, 3)),
    "kernel beyond the grid": (lambda: nn.Conv1d(2, 2, 5), (3,)),
    "grid of one point": (lambda: nn.Conv2d(3, 4, 1), (1, 1)),
    "dilated": (lambda: nn.Conv2d(2, 3, 3, dilation=2), (6, 5)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 4)),
    "depthwise": (lambda: nn.Conv2d(3, 3, 3, groups=3), (4, 5)),
    "strided": (lambda: nn.Conv2d(2, 5, 3, stride=2), (6, 4)),
    "strides": (lambda: nn.Conv2d(2, 3, 3, stride=(1, 3)), (4, 6)),
    "all of it": (lambda: nn.Conv2d(4, 2, 3, stride=2, dilation=(1, 3), groups=2), (4, 8)),
}


@pytest.mark.parametrize("case", CASES)
def test_they_are_those_of_the_dense_matrix(case):
    make, size = CASES[case]
    torch.manual_seed(0)
    layer = make().double()
    found = convolution_singular_values(layer, size)
    expected = np.linalg.svd(dense(layer, size), compute_uv=False)
    # float64: eps times the norm times the size of the matrix, for either way of computing it.
    assert found.shape == expected.shape
    assert np.abs(found.detach().numpy() - expected).max() <= 1e-12 * expected[0]


@pytest.mark.parametrize("stride", [1, 2])
def test_a_transposed_convolution_has_those_of_the_convolution_it_turns_round(stride):
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(4, 6, 3, stride, groups=2).double()
    found = convolution_singular_values(layer, (3, 4))
    expected = np.linalg.svd(dense(adjoint_of(layer), (3 * stride, 4 * stride)), compute_uv=False)
    assert found.shape == expected.shape
    assert np.abs(found.detach().numpy() - expected).max() <= 1e-12 * expected[0]


@pytest.mark.parametrize("stride", [1, 2])
def test_the_largest_agrees_with_power_iteration_on_the_real_convolution(stride):
    """A layer and an image of usual size, float32: forward and adjoint by PyTorch's own convolution."""
    torch.manual_seed(0)
    layer = nn.Conv2d(16, 32, 3, stride)
    x = torch.randn(1, 16, 32, 32)
    for _ in range(1000):
        x = (x / x.norm()).requires_grad_()
        y = circular(layer, x)
        (x,) = torch.autograd.grad(y, x, y.detach())
    estimate = y.norm().item()
    assert convolution_singular_values(layer, 32)[0].item() == pytest.approx(estimate, rel=1e-3)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), channels=st.tuples(st.integers(1, 4), st.integers(1, 4)), n=st.integers(3, 6))
def test_the_squares_add_up_and_the_flattened_weight_bounds_them(seed, channels, n):
    """‖map‖_F² = n²‖W‖_F², and tap ≤ ‖map‖ ≤ k σ_max(W) for a k × k kernel: every pixel is read k² times."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(*channels, 3, 3, generator=generator, dtype=torch.float64)
    sigma = convolution_singular_values(weight, n)
    assert sigma.square().sum().item() == pytest.approx(n * n * weight.square().sum().item(), rel=1e-12)
    flat = torch.linalg.matrix_norm(weight.flatten(1), 2).item()
    taps = torch.linalg.matrix_norm(weight.permute(2, 3, 0, 1), 2)
    assert taps.max() <= sigma[0] * (1 + 1e-12)
    assert sigma[0] <= 3 * flat * (1 + 1e-12)


def test_zero_padding_is_a_part_of_a_larger_circular_convolution():
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 3, padding=1, bias=False).double()
    basis = torch.eye(72, dtype=torch.float64).reshape(72, 2, 6, 6)
    norm = torch.linalg.matrix_norm(layer(basis).flatten(1), 2)
    assert norm <= convolution_singular_values(layer, 6 + 3 - 1)[0]
    assert norm >= 0.9 * convolution_singular_values(layer, 6)[0]


def test_gradients_are_exact():
    weight = torch.randn(2, 3, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda w: convolution_singular_values(w, (4, 3))[::5], weight.requires_grad_())


def test_it_is_of_the_weight_in_use_and_half_precision_is_computed_in_float32():
    layer = nn.Conv2d(3, 8, 3)
    orthogonal_weight(layer)
    in_use = convolution_singular_values(layer.weight.detach(), 8)
    assert torch.allclose(convolution_singular_values(layer, 8), in_use, rtol=0, atol=20 * EPS)
    half = nn.Conv2d(3, 8, 3).to(torch.bfloat16)
    values = convolution_singular_values(half, 8)
    assert values.dtype == torch.float32
    assert torch.allclose(values, convolution_singular_values(copy.deepcopy(half).float(), 8), rtol=0, atol=20 * EPS)


@pytest.mark.parametrize(
    ("layer", "size", "message"),
    [
        (nn.Linear(3, 3), 8, r"layer '' \(Linear\) is not a convolution"),
        (nn.Conv2d(3, 3, 3), (8,), r"2 positive integer\(s\).*got \(8,\)"),
        (nn.Conv2d(3, 3, 3), 0, "positive integer"),
        (nn.Conv2d(3, 3, 3, stride=2), (8, 7), r"\(8, 7\) of layer '' \(Conv2d\) is not a multiple of its stride"),
        (torch.zeros(3, 3), 8, r"shape \(3, 3\).*\(out, in, \*kernel\)"),
        (torch.zeros(3, 3, 3, dtype=torch.int64), 8, "real, is needed"),
    ],
)
def test_bad_input_is_refused(layer, size, message):
    with pytest.raises(ValueError, match=message):
        convolution_singular_values(layer, size)


def test_other_things_are_refused():
    with pytest.raises(TypeError, match="expected a convolution or its weight, got list"):
        convolution_singular_values([1.0], 8)


# The spectral norm of the map ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_divided_by_the_operator_norm_the_real_convolution_has_norm_1(case):
    make, size = CASES[case]
    torch.manual_seed(0)
    layer = make()
    parameter, before = layer.weight, layer.weight.detach().clone()
    spectral_norm(layer, of="operator", input_size=size)
    assert layer.parametrizations.weight.original is parameter
    assert torch.equal(parameter, before)
    norm = np.linalg.norm(dense(layer, size).astype(np.float64), 2)
    # The eigenvalue of the Gram matrix is known to eps·(its size), relative to itself.
    assert norm == pytest.approx(1, rel=50 * EPS)


def test_its_gradient_is_exact():
    layer = spectral_norm(nn.Conv2d(2, 3, 3, bias=False).double(), of="operator", input_size=5)

    def value(weight: Tensor) -> Tensor:
        return torch.func.functional_call(layer.parametrizations.weight, {"original": weight}, ())

    weight = torch.randn(3, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(value, weight.requires_grad_())


def test_a_zero_weight_stays_zero_and_has_a_finite_gradient():
    layer = nn.Conv2d(2, 3, 3)
    layer.weight.data.zero_()
    spectral_norm(layer, of="operator", input_size=4)
    assert torch.equal(layer.weight, torch.zeros(3, 2, 3, 3))


@pytest.mark.parametrize(
    ("layer", "options", "message"),
    [
        (lambda: nn.Conv2d(2, 2, 3), {"of": "operator"}, r"layer '' \(Conv2d\).*needs input_size"),
        (lambda: nn.Conv2d(2, 2, 3), {"input_size": 8}, "input_size is for of='operator'"),
        (lambda: nn.Linear(2, 2), {"of": "operator", "input_size": 8}, r"layer '' \(Linear\) is not a convolution"),
        (lambda: nn.Conv2d(2, 2, 3), {"of": "wieght"}, "did you mean 'weight'"),
    ],
)
def test_bad_options_of_the_spectral_norm_are_refused(layer, options, message):
    layer = layer()
    with pytest.raises(ValueError, match=message):
        spectral_norm(layer, **options)
    assert not torch.nn.utils.parametrize.is_parametrized(layer)


def test_treat_takes_it_as_an_option():
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    treatment = treat(model, optimizer, "sn+nog", options={"sn": {"of": "operator", "input_size": 8}})
    assert "sn (of=operator input_size=8)" in treatment.summary()
    train(model, optimizer, batches(2))
    assert np.linalg.norm(dense(model[0], (8, 8)).astype(np.float64), 2) == pytest.approx(1, rel=50 * EPS)
