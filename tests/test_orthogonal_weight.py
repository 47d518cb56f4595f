"""OW: the weight in use is exactly orthogonal, eq. (13), starts at the nearest one, and nobody else notices."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

from treatment_models import LAYERS, gaussian, orthogonality_gap, polar_reference
from wellcond.orthogonality import orthogonal_weight, spectral_norm
from wellcond.orthogonality._stiefel_maps import cayley_map, exponential_map, householder_map

EPS = torch.finfo(torch.float32).eps
MAPS = {"exp": exponential_map, "cayley": cayley_map, "householder": householder_map}
SHAPES = [(5, 5), (6, 4), (9, 3), (10, 3), (64, 5), (7, 1), (1, 1)]  # square, n ≤ 3k, n > 3k, vectors


def frame(n: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(gaussian(n, k, seed=seed))[0]


def stored(layer: nn.Module) -> nn.Parameter:
    return layer.parametrizations.weight.original


# The map ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_the_economical_forms_equal_the_dense_definitions(shape, size):
    """SciPy's exponential and solve of the n × n skew matrix, in float64."""
    V, F = size * gaussian(*shape, seed=1), frame(*shape)
    S = (V @ F.T - F @ V.T).numpy()
    dense = scipy.linalg.expm(S) @ F.numpy()
    # The exponential of S is known to eps·‖S‖, in either way of computing it.
    tolerance = 100 * np.finfo(np.float64).eps * (1 + np.linalg.norm(S, 2)) * shape[0]
    assert np.abs(exponential_map(V, F).numpy() - dense).max() <= tolerance
    eye = np.eye(shape[0])
    dense = np.linalg.solve(eye - S / 2, eye + S / 2) @ F.numpy()
    assert np.abs(cayley_map(V, F).numpy() - dense).max() <= tolerance * (1 + np.linalg.norm(S, 2))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_the_householder_map_is_a_product_of_reflections(shape, size):
    """One reflection after another, along the lower triangle of V in the coordinates of a QR decomposition of F."""
    n, k = shape
    V, F = (size * gaussian(*shape, seed=1)).numpy(), frame(*shape).numpy()

    def reflection(y: np.ndarray) -> np.ndarray:
        return np.eye(n) - 2 * np.outer(y, y) / (y @ y)

    G, rest = np.eye(n), F.copy()
    for j in range(k):  # Householder's QR: each reflection takes the rest of column j to a multiple of a unit vector
        y = np.zeros(n)
        y[j:] = rest[j:, j]
        y[j] += np.copysign(np.linalg.norm(y), y[j])
        G, rest = G @ reflection(y), reflection(y) @ rest
    X = G.T @ (V - F @ (F.T @ V + V.T @ F) / 2)
    signs = np.sign(np.diag(F.T @ G[:, :k]))
    W = np.eye(n)
    for j in range(k):
        y = np.zeros(n)
        y[j], y[j + 1 :] = 1, X[j + 1 :, j]
        W = W @ reflection(y)
    expected = -(G @ W)[:, :k] * signs
    assert np.abs(householder_map(torch.from_numpy(V), torch.from_numpy(F)).numpy() - expected).max() < 1e-12 * (
        1 + size
    )
    assert (
        torch.dist(householder_map(torch.zeros_like(torch.from_numpy(V)), torch.from_numpy(F)), frame(*shape))
        < 1e-13 * n
    )


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("shape", [(4, 4), (5, 3), (10, 2)])
@pytest.mark.parametrize("at_start", [True, False])
def test_derivatives_are_exact_also_where_the_skew_matrix_vanishes(name, shape, at_start):
    """At the start S = 0: V = F·H with a symmetric H, every singular value of the low-rank form repeated or zero."""
    F = frame(*shape)
    V = (F @ torch.diag(torch.ones(shape[1], dtype=torch.float64)) if at_start else gaussian(*shape, seed=1)).clone()
    V.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: MAPS[name](v, F), V)
    assert torch.autograd.gradgradcheck(lambda v: MAPS[name](v, F), V)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("shape", [(4, 4), (10, 2)])
def test_forward_derivatives_of_a_batch_are_those_of_each(name, shape):
    """Of several networks at once, for example; torch.linalg.solve gives 1e75 times these."""
    F = frame(*shape)
    stored = torch.stack([gaussian(*shape, seed=seed) for seed in range(3)])
    each = torch.stack([torch.func.jacrev(lambda v: MAPS[name](v, F))(V) for V in stored])
    together = torch.func.vmap(torch.func.jacfwd(lambda v: MAPS[name](v, F)))(stored)
    assert (together - each).abs().max() < 1e-12 * each.abs().max()


@settings(deadline=None, max_examples=50)
@given(
    shape=st.sampled_from(SHAPES),
    seed=st.integers(0, 2**32 - 1),
    size=st.floats(0, 100),
    name=st.sampled_from(sorted(MAPS)),
)
def test_any_stored_matrix_gives_an_orthogonal_one(shape, seed, size, name):
    V, F = (size * gaussian(*shape, seed=seed)).float(), frame(*shape).float()
    W = MAPS[name](V, F).double()
    gap = (W.T @ W - torch.eye(shape[1], dtype=torch.float64)).abs().max()
    # The argument's norm is at most 2‖V‖; its rounding, and for Cayley the solve's, act on the result with that size.
    norm = 1 + 2 * float(torch.linalg.matrix_norm(V, 2))
    assert gap <= 10 * EPS * shape[0] * (norm if name == "exp" else norm**2)


# The layer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("kind", LAYERS)
def test_every_layer_starts_at_the_nearest_orthogonal_weight(kind, name):
    layer = LAYERS[kind]()
    before = layer.weight.detach().clone()
    parameter = layer.weight
    assert orthogonal_weight(layer, map=name) is layer
    assert (layer.weight - polar_reference(layer, before)).abs().max() <= 50 * EPS
    assert orthogonality_gap(layer) <= 50 * EPS
    assert stored(layer) is parameter  # the optimizer's, with its values
    assert torch.equal(parameter, before)
    with torch.no_grad():
        parameter.add_(torch.randn_like(parameter))
    assert orthogonality_gap(layer) <= 50 * EPS
    assert (layer.weight - polar_reference(layer, before)).abs().max() > 1e-2 or min(layer.weight.shape) == 1


def test_a_rank_deficient_or_zero_weight_starts_at_some_orthogonal_one():
    layer = nn.Linear(6, 4)
    layer.weight.data.zero_()
    orthogonal_weight(layer)
    assert orthogonality_gap(layer) <= 10 * EPS


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("kind", ["conv2d", "conv2d wide"])
def test_it_stays_orthogonal_for_a_thousand_steps_with_weight_decay(kind, name):
    """Gap below 1e-5 in float32 through 1,000 steps of SGD with momentum and a strong weight decay."""
    torch.manual_seed(0)
    layer = orthogonal_weight(LAYERS[kind](), map=name)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    worst, targets = 0.0, [gaussian(*layer.weight.shape, seed=seed).float() for seed in range(7)]
    for step in range(1000):
        optimizer.zero_grad()
        (layer.weight * targets[step % 7]).sum().backward()
        optimizer.step()
        if step % 50 == 49:
            worst = max(worst, orthogonality_gap(layer))
    assert worst < 1e-5


def test_weight_decay_alone_draws_it_back_to_the_start():
    layer = orthogonal_weight(nn.Linear(4, 9))
    start = layer.weight.detach().clone()
    with torch.no_grad():
        stored(layer).add_(torch.randn(9, 4))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5, weight_decay=0.5)
    distances = [torch.dist(layer.weight, start).item()]
    for _ in range(40):
        optimizer.zero_grad()
        (0 * layer.weight.sum() + 0 * layer.bias.sum()).backward()
        optimizer.step()
        distances.append(torch.dist(layer.weight, start).item())
        assert orthogonality_gap(layer) < 1e-5
    assert distances[0] > 0.5
    assert distances[-1] < 1e-3


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("shape", [(4, 12), (8, 4)])
def test_every_orthogonal_matrix_can_be_learnt(name, shape):
    """Descent on the distance reaches a random target: the map is onto, not onto a slice of the manifold.

    The exponential has conjugate points, where a descent may stop; so one of three starts has to arrive.
    """
    target = frame(max(shape), min(shape), seed=5)
    target = target if shape[0] >= shape[1] else target.T
    assert min(distance_learnt(name, target, seed) for seed in range(3)) < 1e-4


def distance_learnt(name: str, target: torch.Tensor, seed: int) -> float:
    torch.manual_seed(seed)
    layer = orthogonal_weight(nn.Linear(*target.T.shape, bias=False).double(), map=name)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (layer.weight - target).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return torch.dist(layer.weight, target).item()


def test_the_optimizer_keeps_its_parameter_and_state():
    layer = nn.Conv2d(3, 8, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    layer(torch.randn(2, 3, 5, 5)).sum().backward()
    optimizer.step()
    buffer = optimizer.state[layer.weight]["momentum_buffer"]
    orthogonal_weight(layer)
    assert optimizer.param_groups[0]["params"][0] is stored(layer)
    assert optimizer.state[stored(layer)]["momentum_buffer"] is buffer
    before = layer.weight.detach().clone()
    optimizer.zero_grad()
    layer(torch.randn(2, 3, 5, 5)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(layer.weight, before)


def test_hooks_on_the_parameter_stay():
    """DDP's reduction hangs on the parameter's gradient accumulator, which torch's registration would replace."""
    layer = nn.Linear(3, 4)
    accumulator = layer.weight.expand_as(layer.weight).grad_fn.next_functions[0][0]
    fired = []
    accumulator.register_hook(lambda *_: fired.append("accumulator"))
    layer.weight.register_post_accumulate_grad_hook(lambda _: fired.append("parameter"))
    orthogonal_weight(layer)
    layer(torch.randn(2, 3)).sum().backward()
    assert sorted(fired) == ["accumulator", "parameter"]


def test_a_failed_registration_leaves_the_layer(monkeypatch):
    layer = nn.Linear(3, 4)
    weight = layer.weight

    def fail(*_, **__):
        raise torch.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(torch.linalg, "svd", fail)
    with pytest.raises(torch.linalg.LinAlgError):
        orthogonal_weight(layer)
    assert layer.weight is weight
    assert type(layer) is nn.Linear


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_layers_compute_in_float32_and_round_once(dtype, name):
    layer = orthogonal_weight(nn.Conv2d(3, 32, 3), map=name)
    with torch.no_grad():
        stored(layer).copy_(stored(layer).to(dtype))  # so that the float32 layer has the values of the half one
    full = layer.weight.detach().clone()
    layer.to(dtype)
    assert layer.weight.dtype == dtype
    assert layer.parametrizations.weight[0].frame.dtype == torch.float32
    assert torch.equal(layer.weight, full.to(dtype))
    # Rounding entries by eps·|w| moves the Gram matrix by no more than 2·eps·k^½ in norm.
    assert orthogonality_gap(layer) < 2 * torch.finfo(dtype).eps * 27**0.5
    layer.float()
    assert torch.equal(layer.weight, full)
    born_half = orthogonal_weight(nn.Conv2d(3, 32, 3).to(dtype), map=name)
    assert orthogonality_gap(born_half) < 2 * torch.finfo(dtype).eps * 27**0.5


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(32, 3), (3, 32), (96, 1)])  # tall, wide, and too tall for a dense exponential
def test_a_frame_that_was_cast_gives_an_orthogonal_weight(dtype, name, shape):
    torch.manual_seed(0)
    layer, other = (orthogonal_weight(nn.Conv2d(shape[1], shape[0], 3), map=name) for _ in range(2))
    with torch.no_grad():
        stored(layer).add_(torch.randn_like(stored(layer)))
    other.load_state_dict({key: value.to(dtype) for key, value in layer.state_dict().items()}, assign=True)
    assert other.parametrizations.weight[0].frame.dtype == dtype
    eps, k = torch.finfo(dtype).eps, min(shape[0], 9 * shape[1])
    assert orthogonality_gap(other) < 2 * eps * k**0.5
    x, layer = torch.randn(2, shape[1], 5, 5, dtype=dtype), layer.to(dtype)
    assert (other(x) - layer(x)).norm() < 16 * eps * layer(x).norm()
    other(x).sum().backward()
    assert torch.isfinite(stored(other).grad).all()


def test_autocast_does_not_reach_the_weight():
    layer = orthogonal_weight(nn.Linear(7, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.weight, orthogonal_weight_outside(layer))
        assert layer(torch.randn(2, 7)).dtype == torch.bfloat16


def orthogonal_weight_outside(layer: nn.Module) -> torch.Tensor:
    with torch.autocast("cpu", enabled=False):
        return layer.weight


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_layer_resumes_exactly(name, dtype, tmp_path):
    torch.manual_seed(0)
    layer = orthogonal_weight(nn.Conv2d(3, 8, 3).to(dtype), map=name)
    with torch.no_grad():
        stored(layer).add_(torch.randn(8, 3, 3, 3))
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    other = orthogonal_weight(nn.Conv2d(3, 8, 3).to(dtype), map=name)
    other.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    assert torch.equal(other.weight, layer.weight)


@pytest.mark.parametrize("both", [False, True])
def test_copies_and_pickles_are_whole_and_independent(both):
    layer = orthogonal_weight(nn.Conv2d(3, 8, 3))
    if both:
        spectral_norm(layer)
    with torch.no_grad():
        stored(layer).add_(torch.randn(8, 3, 3, 3))
    model = nn.Sequential(layer, nn.ReLU())
    x = torch.randn(2, 3, 5, 5)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(layer)):
        first = twin[0] if isinstance(twin, nn.Sequential) else twin
        assert torch.equal(first(x), layer(x))
        assert list(first.state_dict()) == list(layer.state_dict())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        stored(twin[0]).add_(1)
    assert orthogonality_gap(twin[0]) < 1e-5
    assert not torch.equal(twin[0].weight, layer.weight)
    assert pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(layer)))).weight.equal(layer.weight)


def test_a_weight_can_be_assigned():
    layer = orthogonal_weight(nn.Linear(6, 4))
    value = torch.randn(4, 6)
    layer.weight = value
    assert (layer.weight - polar_reference(nn.Linear(6, 4), value)).abs().max() < 50 * EPS


def test_torchs_own_removal_leaves_the_weight_in_use():
    layer = orthogonal_weight(nn.Linear(6, 4))
    weight = layer.weight.detach().clone()
    parametrize.remove_parametrizations(layer, "weight")
    assert torch.equal(layer.weight, weight)
    assert type(layer) is nn.Linear


def test_bad_layers_and_maps_are_refused():
    with pytest.raises(ValueError, match=r"layer '' \(BatchNorm2d\) has a weight of shape \(3,\)"):
        orthogonal_weight(nn.BatchNorm2d(3))
    with pytest.raises(ValueError, match=r"unknown map of the orthogonal weight 'caley'; did you mean 'cayley'"):
        orthogonal_weight(nn.Linear(2, 2), map="caley")
    layer = orthogonal_weight(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"orthogonal weight of layer '' \(Linear\) is already on"):
        orthogonal_weight(layer)
    with pytest.raises(ValueError, match="put it on before the spectral norm"):
        orthogonal_weight(spectral_norm(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="already has the parametrisation _SpectralNorm"):
        orthogonal_weight(nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2)))
    broken = nn.Linear(2, 2)
    broken.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layer '' \(Linear\): its weight holds NaN"):
        orthogonal_weight(broken)
    assert type(broken) is nn.Linear


def test_a_layer_with_other_parametrisations_cannot_be_pickled_and_says_so():
    layer = orthogonal_weight(nn.Linear(3, 3))
    parametrize.register_parametrization(layer, "bias", nn.Tanh())
    with pytest.raises(RuntimeError, match="save its state_dict"):
        pickle.dumps(layer)
