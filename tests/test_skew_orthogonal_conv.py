"""The skew-orthogonal convolution: an orthogonal Jacobian, and bounds that hold."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

from helpers import eps_of
from wellcond._shared.operator_norm import _composed, skew_convolution_norm_bound, spectral_norm_bound
from wellcond._shared.skew_convolution import truncation_error
from wellcond.nn import DecorrelatedBatchNorm2d, SkewOrthogonalConv2d
from wellcond.orthogonality import pre_spectral_layers

CASES = [
    {"in_channels": 3, "out_channels": 3},
    {"in_channels": 3, "out_channels": 3, "padding_mode": "circular"},
    {"in_channels": 2, "out_channels": 5},
    {"in_channels": 5, "out_channels": 2, "kernel_size": (1, 3)},
    {"in_channels": 3, "out_channels": 3, "kernel_size": 5, "padding": 2},
    {"in_channels": 2, "out_channels": 3, "stride": 2},
    {"in_channels": 1, "out_channels": 6, "stride": 2, "padding_mode": "circular"},
]


def jacobian(function, shape, dtype):
    """Full matrix (outputs, inputs) of a function of one image."""
    x = torch.randn(shape, dtype=dtype)
    J = torch.func.jacrev(lambda x: function(x[None])[0])(x)
    return J.reshape(-1, x.numel())


def distance_from_orthogonal(J):
    gram = J @ J.T if J.shape[0] <= J.shape[1] else J.T @ J
    return torch.linalg.matrix_norm(gram - torch.eye(len(gram), dtype=J.dtype), 2).item()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.float64, 1e-12)])
@pytest.mark.parametrize("options", CASES, ids=str)
def test_the_jacobian_is_orthogonal_in_evaluation(options, dtype, bound):
    conv = SkewOrthogonalConv2d(**options, dtype=dtype).eval()
    J = jacobian(conv, (options["in_channels"], 6, 4), dtype)
    stride = options.get("stride", 1)
    assert J.shape == (options["out_channels"] * 24 // stride**2, options["in_channels"] * 24)
    assert distance_from_orthogonal(J) < bound


@pytest.mark.parametrize("terms", [2, 5])
@pytest.mark.parametrize("options", CASES, ids=str)
def test_in_training_the_singular_values_are_off_by_no_more_than_the_bound(options, terms):
    conv = SkewOrthogonalConv2d(**options, dtype=torch.float64, terms=terms, max_norm=1.2)
    J = jacobian(conv, (options["in_channels"], 6, 4), torch.float64)
    assert (torch.linalg.svdvals(J) - 1).abs().max() <= truncation_error(1.2, terms) + 1e-12


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_it_is_the_exponential_of_a_skew_symmetric_matrix(padding_mode):
    conv = SkewOrthogonalConv2d(3, 3, dtype=torch.float64, padding_mode=padding_mode, bias=False).eval()

    def generator(x):
        padded = F.pad(x, (1, 1, 1, 1), mode="constant" if padding_mode == "zeros" else "circular")
        return F.conv2d(padded, conv.kernel())

    A = jacobian(generator, (3, 5, 4), torch.float64)
    torch.testing.assert_close(A, -A.T, rtol=0, atol=1e-15)
    expected = torch.linalg.matrix_exp(A)
    torch.testing.assert_close(jacobian(conv, (3, 5, 4), torch.float64), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 3), (1, 7)])
def test_the_four_way_bound_holds_at_every_frequency(kernel, scale):
    """The norm of the convolution on the plane is the largest one of its Fourier transform, on a fine grid here."""
    M = scale * torch.randn(4, 4, *kernel, dtype=torch.float64)
    L = M - M.transpose(0, 1).flip(-1, -2)
    largest = torch.linalg.matrix_norm(torch.fft.fft2(L, s=(64, 64)).permute(2, 3, 0, 1), 2).max()
    bound = skew_convolution_norm_bound(L)
    assert largest <= bound <= (kernel[0] * kernel[1]) ** 0.5 * 1.1 * largest
    four = [
        L.reshape(4, -1),
        L.permute(0, 2, 3, 1).reshape(-1, 4),
        L.permute(0, 2, 1, 3).reshape(4 * kernel[0], -1),
        L.permute(0, 3, 1, 2).reshape(4 * kernel[1], -1),
    ]
    smallest = min(torch.linalg.matrix_norm(A, 2) for A in four) * (kernel[0] * kernel[1]) ** 0.5
    # The Schatten norm of order 64 is above the spectral one by at most rank^{1/64}.
    assert smallest * (1 - 1e-12) <= bound <= smallest * (4 * max(kernel)) ** (1 / 64) * (1 + 1e-12)


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
@pytest.mark.parametrize("shape", [(6, 6), (3, 20), (20, 3)])
def test_the_matrix_bound_holds_at_any_scale(shape, scale):
    A = torch.randn(shape) * scale
    largest = torch.linalg.svdvals(A.double()).amax()
    assert largest * (1 - 1e-5) <= spectral_norm_bound(A) <= largest * min(shape) ** (1 / 64) * (1 + 1e-5)


def test_the_bound_of_a_zero_matrix_is_zero_with_a_finite_gradient():
    A = torch.zeros(3, 4, requires_grad=True)
    bound = spectral_norm_bound(A)
    bound.backward()
    assert bound == 0
    assert A.grad.isfinite().all()


@pytest.mark.parametrize("factor", [0.3, 30.0], ids=["inside the bound", "scaled down"])
@pytest.mark.parametrize("options", [CASES[0], CASES[3], CASES[6]], ids=str)
def test_gradients_match_finite_differences(options, factor):
    conv = SkewOrthogonalConv2d(**options, dtype=torch.float64)
    weight = (factor * conv.weight.detach()).requires_grad_()
    bias = torch.randn(options["out_channels"], dtype=torch.float64, requires_grad=True)
    x = torch.randn(1, options["in_channels"], 4, 4, dtype=torch.float64, requires_grad=True)
    run = lambda x, weight, bias: torch.func.functional_call(conv, {"weight": weight, "bias": bias}, (x,))  # noqa: E731
    assert torch.autograd.gradcheck(run, (x, weight, bias), fast_mode=True)


def test_a_large_weight_is_scaled_down_to_the_bound_and_a_small_one_is_left():
    conv = SkewOrthogonalConv2d(3, 3, dtype=torch.float64, max_norm=1.0)
    with torch.no_grad():
        conv.weight.mul_(100)
    assert skew_convolution_norm_bound(conv.kernel()).item() == pytest.approx(1.0, rel=1e-12)
    with torch.no_grad():
        conv.weight.mul_(1e-3)
    expected = conv.weight - conv.weight.transpose(0, 1).flip(-1, -2)
    torch.testing.assert_close(conv.kernel(), expected)


def test_norms_of_features_and_gradients_are_kept_through_many_layers():
    layers = [SkewOrthogonalConv2d(8, 8, 3, bias=False) for _ in range(20)]
    layers += [SkewOrthogonalConv2d(8, 32, 3, stride=2, bias=False)]
    model = nn.Sequential(*layers).eval()
    x = torch.randn(4, 8, 8, 8, requires_grad=True)
    y = model(x)
    torch.testing.assert_close(y.flatten(1).norm(dim=1), x.flatten(1).norm(dim=1), rtol=21 * 1e-6, atol=0)
    g = torch.randn_like(y)
    (back,) = torch.autograd.grad(y, x, g)
    torch.testing.assert_close(back.flatten(1).norm(dim=1), g.flatten(1).norm(dim=1), rtol=21 * 1e-6, atol=0)


def test_training_moves_the_weight_and_keeps_the_jacobian_orthogonal():
    conv = SkewOrthogonalConv2d(3, 3)
    optimizer = torch.optim.SGD(conv.parameters(), lr=1.0)
    x, target = torch.randn(8, 3, 6, 6), torch.randn(8, 3, 6, 6)
    losses = []
    for _ in range(20):
        loss = F.mse_loss(conv(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert distance_from_orthogonal(jacobian(conv.eval(), (3, 5, 5), torch.float32)) < 1e-4


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_follows_a_weight_that_changes_under_it(mode):
    conv, other = SkewOrthogonalConv2d(3, 3).eval(), SkewOrthogonalConv2d(3, 3).eval()
    x = torch.randn(1, 3, 4, 4)
    for change in (
        lambda: conv.load_state_dict(other.state_dict()),
        lambda: torch.optim.SGD(conv.parameters(), lr=0.1).step(),
        lambda: setattr(conv, "weight", nn.Parameter(torch.randn_like(conv.weight))),
        lambda: conv.weight.data.mul_(0.5),
        lambda: conv.weight.detach().numpy().__imul__(3.0),
        lambda: setattr(conv, "max_norm", 0.5),
    ):
        with mode():
            conv(x)
            copy.deepcopy(conv)(x)
        conv(x).sum().backward()
        change()
        expected = conv(x)  # with gradients, nothing is kept
        with mode():
            torch.testing.assert_close(conv(x), expected.detach(), rtol=0, atol=0)
            torch.testing.assert_close(conv(x), expected.detach(), rtol=0, atol=0)


def test_evaluation_with_a_kept_kernel_has_the_tangents_of_a_frozen_weight():
    conv = SkewOrthogonalConv2d(2, 2, dtype=torch.float64).eval().requires_grad_(False)
    conv.weight.mul_(2)  # above the bound: at it, where a weight starts, the scaling has a kink
    x, weight = torch.randn(1, 2, 5, 5, dtype=torch.float64), conv.weight.clone()
    direction = torch.randn_like(weight)

    def output(weight):
        return torch.func.functional_call(conv, {"weight": weight}, (x,))

    conv(x)  # keeps the kernel
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(output(forward_ad.make_dual(weight, direction))).tangent
    h = 1e-6
    difference = (output(weight + h * direction) - output(weight - h * direction)) / (2 * h)
    assert (tangent - difference).abs().max() < 1e-7 * difference.abs().max()  # h², and rounding over h


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype):
    conv = SkewOrthogonalConv2d(4, 4).eval()
    x = torch.randn(2, 4, 6, 6)
    expected = conv(x)
    with torch.autocast("cpu", dtype):
        inside = conv(x)
    outside = SkewOrthogonalConv2d(4, 4, dtype=dtype).eval()
    outside.load_state_dict(conv.state_dict())
    for y in (inside.float(), outside(x.to(dtype)).float()):
        # A dozen convolutions of orthogonal size, each rounded to half precision.
        assert (y - expected).abs().max() <= 12 * eps_of(dtype) * expected.abs().max()


def test_it_is_made_on_the_device_and_in_the_dtype_asked_for():
    conv = SkewOrthogonalConv2d(2, 3, device="meta", dtype=torch.float64)
    assert conv.weight.is_meta and conv.weight.dtype == conv.bias.dtype == torch.float64
    conv.to_empty(device="cpu").reset_parameters()
    assert distance_from_orthogonal(jacobian(conv.eval(), (2, 4, 4), torch.float64)) < 1e-12


def test_it_is_a_layer_that_can_stand_before_a_spectral_layer():
    model = nn.Sequential(SkewOrthogonalConv2d(3, 6), DecorrelatedBatchNorm2d(6))
    assert list(pre_spectral_layers(model)) == ["0"]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((4, 4, 2), {}, "kernel_size must be odd"),
        ((4, 4, (3, 4)), {}, "kernel_size must be odd"),
        ((4, 4, 3, 1, 0), {}, r"padding must be 'same', which is \(1, 1\) here, got 0"),
        ((4, 4), {"padding": "valid"}, "padding must be 'same'"),
        ((4, 4), {"padding_mode": "reflect"}, "unknown padding_mode 'reflect'"),
        ((4, 0), {}, "must be positive"),
        ((4, 4), {"max_norm": 0.0}, "must be positive"),
    ],
)
def test_a_form_that_is_not_skew_symmetric_is_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        SkewOrthogonalConv2d(*arguments, **options)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4, 6, 6), r"expected 4D input \(got 3D input\)"),
        ((1, 3, 6, 6), r"expected input with 4 channels \(got 3 channels\)"),
        ((1, 4, 6, 5), r"divisible by stride=2 \(got \(6, 5\)\)"),
    ],
)
def test_input_of_the_wrong_form_is_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        SkewOrthogonalConv2d(4, 4, stride=2)(torch.randn(shape))


@pytest.mark.parametrize("shape", [(4, 4), (3, 7), (7, 3)])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_the_derivatives_of_the_bound_are_those_of_the_formula(shape, scale):
    A = (scale * torch.randn(shape, dtype=torch.float64)).requires_grad_()

    def derivatives(function):
        bound = function(A)
        (first,) = torch.autograd.grad(bound, A, create_graph=True)
        (second,) = torch.autograd.grad((first * torch.ones(shape, dtype=torch.float64)).sum(), A)
        return bound / scale, first, second * scale

    for own, truth in zip(derivatives(spectral_norm_bound), derivatives(_composed), strict=True):
        torch.testing.assert_close(own, truth, rtol=1e-10, atol=1e-13)
    if scale == 1.0:
        assert torch.autograd.gradcheck(spectral_norm_bound, A)
