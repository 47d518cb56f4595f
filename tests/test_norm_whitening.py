"""What decorrelated batch norm gives out, whatever the method, the layout in memory, the dtype and the mean."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from helpers import (
    NORMS,
    channels_first,
    eps_of,
    images_with,
    relative_error,
    unitary,
)
from wellcond.linalg import Minimax, NewtonSchulz, covariance, invsqrtm
from wellcond.nn import (
    DecorrelatedBatchNorm1d,
    DecorrelatedBatchNorm2d,
    IterNorm1d,
    IterNorm2d,
    IterNorm3d,
)
from wellcond.nn._fused_passes import layout

pytestmark = pytest.mark.filterwarnings("ignore:.*values per channel give a covariance of rank:UserWarning")
SPECTRUM = [9.0, 4.0, 2.0, 1.0, 0.5, 0.25]
METHODS = ["zca", "pca", "cholesky"]
LAYOUTS = [(16, 6), (8, 6, 7), (8, 6, 4, 5), (4, 6, 3, 2, 4)]


def batch(shape, dtype=torch.float64, eigvals=SPECTRUM):
    """(N, C, *spatial) of exactly this covariance and a mean of about its deviation."""
    mean = torch.arange(1.0, shape[1] + 1).view(-1, *(1 for _ in shape[2:]))
    return (images_with(eigvals, shape) + mean).to(dtype)


def by_hand(x, layer):
    """The layer in training, from the definition, in float64 by eigendecomposition, a loop over groups."""
    X = channels_first(x).double()
    parts = []
    for rows in (X - X.mean(1, keepdim=True)).chunk(layer.groups):
        P = rows @ rows.T / rows.shape[1]
        P = P + layer.eps * (P.trace() / len(P) if layer.relative else 1.0) * torch.eye(len(P), dtype=P.dtype)
        eigvals, U = torch.linalg.eigh(P)
        if layer.method == "zca":
            W = U @ torch.diag(eigvals.rsqrt()) @ U.T
        elif layer.method == "cholesky":
            W = torch.linalg.inv(torch.linalg.cholesky(P))
        else:
            U = U.flip(-1)
            U = U * U.gather(0, U.abs().argmax(0, keepdim=True)).sign()
            W = torch.diag(eigvals.flip(-1).rsqrt()) @ U.T
        parts.append(W @ rows)
    y = layer.weight.double().unsqueeze(1) * torch.cat(parts) + layer.bias.double().unsqueeze(1)
    return y.view(x.shape[1], x.shape[0], *x.shape[2:]).transpose(0, 1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("shape", LAYOUTS)
def test_every_method_makes_the_output_covariance_the_identity_in_each_group(shape, groups, method):
    eps = 1e-9
    y = NORMS[len(shape)](6, groups=groups, eps=eps, method=method, dtype=torch.float64)(batch(shape))
    assert channels_first(y).mean(1).abs().max() < 1e-12
    for block in channels_first(y).split(6 // groups):
        # W P Wᵀ = I − ε W Wᵀ, and no eigenvalue of P or of its diagonal blocks is below 0.25.
        assert (covariance(block) - torch.eye(6 // groups, dtype=y.dtype)).abs().max() < eps / 0.25 + 1e-12


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_every_method_is_its_definition(method, relative, groups):
    x = batch((8, 6, 4, 5)) * torch.tensor([1.0, 1, 1, 10, 10, 10], dtype=torch.float64).view(-1, 1, 1)
    layer = DecorrelatedBatchNorm2d(6, groups, eps=1e-2, method=method, relative=relative, dtype=torch.float64)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    assert relative_error(layer(x), by_hand(x, layer)) < 1e-12


@pytest.mark.parametrize(
    ("shape", "method", "groups", "relative"),
    [
        *(((9, 4), method, groups, True) for method in METHODS for groups in (1, 2)),
        *((shape, "zca", 1, False) for shape in ((5, 4, 2), (3, 4, 2, 2), (2, 4, 1, 2, 2))),
    ],
)
def test_gradients_of_every_method_match_finite_differences(shape, method, groups, relative):
    layer = NORMS[len(shape)](4, groups=groups, eps=1e-2, method=method, relative=relative, dtype=torch.float64)
    x = batch(shape, eigvals=[4.0, 2.0, 1.0, 0.3] if torch.Size(shape).numel() > 20 else [4.0, 2.0, 1.0, 0.0])
    x.requires_grad_()
    weight, bias = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def run(x, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(run, (x, weight, bias))
    if method != "pca":  # eigenvectors are differentiated once
        assert torch.autograd.gradgradcheck(run, (x, weight, bias))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("running", ["covariance", "whitening"])
def test_evaluation_of_every_method_agrees_with_training_on_a_stationary_batch(method, running):
    if (method, running) == ("pca", "whitening"):
        with pytest.raises(ValueError, match="running='covariance', or method"):
            DecorrelatedBatchNorm2d(6, method=method, running=running)
        return
    x = batch((64, 6, 4, 4))
    layer = DecorrelatedBatchNorm2d(6, momentum=1.0, running=running, method=method, dtype=torch.float64)
    trained = layer(x)
    # The statistics are the batch's, but for n/(n − 1) with n = 1024: half of that in the root.
    torch.testing.assert_close(layer.eval()(x), trained, rtol=1e-3, atol=1e-3)


def test_pca_evaluation_keeps_its_axes_in_order_while_training_batches_swap_them():
    """Two axes of nearly equal variance: each batch orders them by its own, the running covariance by the average."""
    torch.manual_seed(0)
    layer = DecorrelatedBatchNorm1d(2, momentum=None, method="pca", dtype=torch.float64)
    swapped = 0
    for _ in range(40):
        x = torch.randn(200, 2, dtype=torch.float64) * torch.tensor([1.02, 1.0], dtype=torch.float64)
        layer.train()
        y = layer(x)
        swapped += int((y[:, 0] * x[:, 0]).mean().abs() < (y[:, 0] * x[:, 1]).mean().abs())
        layer.eval()
    assert 0 < swapped < 40
    again = layer(x)
    torch.testing.assert_close(layer(x), again, rtol=0, atol=0)
    P = layer.running_cov[0]
    values = torch.linalg.eigvalsh(layer.evaluation_whitening[0] @ P @ layer.evaluation_whitening[0].T)
    assert (values - 1).abs().max() < 1e-4


@pytest.mark.parametrize("c", [1e-6, 1e4])
@pytest.mark.parametrize("method", METHODS)
def test_a_relative_ridge_makes_the_layer_scale_free(c, method):
    x = batch((8, 6, 4, 5), torch.float32)
    y, scaled = (DecorrelatedBatchNorm2d(6, eps=1e-3, relative=True, method=method)(z) for z in (x, c * x))
    # κ = 36: rounding of the scaled copy, amplified by κ; eigenvectors by the gap of 1/9 in units of the largest too.
    assert relative_error(scaled, y) < 36 * 9 * eps_of(torch.float32)


@pytest.mark.parametrize("shape", LAYOUTS)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("layout", ["last", "sliced", "expanded gradient"])
def test_memory_layout_changes_neither_values_nor_gradients_and_channels_last_is_kept(shape, groups, layout):
    x = torch.randn(shape, dtype=torch.float64)
    g = torch.randn(shape, dtype=torch.float64)
    if layout == "expanded gradient":
        g = torch.ones((), dtype=torch.float64).expand(shape)
    layer = NORMS[len(shape)](6, groups=groups, dtype=torch.float64)
    plain = x.clone().requires_grad_()
    other = x.clone()
    if layout == "last":
        other = other.movedim(1, -1).contiguous().movedim(-1, 1)
    elif layout == "sliced":
        other = torch.stack([other, other], -1)[..., 0]
    strides = other.stride()
    other.requires_grad_()
    results = []
    for z in (plain, other):
        y = layer(z)
        results.append((y, *torch.autograd.grad(y, (z, layer.weight, layer.bias), g)))
    for got, want in zip(*reversed(results), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    if layout == "last":
        assert results[1][0].stride() == results[1][1].stride() == strides
        assert layer.eval()(other).stride() == strides


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("ratio", [0.0, 3.0, 1e3])
def test_float32_is_accurate_however_large_the_mean(ratio, last):
    """A batch that is cut into several pieces, against float64 of the same numbers."""
    C, shape = 6, (600, 6, 10, 10)
    mean = ratio * torch.linspace(-1.0, 1.0, C).view(-1, 1, 1)
    x = (torch.einsum("cd,ndhw->nchw", unitary(C, C).float(), torch.randn(shape)) + mean).requires_grad_()
    z = x.contiguous(memory_format=torch.channels_last) if last else x
    exact = x.detach().double().requires_grad_()
    g = torch.randn(shape)
    ours, wide = DecorrelatedBatchNorm2d(C), DecorrelatedBatchNorm2d(C, dtype=torch.float64)
    y, want = ours(z), by_hand(exact, wide)
    (grad,), (expected,) = torch.autograd.grad(y, x, g), torch.autograd.grad(want, exact, g.double())
    P = torch.cov(channels_first(exact.detach()))
    # κ = 1: rounding alone, of sums as a random walk: over all samples in one product, or over the pixels of an image
    # and then over the images. The covariance does not feel the mean; output and gradient feel the rounding of the mean
    # itself, eps times the ratio.
    terms = x.numel() // C if last else 10 * 10 + 600
    bound = terms**0.5 * eps_of(torch.float32)
    assert relative_error(ours.running_cov[0], 0.9 * torch.eye(C) + 0.1 * P) < bound
    assert relative_error(y, want) < bound * max(1.0, ratio)
    assert relative_error(grad, expected) < bound * max(1.0, ratio)


@pytest.mark.parametrize("shape", [(5, 4), (3, 4, 2, 2)])
def test_evaluation_differentiates_twice_in_the_input_and_the_affine_parameters(shape):
    layer = NORMS[len(shape)](4, groups=2, eps=1e-2, dtype=torch.float64)
    layer(batch((20, *shape[1:]), eigvals=[4.0, 2.0, 1.0, 0.3]))
    layer.eval()

    def run(x, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    arguments = (torch.randn(shape), torch.randn(4), torch.randn(4))
    arguments = tuple(a.double().requires_grad_() for a in arguments)
    assert torch.autograd.gradcheck(run, arguments)
    assert torch.autograd.gradgradcheck(run, arguments)


def test_many_small_images_take_no_more_memory_than_the_rest():
    """More channels than positions: no d × d matrix is kept for every image."""
    x = torch.randn(64, 128, 2, 2, requires_grad=True)
    layer = DecorrelatedBatchNorm2d(128)
    with torch.profiler.profile(profile_memory=True) as profiler:
        torch.autograd.grad(layer(x), x, torch.ones(x.shape))
    largest = max(event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")
    # A piece is 1 MB at most; 64 matrices of 128 × 128 would be 4 MB.
    assert largest <= 1 << 20


def test_second_derivatives_that_mix_output_and_gradient_are_right():
    """The loss depends on y directly and through its gradient, so that both backward passes run through one graph."""
    layer = DecorrelatedBatchNorm1d(3, eps=1e-2, dtype=torch.float64)

    def loss(x):
        y = layer(x)
        (grad,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        return (grad.square() + y.sin()).sum()

    x = batch((7, 3), eigvals=[2.0, 1.0, 0.5]).requires_grad_()
    assert torch.autograd.gradcheck(loss, (x,))


def test_gradients_asked_for_one_by_one_and_twice_are_those_asked_for_together():
    layer = DecorrelatedBatchNorm2d(4, dtype=torch.float64)
    x = torch.randn(8, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    y = layer(x).pow(2).sin().sum()
    wanted = (x, layer.weight, layer.bias)
    together = torch.autograd.grad(y, wanted, retain_graph=True)
    for _ in range(2):
        for tensor, want in zip(wanted, together, strict=True):
            assert torch.equal(torch.autograd.grad(y, tensor, retain_graph=True)[0], want)


def test_evaluation_has_the_tangents_of_running_statistics():
    """Also where the whitening of these values is kept."""
    layer = DecorrelatedBatchNorm2d(4, groups=2, dtype=torch.float64)
    layer(torch.randn(8, 4, 3, 3, dtype=torch.float64))
    layer.eval()
    x, cov, direction = torch.randn(2, 4, 3, 3, dtype=torch.float64), *torch.randn(2, 2, 2, 2, dtype=torch.float64)
    cov, direction = cov @ cov.mT + torch.eye(2), direction + direction.mT

    def output(cov):
        return torch.func.functional_call(layer, {"running_cov": cov}, (x,))

    output(cov)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(output(forward_ad.make_dual(cov, direction))).tangent
    _, expected = torch.func.jvp(output, (cov,), (direction,))
    torch.testing.assert_close(tangent, expected)


def test_forward_mode_and_vmap_agree_with_reverse_mode():
    layer = DecorrelatedBatchNorm2d(4, groups=2, track_running_stats=False, eps=1e-2, dtype=torch.float64)
    x, v, w = torch.randn(3, 8, 4, 3, 3, dtype=torch.float64)
    y, tangent = torch.func.jvp(layer, (x,), (v,))
    _, pullback = torch.func.vjp(layer, x)
    torch.testing.assert_close(y, layer(x))
    assert abs((tangent * w).sum() - (pullback(w)[0] * v).sum()) < 1e-9
    torch.testing.assert_close(torch.vmap(layer)(torch.stack([x, v])), torch.stack([layer(x), layer(v)]))


def test_checkpointed_recomputation_gives_the_same_gradient():
    layer = DecorrelatedBatchNorm2d(4, dtype=torch.float64)
    x = torch.randn(8, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(lambda z: layer(z).sin(), x, use_reentrant=False)
    (got,) = torch.autograd.grad(y.pow(2).sum(), x)
    (want,) = torch.autograd.grad(layer(x).sin().pow(2).sum(), x)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("ours", "shape"), [(IterNorm1d, (40, 4)), (IterNorm2d, (8, 4, 3, 3)), (IterNorm3d, (4, 4, 2, 3, 2))]
)
def test_the_iterated_norm_is_the_published_iteration(ours, shape):
    x = batch(shape, eigvals=[4.0, 2.0, 1.0, 0.5])
    X = channels_first(x)
    centred = X - X.mean(1, keepdim=True)
    eye = torch.eye(4, dtype=x.dtype)
    P = centred @ centred.T / X.shape[1] + 1e-5 * eye
    A, Z = P / P.trace(), eye
    for _ in range(5):  # Huang et al. 2019, Algorithm 1
        Z = (3 * Z - Z @ Z @ Z @ A) / 2
    expected = Z / P.trace().sqrt() @ centred
    assert relative_error(channels_first(ours(4, dtype=torch.float64)(x)), expected) < 1e-10
    exact = invsqrtm(P) @ centred
    assert relative_error(channels_first(ours(4, steps=30, dtype=torch.float64)(x)), exact) < 1e-10


@pytest.mark.parametrize("solver", ["eigh", "newton_schulz", NewtonSchulz(7)])
def test_the_iterated_norm_shows_its_own_arguments_and_refuses_a_solver(solver):
    parameters = inspect.signature(IterNorm2d).parameters
    assert list(parameters)[:6] == list(inspect.signature(DecorrelatedBatchNorm2d).parameters)[:6]
    assert parameters["steps"].default == 5
    assert set(inspect.signature(DecorrelatedBatchNorm2d).parameters) <= set(parameters)
    with pytest.raises(ValueError, match=r"write steps= .* or DecorrelatedBatchNorm2d\(\.\.\., solver="):
        IterNorm2d(4, solver=solver)


def test_any_solver_of_exact_roots_gives_the_same_layer():
    x = batch((8, 6, 4, 5))
    want = DecorrelatedBatchNorm2d(6, dtype=torch.float64)(x)
    for solver in ("svd", Minimax(1e3)):
        assert relative_error(DecorrelatedBatchNorm2d(6, solver=solver, dtype=torch.float64)(x), want) < 1e-9


@pytest.mark.parametrize(
    "options", [{"method": "pcaa"}, {"method": "cholesky", "solver": "pade"}, {"eps": float("nan")}]
)
def test_arguments_that_cannot_be_are_refused(options):
    with pytest.raises(ValueError, match=r"method|eps"):
        DecorrelatedBatchNorm2d(4, **options)


def test_derivatives_along_many_directions_at_once_are_those_one_by_one():
    layer = DecorrelatedBatchNorm2d(4, groups=2, dtype=torch.float64)
    x = torch.randn(3, 4, 2, 3, dtype=torch.float64, requires_grad=True)
    inputs = (x, layer.weight, layer.bias)
    y = layer(x)
    directions = torch.randn(5, *y.shape, dtype=torch.float64)
    together = torch.autograd.grad(y, inputs, directions, retain_graph=True, is_grads_batched=True)
    one_by_one = [torch.autograd.grad(y, inputs, direction, retain_graph=True) for direction in directions]
    for got, want in zip(together, zip(*one_by_one, strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(want), rtol=1e-11, atol=1e-11)


def test_the_buffers_of_a_thread_serve_every_mode_shape_and_dtype():
    """They are kept between calls: one made in inference mode, or for a smaller batch, must do for the next."""
    layer, few = DecorrelatedBatchNorm2d(64, dtype=torch.float64), DecorrelatedBatchNorm2d(64)
    layout._scratch.slots.clear()
    with torch.device("meta"):  # a default device is not that of the buffers
        layer(torch.randn(4, 64, 3, 3, dtype=torch.float64, device="cpu"))
    for mode, shape, last in [
        (torch.inference_mode, (4, 64, 3, 3), False),
        (torch.enable_grad, (4, 64, 3, 3), False),
        (torch.enable_grad, (9, 64, 4, 4), False),
        (torch.no_grad, (3, 64, 2, 2), True),
        (torch.enable_grad, (2, 64, 20, 20), True),
    ]:
        x = torch.randn(shape, dtype=torch.float64, requires_grad=mode is torch.enable_grad)
        z = x.to(memory_format=torch.channels_last) if last else x
        with mode():
            y, half = layer(z), few(z.to(torch.bfloat16))
        want = by_hand(x, layer)
        assert (y - want).abs().max() < 1e-9
        assert (half.double() - want).abs().max() < 0.1
        if x.requires_grad:
            g = torch.randn(shape, dtype=torch.float64)
            (got,), (expected,) = torch.autograd.grad(y, x, g), torch.autograd.grad(want, x, g)
            assert (got - expected).abs().max() < 1e-6 * expected.abs().max()
    assert layout._scratch.slots
