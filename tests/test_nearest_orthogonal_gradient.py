"""NOG gives the nearest orthogonal gradient, eq. (14)-(17), of every kind of weight and through every kind of step."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import treatment_models
from treatment_models import LAYERS, batches, matrices, polar_reference, same, sgd, small_net, train
from wellcond.orthogonality import NearestOrthogonalGradient
from wellcond.orthogonality._polar_factors import polar_factors

EPS = torch.finfo(torch.float32).eps
shapes = st.tuples(st.integers(1, 9), st.integers(1, 9))
seeds = st.integers(0, 2**32 - 1)


gaussian = partial(treatment_models.gaussian, dtype=torch.float32)


def stepped(layer: nn.Module, gradient: torch.Tensor, **options) -> torch.Tensor:
    """The move of the weight in one step of SGD with rate 1: minus the gradient that the optimizer saw."""
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    NearestOrthogonalGradient(optimizer, layer, **options)
    layer.weight.grad = gradient.clone()
    optimizer.step()
    return layer.weight.grad


@settings(deadline=None, max_examples=60)
@given(shape=shapes, seed=seeds)
def test_it_is_the_nearest(shape, seed):
    """No random orthogonal matrix is nearer, and the distance is the known minimum √Σ(σ − 1)²."""
    G = gaussian(*shape, seed=seed, dtype=torch.float64)
    R = polar_factors(G)[0].numpy()
    distance = np.linalg.norm(G.numpy() - R)
    sigma = np.linalg.svd(G, compute_uv=False)
    # float64 rounding only: the factor of a random matrix is known to eps·κ, and the distance to its square.
    assert distance == pytest.approx(np.sqrt(np.sum((sigma - 1) ** 2)), abs=1e-7)
    for other in range(20):
        U, _, Vh = np.linalg.svd(gaussian(*shape, seed=other, dtype=torch.float64).numpy(), full_matrices=False)
        assert np.linalg.norm(G.numpy() - U @ Vh) >= distance - 1e-7


@settings(deadline=None, max_examples=60)
@given(shape=shapes, seed=seeds)
def test_it_keeps_singular_vectors(shape, seed):
    """R = U Vᵀ has uᵢᵀ R vᵢ = 1 for every singular pair of G: only the step size in each direction changes."""
    G = gaussian(*shape, seed=seed, dtype=torch.float64)
    U, sigma, Vh = np.linalg.svd(G.numpy(), full_matrices=False)
    R = polar_factors(G)[0].numpy()
    gap = np.abs(U.T @ R @ Vh.T - np.eye(min(shape))).max()
    assert gap <= 100 * np.finfo(np.float64).eps * sigma[0] / sigma[-1]  # the condition of the polar factor


@pytest.mark.parametrize("kind", LAYERS)
def test_every_layer_equals_a_loop_over_its_matrices(kind):
    layer = LAYERS[kind]()
    gradient = gaussian(*layer.weight.shape, seed=1)
    expected = polar_reference(layer, gradient)
    kappa = max(np.linalg.cond(matrix) for matrix, _ in matrices(layer, gradient))
    error = (stepped(layer, gradient) - expected).abs().max()
    assert error <= 10 * EPS * kappa  # the condition number of the polar factor is below κ(G)


def test_raw_parameters_are_read_with_a_row_per_first_index():
    parameter = nn.Parameter(gaussian(6, 2, 5))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    NearestOrthogonalGradient(optimizer, parameter)
    parameter.grad = gaussian(6, 2, 5, seed=1)
    U, _, Vh = np.linalg.svd(parameter.grad.flatten(1).double().numpy(), full_matrices=False)
    optimizer.step()
    assert np.abs(parameter.grad.flatten(1).numpy() - U @ Vh).max() < 100 * EPS


def test_other_parameters_keep_their_gradients():
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    NearestOrthogonalGradient(optimizer, model[0])
    model(batches(1)[0][0]).square().sum().backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step()
    changed = [name for name, p in model.named_parameters() if not torch.equal(p.grad, before[name])]
    assert changed == ["0.weight"]


@pytest.mark.parametrize(
    ("value", "count"), [(0.0, "zero"), (1e-42, "zero"), (float("nan"), "nonfinite"), (float("inf"), "nonfinite")]
)
def test_zero_tiny_and_nonfinite_gradients_are_left_alone_and_counted(value, count):
    layer = nn.Linear(3, 4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    nog = NearestOrthogonalGradient(optimizer, {"fc": layer})
    gradient = torch.full((4, 3), value)
    layer.weight.grad = gradient.clone()
    optimizer.step()
    assert torch.equal(layer.weight.grad.nan_to_num(7.0), gradient.nan_to_num(7.0))
    assert nog.counts() == {"fc": {"treated": 0, "zero": 0, "nonfinite": 0} | {count: 1}}


def test_one_bad_group_leaves_the_others_treated():
    layer = nn.Conv2d(6, 9, 3, groups=3)
    gradient = gaussian(9, 2, 3, 3)
    gradient[3:6] = float("nan")
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    nog = NearestOrthogonalGradient(optimizer, {"conv": layer})
    layer.weight.grad = gradient.clone()
    optimizer.step()
    clean = polar_reference(layer, gradient.nan_to_num(1.0))
    for group in (slice(0, 3), slice(6, 9)):
        assert (layer.weight.grad[group] - clean[group]).abs().max() < 100 * EPS
    assert layer.weight.grad[3:6].isnan().all()
    assert nog.counts()["conv"] == {"treated": 2, "zero": 0, "nonfinite": 1}


def test_directions_in_which_the_gradient_vanishes_are_not_invented():
    G = gaussian(8, 2) @ gaussian(2, 5, seed=1)
    R = polar_factors(G)[0]
    assert np.allclose(np.linalg.svd(R, compute_uv=False), [1, 1, 0, 0, 0], atol=1e-5)


def make(optimizer: str, parameters, **options):
    return getattr(torch.optim, optimizer)(parameters, lr=0.05, **options)


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        ("SGD", {}),
        ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}),
        ("SGD", {"momentum": 0.9, "foreach": True}),
        ("SGD", {"momentum": 0.9, "fused": True}),
        ("AdamW", {"foreach": True}),
        ("AdamW", {"fused": True}),
        ("Adafactor", {}),
        ("RMSprop", {"momentum": 0.5}),
    ],
)
def test_a_step_equals_replacing_the_gradient_by_hand(optimizer, options):
    torch.manual_seed(0)
    model = small_net()
    twin = copy.deepcopy(model)
    treated, plain = make(optimizer, model.parameters(), **options), make(optimizer, twin.parameters(), **options)
    NearestOrthogonalGradient(treated, model[0])
    for x, y in batches(4):
        for net, stepper in ((model, treated), (twin, plain)):
            stepper.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            if net is twin:
                twin[0].weight.grad.copy_(polar_factors(twin[0].weight.grad.flatten(1))[0].view(8, 3, 3, 3))
            stepper.step()
    assert same(model, twin)


def test_accumulated_gradients_are_treated_once_at_the_step():
    torch.manual_seed(0)
    layer = nn.Linear(6, 4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    nog = NearestOrthogonalGradient(optimizer, {"fc": layer})
    parts = [gaussian(4, 6, seed=i) for i in range(3)]
    layer.weight.grad = torch.zeros(4, 6)
    for part in parts:
        (layer.weight * part).sum().backward()
    optimizer.step()
    assert torch.dist(layer.weight.grad.double(), polar_reference(layer, sum(parts))) < 100 * EPS
    assert nog.counts()["fc"]["treated"] == 1


@pytest.mark.parametrize("as_keyword", [False, True])
def test_a_closure_is_treated_after_it_made_the_gradients(as_keyword):
    """Lightning's automatic optimisation steps so: before the closure runs, the gradients are the last step's."""
    torch.manual_seed(0)
    model = small_net()
    twin = copy.deepcopy(model)
    treated, plain = (make("SGD", net.parameters(), momentum=0.9) for net in (model, twin))
    NearestOrthogonalGradient(treated, model[0])
    NearestOrthogonalGradient(plain, twin[0])
    for x, y in batches(3):

        def closure(x=x, y=y):
            treated.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        loss = treated.step(closure=closure) if as_keyword else treated.step(closure)
        assert loss.requires_grad
    train(twin, plain, batches(3))
    assert same(model, twin)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale_first", [False, True])
def test_grad_scaler_does_not_change_the_step(fused, unscale_first):
    """The polar factor is free of scale; a fused optimizer divides by the loss scale inside its step."""
    torch.manual_seed(0)
    model = small_net()
    twin = copy.deepcopy(model)
    scaled, plain = (torch.optim.SGD(net.parameters(), lr=0.1, fused=fused) for net in (model, twin))
    NearestOrthogonalGradient(scaled, model[0])
    NearestOrthogonalGradient(plain, twin[0])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for x, y in batches(3):
        scaled.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
        if unscale_first:
            scaler.unscale_(scaled)
        scaler.step(scaled)
        scaler.update()
    train(twin, plain, batches(3))
    # A power of two scales without rounding, so only the polar factor's own rounding is left.
    assert torch.dist(model[0].weight, twin[0].weight) < 1e-5
    assert torch.dist(model[3].weight, twin[3].weight) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_computed_in_float32_or_better(dtype):
    layer = nn.Linear(9, 5).to(dtype)
    gradient = gaussian(5, 9).to(dtype)
    found = stepped(layer, gradient)
    assert found.dtype == dtype
    # One rounding to the dtype of entries below 1, and the float32 error where the work is done in float32.
    assert (found.double() - polar_reference(layer, gradient)).abs().max() <= torch.finfo(dtype).eps + (
        0 if dtype == torch.float64 else 100 * EPS
    ) + 1e-14


def test_removed_it_is_gone_bit_for_bit():
    torch.manual_seed(0)
    model = small_net()
    twin = copy.deepcopy(model)
    optimizer, plain = (torch.optim.Adam(net.parameters()) for net in (model, twin))
    nog = NearestOrthogonalGradient(optimizer, model[0])
    nog.remove()
    nog.remove()
    train(model, optimizer, batches(3))
    train(twin, plain, batches(3))
    assert same(model, twin)
    assert nog.counts()["0"]["treated"] == 0
    NearestOrthogonalGradient(optimizer, model[0])  # may come back


def test_counts_continue_after_loading():
    layer = nn.Linear(3, 4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    nog = NearestOrthogonalGradient(optimizer, layer)
    layer.weight.grad = torch.ones(4, 3)
    optimizer.step()
    other = NearestOrthogonalGradient(torch.optim.SGD(layer.parameters(), lr=0.1), layer)
    other.load_state_dict(nog.state_dict())
    assert other.counts() == nog.counts() == {"0": {"treated": 1, "zero": 0, "nonfinite": 0}}


def test_a_parameter_without_gradient_is_passed_over():
    layer = nn.Linear(3, 4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    nog = NearestOrthogonalGradient(optimizer, layer)
    before = layer.weight.detach().clone()
    optimizer.step()
    assert torch.equal(layer.weight, before)
    assert nog.counts()["0"]["treated"] == 0


def test_lightnings_wrapper_is_opened():
    from lightning.pytorch.core.optimizer import LightningOptimizer

    layer = nn.Linear(3, 4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    assert NearestOrthogonalGradient(LightningOptimizer(optimizer), layer).optimizer is optimizer


BAD = {
    "no matrix": (lambda: nn.BatchNorm2d(3), {}, r"layer 'x' \(BatchNorm2d\) has a weight of shape \(3,\)"),
    "no weight": (lambda: nn.LSTM(2, 3), {}, r"layer 'x' \(LSTM\) has no parameter 'weight'"),
    "weight norm": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)),
        {},
        "remove a parametrisation such as weight norm",
    ),
    "lazy": (lambda: nn.LazyLinear(3), {}, "not initialised yet; run one forward pass"),
    "sparse": (lambda: nn.Embedding(5, 3, sparse=True), {}, "sparse gradients"),
    "complex": (lambda: nn.Linear(2, 3, dtype=torch.complex64), {}, "complex64"),
    "place": (lambda: nn.Linear(2, 3), {"on": "gradients"}, "did you mean 'gradient'"),
    "scale": (lambda: nn.Linear(2, 3), {"scale": "papre"}, "did you mean 'paper'"),
    "solver": (lambda: nn.Linear(2, 3), {"solver": "sdv"}, "sdv"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_layer_and_the_remedy(case):
    make_layer, options, message = BAD[case]
    layer = make_layer()
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2)), *layer.parameters()], lr=0.1)
    with pytest.raises(ValueError, match=message):
        NearestOrthogonalGradient(optimizer, {"x": layer}, **options)
    assert not optimizer._optimizer_step_pre_hooks


def test_bad_optimizers_and_repeats_are_refused():
    layer = nn.Linear(2, 3)
    with pytest.raises(ValueError, match=r"layer 'fc' \(Linear\): the optimizer does not hold its weight"):
        NearestOrthogonalGradient(sgd(nn.Linear(2, 3)), {"fc": layer})
    with pytest.raises(ValueError, match="LBFGS evaluates the gradient several times"):
        NearestOrthogonalGradient(torch.optim.LBFGS(layer.parameters()), layer)
    with pytest.raises(ValueError, match="update direction of Adafactor is unknown"):
        NearestOrthogonalGradient(torch.optim.Adafactor(layer.parameters()), layer, on="update")
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer, got Linear"):
        NearestOrthogonalGradient(layer, layer)
    with pytest.raises(TypeError, match="expected layers or parameters to treat, got Tensor at '0'"):
        NearestOrthogonalGradient(sgd(layer), [torch.zeros(2, 2)])
    with pytest.raises(ValueError, match="no layer or parameter"):
        NearestOrthogonalGradient(sgd(layer), [])
    with pytest.raises(ValueError, match="has the same weight; name one"):
        NearestOrthogonalGradient(sgd(layer), [layer, layer])
    optimizer = sgd(layer)
    NearestOrthogonalGradient(optimizer, layer)
    with pytest.raises(ValueError, match="already on"):
        NearestOrthogonalGradient(optimizer, layer)


def test_layers_that_share_a_weight_are_told_so():
    one, other = nn.Linear(4, 4), nn.Linear(4, 4)
    other.weight = one.weight
    optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"layer 'b' \(Linear\): layer 'a' \(Linear\) has the same weight; name one"):
        NearestOrthogonalGradient(optimizer, {"a": one, "b": other})
    NearestOrthogonalGradient(optimizer, {"a": one})


def test_a_weight_that_left_the_optimizer_is_not_skipped_in_silence():
    layer = nn.Linear(2, 3)
    optimizer = sgd(layer)
    NearestOrthogonalGradient(optimizer, {"fc": layer})
    optimizer.param_groups[0]["params"] = [layer.bias]
    with pytest.raises(RuntimeError, match=r"'fc'.*no longer holds"):
        optimizer.step()


def test_a_sparse_gradient_is_refused():
    parameter = nn.Parameter(torch.zeros(5, 3))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    NearestOrthogonalGradient(optimizer, parameter)
    parameter.grad = torch.eye(5, 3).to_sparse()
    with pytest.raises(ValueError, match="gradient is sparse"):
        optimizer.step()
