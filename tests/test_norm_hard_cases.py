"""Decorrelated batch norm where it hurts: rank deficiency, drifting scale, bad values, half precision."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from helpers import channels_first, eps_of, images_with, inverse_root_by_iteration, relative_error
from wellcond.linalg import NonFiniteMatrixError
from wellcond.nn import DecorrelatedBatchNorm1d, DecorrelatedBatchNorm2d, IterNorm1d, update_statistics

HALF = [torch.float16, torch.bfloat16]
METHODS = ["zca", "pca", "cholesky"]


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
@pytest.mark.parametrize("kind", ["dead", "constant", "duplicate", "all dead"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("relative", [False, True])
def test_degenerate_channels_stay_finite_by_every_method(scale, kind, method, relative):
    x = torch.randn(16, 4, 4, 4) * scale
    x[:, 1] = {"dead": 0.0, "constant": 7.0 * scale, "duplicate": x[:, 0]}.get(kind, 0.0)
    if kind == "all dead":
        x.zero_()
    x.requires_grad_()
    layer = DecorrelatedBatchNorm2d(4, eps=1e-3 if relative else 1e-5, relative=relative, method=method)
    y = layer(x)
    (y * torch.randn_like(y)).sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()
    assert layer.eval()(x).isfinite().all()
    if relative and kind in ("dead", "constant"):
        # Channel 1 (another row for PCA) has no variance: what is left is rounding of its mean, over √ε.
        smallest = channels_first(y.detach()).std(1).min()
        assert smallest < 7 * eps_of(torch.float32) / 1e-3**0.5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_value_in_one_sample_names_the_layer_and_spoils_no_statistics_by_any_method(method, bad):
    layer = DecorrelatedBatchNorm2d(4, method=method, relative=True)
    layer.layer_name = "stage1.norm"
    layer(torch.randn(8, 4, 3, 3))
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(8, 4, 3, 3)
    x[5, 2, 1, 1] = bad
    with pytest.raises(NonFiniteMatrixError, match=r"stage1\.norm"):
        layer(x)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_an_empty_batch_is_refused_in_training_and_passes_in_evaluation():
    layer = DecorrelatedBatchNorm2d(4)
    x = torch.empty(0, 4, 3, 3)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(x)
    assert layer.eval()(x).shape == x.shape


def drifting(samples, step, mixing):
    """12 channels of rank 10 whose scale goes from 0.01 to 100 and back; the label is a product of two factors."""
    factors = torch.randn(samples, 10)
    scale = 10 ** (2 * torch.tensor(step / 300).sin())
    return scale * factors @ mixing, (factors[:, 0] * factors[:, 1] > 0).long()


@pytest.mark.parametrize(
    ("layer", "batch"),
    [
        (DecorrelatedBatchNorm1d(16), 64),
        (DecorrelatedBatchNorm1d(16, eps=1e-2, relative=True), 256),
        (IterNorm1d(16), 256),
    ],
    ids=["default", "relative", "iter"],
)
def test_training_on_rank_deficient_data_of_drifting_scale_stays_finite_and_agrees_with_evaluation(layer, batch):
    """The gap is that of the accuracies on 8192 samples, by their own statistics and by the running ones.

    The learning rate falls as in the paper: statistics that lag behind the weights are no statistics of theirs. With
    the default ε they lag too far all the same (6 directions without variance, divided by √ε), and are recomputed.
    """
    torch.manual_seed(0)
    mixing = torch.randn(10, 12)
    net = nn.Sequential(nn.Linear(12, 16), copy.deepcopy(layer), nn.ReLU(), nn.Linear(16, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [857, 1429])
    for step in range(2000):
        x, label = drifting(batch, step, mixing)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), label).backward()
        optimizer.step()
        schedule.step()
    assert all(p.isfinite().all() for p in net.parameters())
    assert all(b.isfinite().all() for b in net.buffers())
    if not layer.relative:
        assert update_statistics(net, [drifting(batch, 2000, mixing)[0] for _ in range(100)]) == 1
    x, label = drifting(8192, 2000, mixing)
    with torch.no_grad():
        evaluated, trained = ((mode(x).argmax(1) == label).float().mean() for mode in (copy.deepcopy(net).eval(), net))
    assert trained > 0.9  # it has learned something, so that a gap could show
    assert abs(trained - evaluated) < 0.02


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4, 1e6])
def test_the_ridge_does_not_fall_below_the_rounding_of_the_covariance(scale):
    """8 channels of rank 5 in float32, against P + max(ε, eps·tr P) I in float64.

    Without it P + εI is rounding along the null directions at scale 1e4, and its derivative 1e7 times too large.
    """
    mixing = torch.randn(8, 5, dtype=torch.float64)
    x = (scale * torch.randn(400, 5, dtype=torch.float64) @ mixing.mT).float()
    g = torch.randn(400, 8)
    layer = DecorrelatedBatchNorm1d(8, affine=False)
    z = x.clone().requires_grad_()
    layer(z).backward(g)
    wide = x.double().requires_grad_()
    centred = wide - wide.mean(0)
    P = centred.mT @ centred / 400
    ridge = torch.maximum(torch.tensor(1e-5), eps_of(torch.float32) * P.trace())
    truth = centred @ inverse_root_by_iteration(P + ridge * torch.eye(8))
    truth.backward(g.double())
    assert z.grad.isfinite().all()
    # The rounding of a null eigenvalue moves its own root by up to its own size: the bound is one of magnitude.
    assert z.grad.norm() < 3 * wide.grad.norm() and wide.grad.norm() < 3 * z.grad.norm()
    # On the range, of κ = 30 at most here, the output is that of the truth.
    assert relative_error(layer(x), truth.detach()) < 1e-3


def test_the_derivative_of_the_minimum_ridge_is_exact():
    """ε = 1e-20 is below the rounding of float64, so that eps·tr P takes its place and is differentiated."""
    layer = DecorrelatedBatchNorm1d(3, eps=1e-20, dtype=torch.float64)
    x = torch.randn(10, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)


@pytest.mark.parametrize("relative", [False, True])
def test_groups_have_their_own_minimum_ridge_and_the_monitor_sees_the_mean(relative):
    layer = DecorrelatedBatchNorm1d(4, groups=2, eps=1e-5 if not relative else 1e-8, relative=relative)
    x = torch.randn(50, 4) * torch.tensor([1.0, 1.0, 1e4, 1e4])
    traces = [x[:, :2].double().var(0, correction=0).sum(), x[:, 2:].double().var(0, correction=0).sum()]
    ridges = [eps_of(torch.float32) * t if relative else max(1e-5, eps_of(torch.float32) * t) for t in traces]
    assert layer.observed_features(x).eps == pytest.approx(float(sum(ridges)) / 2, rel=1e-5)


@pytest.mark.parametrize("value", [0.1, 7.7, -1e-3])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", [{}, {"relative": True, "eps": 1e-2}, {"relative": True, "eps": 1e-2, "groups": 2}])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_constant_features_become_the_bias_with_a_bounded_gradient(value, method, options, memory_format):
    """As of a convolution with a zero weight and a bias. The mean is off by its rounding, which is no variance."""
    layer = DecorrelatedBatchNorm2d(8, method=method, **options)
    nn.init.normal_(layer.bias)
    x = torch.full((16, 8, 14, 14), value).to(memory_format=memory_format).requires_grad_()
    g = torch.randn_like(x)
    y = layer(x)
    y.backward(g)
    largest = layer.eps**-0.5  # of the entries of W, of a covariance of zero
    bias = layer.bias.detach().view(-1, 1, 1).expand_as(y)
    bound = largest * abs(value) * eps_of(torch.float32)
    assert (y - bias).abs().max() <= bound
    # dx = W (g − mean g) + D (x − mean), and the difference is zero.
    assert x.grad.abs().max() <= 2 * largest * g.abs().max()
    # The same in ordinary operations.
    plain = DecorrelatedBatchNorm2d(8, method=method, track_running_stats=False, affine=False, **options)
    assert torch.func.vmap(plain)(x.detach().unsqueeze(0)).abs().max() <= bound


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(8, 4, 3, 3), (20, 40, 5, 5), (16, 4, 64, 64)])
@pytest.mark.parametrize(("dtype", "value"), [(torch.float32, 1e30), (torch.float32, -1e33), (torch.float64, 1e160)])
def test_a_constant_channel_whose_rounding_has_no_square(shape, dtype, value, method):
    """(eps·value)² is beyond the dtype: a mean that is off by its rounding must not make an infinite variance of it."""
    layer = DecorrelatedBatchNorm2d(shape[1], method=method, dtype=dtype)
    x = torch.randn(shape, dtype=dtype)
    alone = x.clone()
    x[:, 1], alone[:, 1] = value, 0.0
    y, expected = layer(x), copy.deepcopy(layer)(alone)
    # The root mixes some d·eps of the others into the null direction, which the ridge enlarges by eps^{-1/2}.
    bound = shape[1] * eps_of(dtype) * layer.eps**-0.5 * alone.abs().max()
    assert (y - expected).abs().max() < bound
    if method != "pca":  # whose outputs are axes, not channels
        assert y[:, 1].abs().max() < bound


def test_a_constant_channel_is_no_unit_for_the_others():
    """One channel at 7.7 beside three of a deviation of 1e-5: the rounding of 7.7 is as large as they are."""
    x = 1e-5 * images_with([1.0, 0.5, 0.2, 0.1], (8, 4, 6, 6), torch.float32)
    x[:, 1] = 7.7
    layer = DecorrelatedBatchNorm2d(4, eps=1e-3, relative=True)
    wide = channels_first(x).double()
    centred = wide - wide.mean(1, keepdim=True)
    centred[1] = 0.0
    P = centred @ centred.mT / centred.shape[1]
    truth = inverse_root_by_iteration(P + 1e-3 * P.trace() / 4 * torch.eye(4)) @ centred
    # The root and the products, of κ = 1e3 with ε.
    assert (channels_first(layer(x)) - truth).abs().max() < 1e3 * eps_of(torch.float32)


@pytest.mark.parametrize("value", [0.1, 7.7])
def test_evaluation_of_constant_features_is_the_bias_when_their_variance_has_died_away(value):
    layer, x = DecorrelatedBatchNorm2d(4, eps=1e-2, relative=True), torch.full((4, 4, 5, 5), value)
    for _ in range(400):
        layer(x)
    # The running mean stops where a tenth of the gap is half a rounding; W is at most 1/√ε.
    assert layer.eval()(x).abs().max() <= 10 * 10 * value * eps_of(torch.float32)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("exponent", [62, -62, -100, -120])
def test_a_relative_eps_takes_features_whose_squares_leave_single_precision(method, exponent):
    """A power of two rounds nothing, so that all but the unit is as without it; the second group stays as it is."""
    scale = torch.ones(6)
    scale[:3] = 2.0**exponent
    scale = scale.view(-1, 1, 1)
    g, x = torch.randn(8, 6, 5, 5), 2 + images_with([1.0, 0.5, 0.3, 0.2, 0.2, 0.1], (8, 6, 5, 5), torch.float32)
    results = []
    for factor in (1.0, scale):
        layer = DecorrelatedBatchNorm2d(6, groups=2, relative=True, eps=1e-3, method=method, momentum=1.0)
        z = (x * factor).requires_grad_()
        y = layer(z)
        y.backward(g)
        results.append((layer, y.detach(), z.grad * factor, layer.weight.grad))
    (plain, *want), (scaled, *got) = results
    for one, other in zip(got, want, strict=True):
        # Rounding, through an inverse root and its derivative of κ = 10.
        assert relative_error(one, other) < 1e-4
    assert relative_error(scaled.running_mean / scale.flatten(), plain.running_mean) < 1e-6
    if exponent == 62:
        # The running covariance has the squares itself, in a dtype that must hold them.
        ours, theirs = (layer.eval()(x * factor) for layer, factor in ((scaled, scale), (plain, 1.0)))
        assert relative_error(ours, theirs) < 1e-4
        features, eps = scaled.observed_features(x * scale)
        assert features.isfinite().all() and 0 < eps < float("inf")


@pytest.mark.parametrize("options", [{}, {"relative": True}])
def test_features_whose_covariance_cannot_be_kept_are_refused_with_the_way_out(options):
    x = 1e20 * torch.randn(8, 3, 5, 5)
    layer = DecorrelatedBatchNorm2d(3, **options)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(NonFiniteMatrixError, match=r"exceeds torch\.float32 in layer .* take float64; relative=True"):
        layer(x)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert layer.double()(x.double()).std().item() == pytest.approx(1.0, rel=1e-2)
    if options:
        loose = DecorrelatedBatchNorm2d(3, relative=True, track_running_stats=False)
        assert relative_error(loose(x), loose(x / 2.0**66)) < 1e-4


@pytest.mark.parametrize("dtype", HALF)
def test_statistics_and_gradients_of_half_precision_input_are_those_of_float32(dtype):
    """κ = 100; enough samples for several pieces. Only the result is rounded to half precision."""
    x = images_with([1.0, 0.5, 0.1, 0.01], (150, 4, 2048), torch.float32)
    x = (x + 2.0).to(dtype)
    g = torch.randn(x.shape).to(dtype)
    results = []
    for z in (x, x.float()):
        layer = DecorrelatedBatchNorm1d(4)
        z = z.clone().requires_grad_()
        y = layer(z)
        y.backward(g.to(z.dtype))
        results.append((layer, y, z.grad))
    (half, y, grad), (full, y32, grad32) = results
    assert y.dtype == grad.dtype == dtype
    for name in ("running_mean", "running_cov"):
        assert getattr(half, name).dtype == torch.float32
        assert relative_error(getattr(half, name), getattr(full, name)) < 1e-5
    # One rounding, to half an ulp.
    assert relative_error(y, y32) < eps_of(dtype) and relative_error(grad, grad32) < eps_of(dtype)
    assert relative_error(half.weight.grad, full.weight.grad) < 1e-5
    assert relative_error(half.eval()(x), full.eval()(x.float())) < eps_of(dtype)


@pytest.mark.parametrize("dtype", HALF)
def test_autocast_leaves_statistics_and_output_as_they_are(dtype):
    x = images_with([1.0, 0.5, 0.1, 0.01], (4, 4, 10, 10), torch.float32)
    inside, outside = DecorrelatedBatchNorm2d(4), DecorrelatedBatchNorm2d(4)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    with torch.autocast("cpu", dtype):
        y = inside(a)
        y.square().mean().backward()  # autocast around the backward pass as well
    outside(b).square().mean().backward()
    assert y.dtype == torch.float32
    assert relative_error(inside.running_cov, outside.running_cov) < 1e-5
    assert relative_error(inside.eval()(x), outside.eval()(x)) < 1e-5
    # The gradient of mean(y²) is ε-small, cancelled from terms of size 1/√λ: compared to those.
    assert (a.grad - b.grad).abs().max() < 1e-5 / 0.01**0.5


@pytest.mark.parametrize("convert", [nn.Module.half, nn.Module.bfloat16, lambda m: m.to(torch.bfloat16)])
def test_a_module_in_half_precision_keeps_its_statistics_in_float32(convert):
    """A covariance of κ = 1e4 rounded to half precision is indefinite; the layer converted must still evaluate."""
    x = images_with([1.0, 1e-2, 1e-4, 1e-4], (4, 4, 10, 10), torch.float32)
    layer = DecorrelatedBatchNorm2d(4, momentum=1.0, eps=1e-6)
    layer(x)
    want = copy.deepcopy(layer).eval()(x)
    convert(layer)
    rounded = layer.running_cov[0].to(layer.weight.dtype).double()
    assert torch.linalg.eigvalsh(rounded).min() < 0 or relative_error(rounded, layer.running_cov[0]) > 1e-5
    assert layer.weight.dtype in HALF and layer.running_cov.dtype == layer.running_mean.dtype == torch.float32
    assert relative_error(layer.eval()(x), want) < 1e-5
    made = DecorrelatedBatchNorm2d(4, dtype=layer.weight.dtype)
    made.load_state_dict(layer.state_dict())
    assert made.weight.dtype == layer.weight.dtype and torch.equal(made.running_cov, layer.running_cov)


def test_double_and_device_conversions_reach_the_statistics():
    layer = DecorrelatedBatchNorm2d(4).double()
    assert layer.running_cov.dtype == torch.float64
    assert layer.to("meta").running_cov.is_meta


@pytest.mark.parametrize(("relative", "unit"), [(False, 1.0), (True, 5.0)])
def test_the_monitor_is_told_the_absolute_ridge_and_the_features_by_groups(relative, unit):
    layer = DecorrelatedBatchNorm2d(2, groups=2, eps=1e-3, relative=relative, dtype=torch.float64)
    x = images_with([9.0, 1.0], (8, 2, 2, 3))
    features, eps = layer.observed_features(x)
    assert eps == pytest.approx(1e-3 * unit)
    assert torch.equal(features, channels_first(x).unsqueeze(1))


def test_add_observer_goes_on_working_with_a_warning():
    layer, seen = DecorrelatedBatchNorm1d(2), []
    with pytest.warns(DeprecationWarning, match="observed_features"):
        handle = layer.add_observer(lambda module, observation: seen.append(observation.features))
    layer(torch.randn(5, 2))
    layer.eval()(torch.randn(5, 2))
    handle.remove()
    layer.train()(torch.randn(5, 2))
    assert [tuple(features.shape) for features in seen] == [(1, 2, 5)]


def test_statistics_of_rank_27_gathered_in_single_precision_evaluate_in_double():
    """Their null eigenvalues are ±6e-8 of the largest, far beyond the rounding of double, and far below ε."""
    convolution = nn.Conv2d(3, 64, 3, bias=False)
    layer = DecorrelatedBatchNorm2d(64, eps=1e-5, momentum=None)  # from the first batch on, not from I
    x = torch.randn(16, 3, 8, 8)
    for _ in range(20):
        layer(convolution(x + torch.randn(())))
    features = convolution(x)
    assert torch.linalg.eigvalsh(layer.running_cov[0].double())[0] < 0.0
    single = layer.eval()(features)
    # Sums of 64 products of S, at most 1/√ε = 316, with features: their rounding, which grows with √64.
    bound = 64**0.5 * 316 * eps_of(torch.float32) * features.abs().max().item()
    torch.testing.assert_close(layer.double().eval()(features.double()).float(), single, rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_what_is_no_real_floating_input_is_refused(dtype):
    with pytest.raises(TypeError, match=f"real floating dtype .got {dtype}"):
        DecorrelatedBatchNorm1d(3)(torch.ones(4, 3, dtype=dtype))
