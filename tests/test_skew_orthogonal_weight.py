"""``map="soc"``: the layer is orthogonal as a map on images, and layer, parameter and optimizer are those that were."""

from __future__ import annotations

import copy
import pickle
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from treatment_models import batches, polar_reference, sgd, train
from wellcond._shared.operator_norm import skew_convolution_norm_bound
from wellcond._shared.skew_convolution import MAX_NORM, SYMMETRIC, filled_up, skew_kernel, truncation_error
from wellcond.nn import DecorrelatedBatchNorm2d, SkewOrthogonalConv2d
from wellcond.orthogonality import (
    convolution_singular_values,
    orthogonal_weight,
    pre_spectral_layers,
    treat,
    weight_matrices,
)

SOC = {"ow": {"map": "soc"}}
FORMS = {
    "3 to 8": lambda: nn.Conv2d(3, 8, 3, padding=1),
    "8 to 3": lambda: nn.Conv2d(8, 3, 3, padding="same", bias=False),
    "square": lambda: nn.Conv2d(4, 4, (1, 3), padding=(0, 1)),
    "stride": lambda: nn.Conv2d(2, 5, 3, stride=2, padding=1),
    "stride, more channels": lambda: nn.Conv2d(1, 6, 5, stride=2, padding=2),
    "circular": lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
    "1 × 1": lambda: nn.Conv2d(6, 3, 1),
}


def net(channels: int = 8, **options) -> nn.Sequential:
    """A convolution that may be skew-orthogonal before a norm, for 8 × 8 images of 3 channels and four classes."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1, **options),
        DecorrelatedBatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, 4, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def stored(layer: nn.Module) -> nn.Parameter:
    return layer.parametrizations.weight.original


def jacobian(layer: nn.Module, shape: tuple[int, ...]) -> torch.Tensor:
    """Outputs × inputs of one image of double precision; of channels, rows and columns in this order."""
    J = torch.func.jacrev(lambda x: layer(x[None])[0])(torch.randn(shape, dtype=torch.float64))
    return J.reshape(-1, J.shape[-3:].numel())


@pytest.mark.parametrize("form", FORMS)
def test_it_is_the_exponential_of_the_skew_part_of_the_layer_that_it_was(form):
    """exp(s(A − Aᵀ)), A the matrix of the plain layer on images with s × s pixels as channels and zeros around it."""
    layer = FORMS[form]().double()
    s, (rows, columns) = layer.stride[0], (6, 4)
    image = (layer.in_channels, rows, columns)
    A = jacobian(layer, image)
    before = layer.weight.detach().clone()
    orthogonal_weight(layer, map="soc")
    # The order in which the pixels of an image are the channels of a coarser one.
    order = F.pixel_unshuffle(torch.arange(A.shape[1]).view(image).double(), s).flatten().long()
    n = max(A.shape)
    square = torch.zeros(n, n, dtype=torch.float64)
    square[: A.shape[0], : A.shape[1]] = A[:, order]
    bare = filled_up(before, s)
    skew = bare - bare.transpose(0, 1).flip(2, 3)
    scale = (2 * stored(layer).norm() / skew.norm()).item() if skew.any() else 1.0
    expected = torch.linalg.matrix_exp(scale * (square - square.T))[: A.shape[0], : A.shape[1]]
    in_training, in_evaluation = jacobian(layer, image), jacobian(layer.eval(), image)
    # The series is cut where its remainder is below rounding in evaluation, and after the power 5 in training.
    torch.testing.assert_close(in_evaluation[:, order], expected, rtol=0, atol=1e-12)
    assert torch.linalg.matrix_norm(in_training - in_evaluation, 2) <= truncation_error(1.5, 5) + 1e-12
    small = min(A.shape)
    gram = in_evaluation @ in_evaluation.T if A.shape[0] == small else in_evaluation.T @ in_evaluation
    torch.testing.assert_close(gram, torch.eye(small, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_the_weight_is_the_kernel_away_from_the_border(form):
    layer = orthogonal_weight(FORMS[form]().double(), map="soc")
    weight = layer.weight.detach()
    assert weight_matrices(layer).shape == (1, weight.shape[0], weight[0].numel())
    # As a circular convolution it is orthogonal up to the cut of the series.
    sigma = convolution_singular_values(layer, 32)
    assert (sigma - 1).abs().max() <= truncation_error(1.5, 5) + 1e-12
    s, size = layer.stride[0], weight.shape[2:]
    x = torch.randn(1, layer.in_channels, 64, 64, dtype=torch.float64)
    reach = [n // s // 2 for n in size]
    padded = F.pad(
        x, (reach[1] * s, (size[1] // s - 1 - reach[1]) * s, reach[0] * s, (size[0] // s - 1 - reach[0]) * s)
    )
    plain, own = F.conv2d(padded, weight, layer.bias, stride=s), layer(x)
    inside = (..., slice(reach[0], -reach[0] or None), slice(reach[1], -reach[1] or None))
    assert own[inside].numel() > 0
    torch.testing.assert_close(plain[inside], own[inside], rtol=0, atol=1e-12)


def test_gradients_match_finite_differences():
    layer = orthogonal_weight(nn.Conv2d(2, 3, 3, padding=1).double(), map="soc")
    chain = layer.parametrizations.weight[0]
    M = (3 * stored(layer).detach()).requires_grad_()
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)

    def of(x, M):
        return torch.func.functional_call(layer, {"parametrizations.weight.original": M}, (x,))

    assert torch.autograd.gradcheck(of, (x, M), fast_mode=True)
    assert torch.autograd.gradcheck(chain, (M,), fast_mode=True)


def test_layer_parameter_and_group_stay_and_the_momentum_of_the_old_weight_goes():
    model = net()
    optimizer = sgd(model)
    train(model, optimizer, batches(2))
    other = model[3].weight
    momentum = optimizer.state[other]["momentum_buffer"].clone()
    layer, parameter, group = model[0], model[0].weight, list(optimizer.param_groups[0]["params"])
    loss = model(batches(1)[0][0]).sum()  # a graph that is still there, and expects gradients of the old shape
    loss.backward()
    treat(model, optimizer, "ow", options=SOC)
    assert model[0] is layer and stored(layer) is parameter and parameter.shape == (8, 8, 3, 3)
    assert all(a is b for a, b in zip(group, optimizer.param_groups[0]["params"], strict=True))
    assert optimizer.state[parameter]["momentum_buffer"].shape == parameter.shape
    assert not optimizer.state[parameter]["momentum_buffer"].any()
    assert torch.equal(optimizer.state[other]["momentum_buffer"], momentum)
    before = parameter.detach().clone()
    train(model, optimizer, batches(2))
    assert not torch.equal(before, parameter) and optimizer.state[parameter]["momentum_buffer"].shape == before.shape
    assert list(pre_spectral_layers(model)) == list(pre_spectral_layers(model, batches(1)[0][0])) == ["0"]


@pytest.mark.parametrize("channels", [3, 8], ids=["of one shape", "of another shape"])
def test_an_unmoved_layer_gets_its_weight_back_and_a_moved_one_refuses(channels):
    model = net(channels)
    optimizer = sgd(model)
    train(model, optimizer, batches(1))
    kind, parameter, before = type(model[0]), model[0].weight, copy.deepcopy(model.state_dict())
    twin = copy.deepcopy(model)
    handle = treat(model, optimizer, "nog+ow+olr", options=SOC)
    aside = copy.deepcopy(model)
    handle.remove()
    assert type(model[0]) is kind and model[0].weight is parameter
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    x = batches(1)[0][0]
    torch.testing.assert_close(model.eval()(x), twin.eval()(x), rtol=0, atol=0)
    assert stored(aside[0]).shape == (max(3, channels),) * 2 + (3, 3)  # the copy keeps its treatment
    train(model, optimizer, batches(1))  # with momentum of the plain shape again
    handle = treat(model, optimizer, "nog+ow+olr", options=SOC)
    train(model, optimizer, batches(1))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"layer '0' \(Conv2d\) \(map='soc'\).*to_plain"):
            handle.remove()
    train(model, optimizer, batches(1))  # it is all there still
    assert handle.nog.counts()["0"]["treated"] == 2


def test_a_copy_and_a_pickle_compute_the_same_and_learn_apart():
    model = net()
    treat(model, sgd(model), "ow", options=SOC)
    x = batches(1)[0][0]
    with torch.no_grad():
        stored(model[0]).add_(torch.randn(8, 8, 3, 3))
    expected = model.eval()(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other.eval()(x), expected, rtol=0, atol=0)
        assert stored(other[0]) is not stored(model[0])
        train(other, sgd(other), batches(1))
        assert not torch.equal(stored(other[0]), stored(model[0]))
    torch.testing.assert_close(model.eval()(x), expected, rtol=0, atol=0)


def test_it_compiles_to_the_same_values_and_gradients():
    model, x = orthogonal_weight(nn.Conv2d(3, 4, 3, padding=1), map="soc"), torch.randn(2, 3, 5, 5)
    with torch.no_grad():  # beyond its bound: at it, where a layer starts, rounding picks one of two gradients
        stored(model).mul_(1.2)
    compiled = torch.compile(model, backend="aot_eager")
    found = []
    for one in (model, compiled):
        model.zero_grad()
        y = one(x)
        y.square().sum().backward()
        found.append((y.detach(), stored(model).grad.clone()))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", ["auto", "paper", "gradient"])
def test_nog_takes_the_full_polar_factor_of_the_filter(length):
    """The filter is scale-invariant, so steps of one length turn it more and more slowly, as a plain weight."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    treat(model, optimizer, "nog+ow", options={**SOC, "nog": {"scale": length}})
    x, y = batches(1)[0]
    F.cross_entropy(model(x), y).backward()
    before, gradient = stored(model[0]).detach().clone(), stored(model[0]).grad.clone()
    optimizer.step()
    bare = nn.Conv2d(8, 8, 3)
    factor = polar_reference(bare, gradient)
    factor = factor * (gradient.norm() / factor.norm() if length == "gradient" else 1.0)
    # The move of entries of about 1 is known to eps32/lr; the factor of 8 × 72 to eps32 times its condition number.
    torch.testing.assert_close((before - stored(model[0]).detach()).double() / 0.1, factor, rtol=0, atol=1e-4)


def test_a_longer_filter_is_the_same_layer_and_turns_more_slowly():
    model, x = net(), batches(1)[0][0]
    treat(model, sgd(model), "ow", options=SOC)
    turned, outputs = [], []
    for length in (1.0, 10.0):
        other = copy.deepcopy(model)
        with torch.no_grad():
            stored(other[0]).mul_(length)
        optimizer = torch.optim.SGD(other.parameters(), lr=0.01)
        treat(other, optimizer, "nog", layers=["0"])
        outputs.append(other(x))
        start = other[0].weight.detach().clone()
        F.cross_entropy(outputs[-1], batches(1)[0][1]).backward()
        optimizer.step()
        turned.append((other[0].weight.detach() - start).norm().item())
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)
    # First order in the step, which is 3 % of the shorter filter.
    assert turned[0] / turned[1] == pytest.approx(10, rel=0.1)


def test_all_treatments_that_go_with_it_train_together():
    model = net()
    optimizer = sgd(model, lr=0.1)
    handle = treat(model, optimizer, "nog+ol+ow+olr", options={**SOC, "olr": {"rule": "exact"}})
    data, losses = batches(8), []
    for x, y in data:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y) + 0.1 * handle.loss()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert "8 × 8 × 3 × 3" in handle.summary() and "ow (map=soc)" in handle.summary()
    assert handle.nog.counts()["0"] == {"treated": 8, "zero": 0, "nonfinite": 0}
    assert 0 < handle.rates()["0"] <= 0.1
    assert min(losses[4:]) < losses[0]
    assert (convolution_singular_values(model[0], 16) - 1).abs().max() <= truncation_error(1.5, 5) + 1e-5


REFUSED = {
    "linear": (lambda: nn.Linear(4, 3), "nn.Conv2d layers only, got Linear"),
    "transposed": (lambda: nn.ConvTranspose2d(3, 3, 3, padding=1), "nn.Conv2d layers only, got ConvTranspose2d"),
    "even": (lambda: nn.Conv2d(3, 4, 2), r"kernels of odd size, got \(2, 2\)"),
    "valid": (lambda: nn.Conv2d(3, 4, 3), r"half of the kernel wide, \(1, 1\) here, got padding=\(0, 0\)"),
    "reflected": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), "got .* padding_mode='reflect'"),
    "grouped": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=2), "no groups and no dilation, got groups=2"),
    "dilated": (lambda: nn.Conv2d(4, 4, 3, padding=1, dilation=2), r"dilation=\(2, 2\)"),
    "strides": (lambda: nn.Conv2d(4, 4, 3, padding=1, stride=(1, 2)), r"one stride .*got \(1, 2\)"),
    "not finite": (lambda: nan_layer(), "NaN or infinite"),
    "orthogonal": (lambda: orthogonal_weight(nn.Conv2d(3, 4, 3, padding=1)), "already on"),
}


def nan_layer() -> nn.Module:
    layer = nn.Conv2d(3, 4, 3, padding=1)
    nn.init.constant_(layer.weight, torch.nan)
    return layer


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_be_is_refused_by_name_and_left_as_it_was(case):
    make, message = REFUSED[case]
    layer = make()
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=f"layer '' .*{message}|{message}"):
        orthogonal_weight(layer, map="soc")
    assert list(layer.state_dict()) == list(before)
    assert all(
        torch.equal(a, b) or a.isnan().all() for a, b in zip(layer.state_dict().values(), before.values(), strict=True)
    )


def test_a_subclass_with_a_forward_of_its_own_and_another_tensor_are_refused():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(x, self.weight / self.weight.std(), self.bias)

    with pytest.raises(ValueError, match=r"nn\.Conv2d layers only, got Standardised"):
        orthogonal_weight(Standardised(3, 3, 3, padding=1), map="soc")
    with pytest.raises(ValueError, match="map='soc' is of the layer, not of 'weight_hh_l0'"):
        orthogonal_weight(nn.LSTM(3, 3), "weight_hh_l0", map="soc")
    with pytest.raises(ValueError, match="did you mean 'soc'"):
        orthogonal_weight(nn.Conv2d(3, 3, 3, padding=1), map="socc")


def test_a_treatment_that_is_refused_leaves_everything_as_it_was():
    model = net()
    optimizer = sgd(model)
    train(model, optimizer, batches(1))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="is all of that layer; take one"):
        treat(model, optimizer, "ow+sn", options=SOC)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model[3].weight = nn.Parameter(torch.randn(4, 8, 3, 3))
    tied = nn.ModuleList([model, nn.Conv2d(3, 8, 3)])
    tied[1].weight = model[0].weight
    with pytest.raises(ValueError, match="layer '1' has the same weight"):
        treat(tied, sgd(tied), "ow", layers=["0.0"], options=SOC)
    assert model[0].weight.shape == (8, 3, 3, 3)


def test_sizes_and_channels_of_images_are_checked():
    layer = orthogonal_weight(nn.Conv2d(3, 8, 3, stride=2, padding=1), map="soc")
    with pytest.raises(ValueError, match=r"divisible by stride=2 \(got \(7, 8\)\)"):
        layer(torch.randn(1, 3, 7, 8))
    with pytest.raises(ValueError, match="4D input with 3 channels"):
        layer(torch.randn(1, 4, 8, 8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_module_in_half_precision_computes_its_kernel_in_float32(dtype):
    layer = orthogonal_weight(nn.Conv2d(3, 4, 3, padding=1, bias=False), map="soc")
    x = torch.randn(2, 3, 6, 6)
    expected = layer(x)
    half = layer.to(dtype)(x.to(dtype))
    assert half.dtype == dtype
    # Six sums of convolutions whose inputs are rounded to the dtype.
    assert (half.float() - expected).norm() <= 6 * torch.finfo(dtype).eps * expected.norm()


def test_a_layer_of_the_library_equals_it():
    layer = orthogonal_weight(nn.Conv2d(3, 8, 3, padding=1), map="soc")
    own = SkewOrthogonalConv2d(3, 8, 3)
    own.load_state_dict({"weight": stored(layer), "bias": layer.bias})
    x = torch.randn(2, 3, 6, 6)
    for mode in (True, False):
        torch.testing.assert_close(own.train(mode)(x), layer.train(mode)(x), rtol=1e-6, atol=1e-6)


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9),
    "fused SGD": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, fused=True),
    "foreach SGD": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, foreach=True),
    "fused AdamW": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
    "Rprop": lambda p: torch.optim.Rprop(p, 0.01),  # whose state does not begin at zero
    "NAdam": lambda p: torch.optim.NAdam(p, 0.01),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimizer_that_has_stepped_moves_the_filter_as_a_new_one_would(kind):
    filters = []
    for steps in (1, 0):
        model = net()
        optimizer = OPTIMIZERS[kind](model.parameters())
        train(model, optimizer, batches(steps))
        model.load_state_dict(net().state_dict())
        treat(model, optimizer, "ow", options=SOC)
        train(model, optimizer, batches(1))
        filters.append(stored(model[0]).detach())
    torch.testing.assert_close(*filters, rtol=0, atol=0)


class Functional(nn.Module):
    """A model that takes the weight of its convolution, or also calls it, or has a term of the weight."""

    def __init__(self, use: str) -> None:
        super().__init__()
        self.conv, self.norm, self.use = nn.Conv2d(3, 8, 3, padding=1), DecorrelatedBatchNorm2d(8), use

    def forward(self, x):
        if self.use == "weight":
            return self.norm(nn.functional.conv2d(x, self.conv.weight, self.conv.bias, padding=1))
        if self.use == "scaled weight":
            return self.norm(nn.functional.conv2d(x, 2 * self.conv.weight.tanh(), padding=1))
        if self.use == "tied":
            return self.norm(self.conv(nn.functional.conv_transpose2d(self.conv(x), self.conv.weight, padding=1)))
        return self.norm(self.conv(x)).square().mean() + 1e-3 * self.conv.weight.square().sum()


@pytest.mark.parametrize("use", ["weight", "scaled weight", "tied", "term"])
def test_a_model_that_computes_the_convolution_itself_is_refused(use):
    model = Functional(use)
    before = copy.deepcopy(model.state_dict())
    optimizer = sgd(model)
    if use == "term":
        treat(model, optimizer, "ow", options=SOC)
        model(batches(1)[0][0]).backward()
        return
    for layers in (None, ["conv"]) if use != "tied" else (["conv"],):
        with pytest.raises(ValueError, match=r"output of layer 'conv', but the forward function of Functional takes"):
            treat(model, optimizer, "ow", layers=layers, options=SOC)
    assert list(model.state_dict()) == list(before)
    assert model(batches(1)[0][0]).shape == (16, 8, 8, 8)


def test_a_layer_with_a_forward_function_on_the_object_or_a_convolution_of_its_own_is_refused():
    class Doubled(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(2 * x, weight, bias)

    with pytest.raises(ValueError, match="this Doubled has its own"):
        orthogonal_weight(Doubled(3, 4, 3, padding=1), map="soc")
    for name in ("forward", "_conv_forward"):
        layer = nn.Conv2d(3, 4, 3, padding=1)
        setattr(layer, name, getattr(layer, name))
        with pytest.raises(ValueError, match=r"nn\.Conv2d's forward function, and this Conv2d has its own"):
            orthogonal_weight(layer, map="soc")


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_an_empty_batch_has_the_shape_that_it_had(padding_mode):
    layer = nn.Conv2d(4, 8, 3, stride=2, padding=1, padding_mode=padding_mode)
    x = torch.randn(0, 4, 8, 6, requires_grad=True)
    expected = layer(x).shape
    y = orthogonal_weight(layer, map="soc")(x)
    y.sum().backward()
    assert y.shape == expected == (0, 8, 4, 3) and x.grad.shape == x.shape
    assert SkewOrthogonalConv2d(4, 8, 3, stride=2, padding_mode=padding_mode)(x).shape == expected


@pytest.mark.parametrize("share", [0.0, 1e-7, 1e-5])
def test_an_almost_symmetric_filter_starts_near_the_identity_and_learns(share):
    """Scaled up, rounding would be the layer, and a symmetric part of 10⁶ would swallow the steps."""
    generator = torch.Generator().manual_seed(0)
    A, N = (torch.randn(8, 8, 3, 3, generator=generator) for _ in range(2))
    layer = nn.Conv2d(8, 8, 3, padding=1, bias=False)
    with torch.no_grad():
        layer.weight.copy_((A + A.transpose(0, 1).flip(2, 3)) / 2 + share * N)
    orthogonal_weight(layer, map="soc")
    M = stored(layer)
    skew = skew_kernel(M.detach())
    # The skew part of the noise is about as large as the noise, twice the share of the filter; the bound is 1.5 there.
    assert skew_convolution_norm_bound(skew) <= 1.5 / SYMMETRIC * 10 * share
    x, y = torch.randn(4, 8, 8, 8, generator=generator), torch.randn(4, 8, 8, 8, generator=generator)
    # ‖exp(J) − I‖ ≤ ‖J‖ ≤ Σ|L|
    assert (layer(x) - x).norm() <= (skew.abs().sum() + 1e-6) * x.norm()
    before, optimizer = M.detach().clone(), torch.optim.SGD(layer.parameters(), lr=0.1)
    nn.functional.mse_loss(layer(x), y).backward()
    optimizer.step()
    expected = before - 0.1 * M.grad
    assert M.grad.norm() > 0
    torch.testing.assert_close(M.detach(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_stored_filter_is_skew_and_at_the_bound_whatever_the_size_of_the_weight(dtype):
    for size in (1.0, 1e30, 1e-30):
        layer = nn.Conv2d(3, 8, 3, padding=1)
        nn.init.normal_(layer.weight, std=size)
        orthogonal_weight(layer.to(dtype), map="soc")
        M = stored(layer).detach()
        assert torch.equal(M, -M.transpose(0, 1).flip(2, 3)) and M.dtype == dtype
        # Rounded once to its dtype, and sums of 72 products in float32.
        bound = skew_convolution_norm_bound(skew_kernel(M.float()))
        assert bound.item() == pytest.approx(1.5, rel=max(torch.finfo(dtype).eps, 1e-5))


def test_the_start_grows_with_the_skew_share_of_the_filter_without_a_jump():
    """At any threshold below which a filter was left alone, one a little above it would be another layer."""
    generator = torch.Generator().manual_seed(0)
    A, N = (torch.randn(8, 8, 3, 3, generator=generator) for _ in range(2))
    shares, bounds = [10**e for e in torch.linspace(-6, 1, 60).tolist()], []
    for share in shares:
        layer = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        with torch.no_grad():
            layer.weight.copy_((A + A.transpose(0, 1).flip(2, 3)) / 2 + share * N)
        bounds.append(skew_convolution_norm_bound(skew_kernel(stored(orthogonal_weight(layer, map="soc")))).item())
    steps = [b / a for a, b in pairwise(bounds)]
    grown = shares[1] / shares[0]
    assert all(0.999 <= step <= 1.2 * grown for step in steps)
    assert bounds[0] < 1e-3 and bounds[-1] == pytest.approx(MAX_NORM, rel=1e-5)
    # In proportion to the share below a tenth.
    assert bounds[20] / bounds[0] == pytest.approx(shares[20] / shares[0], rel=0.01)


@pytest.mark.parametrize("treatments", ["nog+ow", "ow+olr", "nog+ow+olr"])
def test_a_zero_filter_is_the_identity_and_learns(treatments):
    """The gradient is none of length, so that η* of the zero filter is NaN and the cap holds."""
    model = net()
    with torch.no_grad():
        model[0].weight.zero_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    handle = treat(model, optimizer, treatments, options=SOC)
    M = stored(model[0])
    assert not M.any()
    x = torch.randn(2, 3, 6, 6)
    y = model[0](x)
    expected = torch.cat([x, torch.zeros(2, 5, 6, 6)], 1)  # into more channels
    torch.testing.assert_close(y - model[0].bias.view(-1, 1, 1), expected)
    (y * torch.randn(2, 8, 6, 6)).sum().backward()
    gradient = M.grad.clone()
    assert gradient.norm() > 0
    optimizer.step()
    if "nog" in treatments:
        assert handle.nog.counts()["0"] == {"treated": 1, "zero": 0, "nonfinite": 0}
        U, S, Vh = torch.linalg.svd(gradient.flatten(1).double(), full_matrices=False)
        gradient = (U @ Vh).float().view_as(M)
        assert S[-1] > 1e-4 * S[0]
    torch.testing.assert_close(M.detach(), -0.05 * gradient, rtol=1e-4, atol=1e-6)
    if "olr" in treatments:
        assert handle.rates()["0"].item() == 0.05 and handle.olr.counts() == {"0": {"shortened": 0}}


@pytest.mark.parametrize("channels", [3, 8], ids=["of one shape", "of another shape"])
def test_a_loss_from_before_refuses_to_go_backward(channels):
    """With a filter of one shape its backward pass would take the new values for the old ones."""
    model = net(channels)
    x = torch.randn(2, 3, 6, 6)
    loss = model(x).square().sum()
    treat(model, sgd(model), "ow", options=SOC)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    model(x).square().sum().backward()
    assert stored(model[0]).grad is not None


@pytest.mark.parametrize("treatments", ["nog", "olr", "sn", "ol", "ow", "nog+ow+olr"])
def test_other_treatments_between_forward_and_backward_change_nothing_in_that_backward(treatments):
    model = net()
    twin = copy.deepcopy(model)
    x = torch.randn(2, 3, 6, 6)
    loss, expected = model(x).square().sum(), twin(x).square().sum()
    held = list(model.parameters())  # the treatment gives them other names, and another order
    treat(model, sgd(model), treatments)
    loss.backward()
    expected.backward()
    for p, q in zip(held, twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
