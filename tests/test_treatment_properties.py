"""Properties of the treatments over random layers, gradients, optimizers and combinations, through the public calls.

Beside them: the nearest matrix and its singular vectors in ``test_nearest_orthogonal_gradient``, both rules of the
learning rate in ``test_optimal_learning_rate``, 1,000 steps of an orthogonal weight in ``test_orthogonal_weight``.
"""

from __future__ import annotations

import copy
import itertools
from functools import partial

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import treatment_models
from treatment_models import LAYERS, matrices, orthogonality_gap
from wellcond.orthogonality import TREATMENTS, NearestOrthogonalGradient, OptimalLearningRate, treat

EPS = torch.finfo(torch.float32).eps
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "foreach": lambda p: torch.optim.Adam(p, lr=0.05, foreach=True, amsgrad=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
    "single": lambda p: torch.optim.RMSprop(p, lr=0.01, foreach=False),
}
kinds = st.sampled_from(sorted(LAYERS))
seeds = st.integers(0, 2**31)
optimizers = st.sampled_from(sorted(OPTIMIZERS))
combinations = st.lists(st.sampled_from(list(TREATMENTS)), unique=True, min_size=1)


gaussian = partial(treatment_models.gaussian, dtype=torch.float32)


def made(kind: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return LAYERS[kind]()


def step(layer: nn.Module, optimizer: torch.optim.Optimizer, seed: int, term=lambda: 0.0) -> None:
    """One step on a random linear function of the weight in use."""
    optimizer.zero_grad()
    ((layer.weight * gaussian(*layer.weight.shape, seed=seed)).sum() + term()).backward()
    optimizer.step()


@settings(deadline=None, max_examples=60)
@given(kind=kinds, seed=seeds, exponent=st.integers(-25, 25))
def test_the_gradient_of_any_layer_becomes_the_polar_factor_whatever_its_scale(kind, seed, exponent):
    """SciPy's polar decomposition, and no nearer orthogonal matrix among random ones. Clipping is such a scale."""
    layer = made(kind, seed)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    NearestOrthogonalGradient(optimizer, layer)
    gradient = gaussian(*layer.weight.shape, seed=seed) * 10.0**exponent
    layer.weight.grad = gradient.clone()
    optimizer.step()
    rng = np.random.default_rng(seed)
    for (R, _), (G, _) in zip(matrices(layer, layer.weight.grad), matrices(layer, gradient), strict=True):
        G = G / 10.0**exponent
        kappa = np.linalg.cond(G)
        U, _ = scipy.linalg.polar(G, side="right" if G.shape[0] >= G.shape[1] else "left")
        assert np.abs(R - U).max() <= 10 * EPS * kappa  # the condition number of the polar factor is below κ(G)
        for _ in range(5):
            A, _, B = np.linalg.svd(rng.standard_normal(G.shape), full_matrices=False)
            assert np.linalg.norm(G - A @ B) >= np.linalg.norm(G - R) - 100 * EPS * kappa


@settings(deadline=None, max_examples=40)
@given(kind=kinds, seed=seeds, optimizer=optimizers, rule=st.sampled_from(["paper", "exact"]))
def test_the_rate_shortens_the_optimizers_own_step_and_changes_nothing_else(kind, seed, optimizer, rule):
    """W moves along the step of an untreated twin, by a share between 0 and 1; the state is the twin's, bit for bit."""
    layer, twin = made(kind, seed), made(kind, seed)
    mine, plain = OPTIMIZERS[optimizer](layer.parameters()), OPTIMIZERS[optimizer](twin.parameters())
    olr = OptimalLearningRate(mine, {"x": layer}, rule=rule)
    lr = mine.param_groups[0]["lr"]
    start = layer.weight.detach().clone()
    step(layer, mine, seed)
    step(twin, plain, seed)
    share = olr.rates()["x"].item() / lr
    assert 0 < share <= 1
    expected = start.double() + share * (twin.weight.double() - start.double())
    # One rounding of the optimizer's weight and one of the shortened one.
    assert (layer.weight - expected).abs().max() <= 4 * EPS * max(start.abs().max(), twin.weight.abs().max())
    for key, value in plain.state[twin.weight].items():
        other = mine.state[layer.weight][key]
        assert torch.equal(other, value) if isinstance(value, Tensor) else other == value


@settings(deadline=None, max_examples=40)
@given(kind=kinds, seed=seeds, names=combinations, optimizer=optimizers)
def test_combinations_do_not_depend_on_the_order_of_their_names(kind, seed, names, optimizer):
    weights = []
    for order in (names, names[::-1], sorted(names)):
        layer = made(kind, seed)
        stepper = OPTIMIZERS[optimizer](layer.parameters())
        treatment = treat(layer, stepper, "+".join(order), layers=[layer])
        for i in range(2):
            step(layer, stepper, seed + i, treatment.loss)
        weights.append(layer.weight.detach())
    assert all(torch.equal(a, b) for a, b in itertools.pairwise(weights))


@settings(deadline=None, max_examples=40)
@given(kind=kinds, seed=seeds, optimizer=optimizers, scale=st.floats(0.01, 20))
def test_an_orthogonal_weight_stays_so_with_any_step(kind, seed, optimizer, scale):
    layer = made(kind, seed)
    stepper = OPTIMIZERS[optimizer](layer.parameters())
    treat(layer, stepper, "nog+ow+olr", layers=[layer])
    stepper.param_groups[0]["lr"] *= scale
    for i in range(5):
        step(layer, stepper, seed + i)
        assert orthogonality_gap(layer) < 1e-5


# Removal ---------------------------------------------------------------------------------------------------------


def anatomy(model: nn.Module, optimizer: torch.optim.Optimizer) -> list:
    """Everything of a model and an optimizer that a treatment could leave behind, apart from values."""
    parts: list = []
    for name, m in model.named_modules():
        held = sorted(vars(m)), list(m._parameters), list(m._buffers), list(m._modules), m.training
        hooks = [(key, len(value)) for key, value in sorted(vars(m).items()) if "hooks" in key]
        parts.append((name, type(m), held, hooks))
    parts += [(name, id(p), p.requires_grad, p._backward_hooks) for name, p in model.named_parameters()]
    parts += [
        sorted(vars(optimizer)),
        len(optimizer._optimizer_step_pre_hooks),
        len(optimizer._optimizer_step_post_hooks),
    ]
    parts += [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return [*parts, [[id(p) for p in group["params"]] for group in optimizer.param_groups]]


def values(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    state = [v for s in optimizer.state_dict()["state"].values() for v in s.values()]
    return [*model.state_dict().values(), *(v for v in state if isinstance(v, Tensor))]


@settings(deadline=None, max_examples=80)
@given(kind=kinds, seed=seeds, names=combinations, optimizer=optimizers, before=st.integers(0, 2))
def test_a_removed_treatment_leaves_no_trace(kind, seed, names, optimizer, before):
    """Put on in the middle of training and taken off before a step: nothing has changed, and nothing changes later."""
    layer = made(kind, seed)
    stepper = OPTIMIZERS[optimizer](layer.parameters())
    for i in range(before):
        step(layer, stepper, seed + i)
    twin = copy.deepcopy(layer)
    twin_stepper = OPTIMIZERS[optimizer](twin.parameters())
    twin_stepper.load_state_dict(copy.deepcopy(stepper.state_dict()))
    shape, held = anatomy(layer, stepper), [v.clone() for v in values(layer, stepper)]
    treatment = treat(layer, stepper, "+".join(names), layers=[layer])
    layer.weight.sum()
    treatment.remove()
    assert anatomy(layer, stepper) == shape
    assert all(torch.equal(a, b) for a, b in zip(values(layer, stepper), held, strict=True))
    for i in range(2):
        step(layer, stepper, seed + 5 + i)
        step(twin, twin_stepper, seed + 5 + i)
    assert all(torch.equal(a, b) for a, b in zip(values(layer, stepper), values(twin, twin_stepper), strict=True))


@settings(deadline=None, max_examples=40)
@given(kind=kinds, seed=seeds, names=combinations, optimizer=optimizers)
def test_removed_after_training_the_layer_keeps_its_weight_and_is_its_own_again(kind, seed, names, optimizer):
    layer = made(kind, seed)
    stepper = OPTIMIZERS[optimizer](layer.parameters())
    step(layer, stepper, seed)
    shape = anatomy(layer, stepper)
    treatment = treat(layer, stepper, "+".join(names), layers=[layer])
    for i in range(2):
        step(layer, stepper, seed + i, treatment.loss)
    in_use = layer.weight.detach().clone()
    treatment.remove()
    treatment.remove()
    assert anatomy(layer, stepper) == shape
    assert torch.equal(layer.weight, in_use)
    assert treatment.loss().item() == 0


def test_one_of_two_treatments_of_an_optimizer_can_be_removed():
    a, b = made("conv2d", 0), made("linear", 0)
    optimizer = torch.optim.SGD([*a.parameters(), *b.parameters()], lr=0.1)
    first, second = treat(a, optimizer, "nog", layers=[a]), treat(b, optimizer, "nog+olr", layers=[b])
    first.remove()
    with pytest.raises(ValueError, match="already on"):
        treat(b, optimizer, "olr", layers=[b])
    gradient = gaussian(*a.weight.shape, seed=1)
    a.weight.grad, b.weight.grad = gradient.clone(), gaussian(*b.weight.shape, seed=2)
    optimizer.step()
    assert torch.equal(a.weight.grad, gradient)
    assert second.nog.counts()[""]["treated"] == 1
