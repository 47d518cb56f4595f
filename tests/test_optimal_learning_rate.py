"""OLR takes the rate of eq. (20) or the minimiser of eq. (18), under the guard of eq. (21), with any optimizer step."""

from __future__ import annotations

import copy
import importlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from treatment_models import LAYERS, batches, gaussian, matrices, same, small_net, train
from wellcond.orthogonality import NearestOrthogonalGradient, OptimalLearningRate
from wellcond.orthogonality._optimizers import LINEAR_IN_LR
from wellcond.orthogonality._rates import exact_rate, paper_rate

seeds = st.integers(0, 2**32 - 1)
shapes = st.tuples(st.integers(1, 8), st.integers(1, 8))


def orthogonal(n: int, seed: int) -> torch.Tensor:
    Q, R = torch.linalg.qr(gaussian(n, n, seed=seed))
    return Q * R.diagonal().sign()


def objective(W: np.ndarray, L: np.ndarray, eta) -> np.ndarray:
    """The square of eq. (18) on the smaller Gram side, straight from its definition, for an array of rates."""
    moved = W - np.asarray(eta)[..., None, None] * L
    gram = moved.swapaxes(-2, -1) @ moved if W.shape[0] >= W.shape[1] else moved @ moved.swapaxes(-2, -1)
    return ((gram - np.eye(gram.shape[-1])) ** 2).sum((-2, -1))


# The two rules ---------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(shape=shapes, seed=seeds)
def test_the_paper_rate_is_the_zero_of_its_truncated_derivative(shape, seed):
    """The line above eq. (20), term by term: −4 wwᵀlᵀw + 4η wwᵀlᵀl + 8η (lᵀw)² = 0 with wwᵀ read as wᵀw."""
    W, L = gaussian(*shape, seed=seed), gaussian(*shape, seed=seed + 1)
    eta = paper_rate(W, L).item()
    ww, wl, ll = (W * W).sum().item(), (W * L).sum().item(), (L * L).sum().item()
    terms = [-4 * ww * wl, 4 * eta * ww * ll, 8 * eta * wl * wl]
    assert abs(sum(terms)) <= 1e-13 * sum(map(abs, terms))  # three float64 roundings of each term


@settings(deadline=None)
@given(n=st.integers(1, 16), seed=seeds)
def test_the_paper_rate_of_orthogonal_pairs_is_bounded(n, seed):
    """η* = Nt/(N² + 2t²) with t = tr(LᵀW) has supremum 1/(2√2), reached at t = N/√2; Proposition 1 does not hold."""
    W, L = orthogonal(n, seed), orthogonal(n, seed + 1)
    eta = paper_rate(W, L).item()
    t = torch.trace(L.T @ W).item()
    assert eta == pytest.approx(n * t / (n * n + 2 * t * t), rel=1e-9, abs=1e-12)
    assert abs(eta) <= 1 / (2 * math.sqrt(2)) + 1e-12


def test_the_bound_is_reached_and_not_that_of_proposition_1():
    angle = torch.tensor(math.pi / 4, dtype=torch.float64)
    W = torch.eye(2, dtype=torch.float64)
    L = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    assert paper_rate(W, L).item() == pytest.approx(1 / (2 * math.sqrt(2)), abs=1e-12)
    assert paper_rate(W, -L).item() < 0 < 1 / (2**2 + 2)  # below the lower bound the proposition claims


@settings(deadline=None, max_examples=150)
@given(
    shape=shapes.filter(lambda s: s != (1, 1)),  # where the tangent direction is zero
    seed=seeds,
    w=st.floats(0.05, 20),
    l=st.floats(1e-3, 1e3),
    tangent=st.booleans(),
)
def test_the_exact_rate_minimises_the_objective(shape, seed, w, l, tangent):
    """Against a grid over all rates that can matter, and the roots of the cubic by NumPy's companion matrix."""
    W, L = w * gaussian(*shape, seed=seed), l * gaussian(*shape, seed=seed + 1)
    if tangent:  # a rate that is near zero
        L = L - W * (W * L).sum() / (W * W).sum()
    eta = exact_rate(W, L).item()
    W, L = W.numpy(), L.numpy()
    # ‖W − ηL‖ ≥ |η|‖L‖ − ‖W‖ is so large beyond this radius that no η there is better than 0.
    radius = 2 * (np.linalg.norm(W) + math.sqrt(max(shape)) + 1) / np.linalg.norm(L)
    grid = np.linspace(-radius, radius, 4001)
    sample = np.array([-2, -1, 0, 1, 2.0]) * radius
    quartic = np.polynomial.Polynomial.fit(sample, objective(W, L, sample), 4)
    roots = quartic.deriv().roots()
    roots = roots.real[abs(roots.imag) < 1e-6 * radius]
    best = min(objective(W, L, grid).min(), objective(W, L, roots).min() if len(roots) else np.inf)
    scale = objective(W, L, 0.0) + 1  # the objective is a difference of terms of this size
    assert objective(W, L, eta) <= best + 1e-6 * 1e-6 * scale


@pytest.mark.parametrize("c", [0.3, 1.0, 2.0, 7.0])
def test_the_exact_rate_makes_a_multiple_of_an_orthogonal_matrix_orthogonal(c):
    """W = L = cQ: the minimum 0 is at η = 1 ± 1/c, with a maximum between them (three real roots)."""
    W = c * orthogonal(6, 0)
    assert abs(exact_rate(W, W).item() - 1) == pytest.approx(1 / c, rel=1e-7)


def test_repeated_roots_of_the_cubic_lose_no_digits():
    """W orthogonal and L = WA with A skew: A₀ = B = 0, a quartic η⁴‖C‖² with a triple root at zero."""
    W, A = orthogonal(6, 0), gaussian(6, 6, seed=1)
    assert abs(exact_rate(W, W @ (A - A.T)).item()) < 1e-4  # a triple root is known to the cube root of eps


def test_the_groups_of_a_convolution_share_the_rate_that_is_best_for_their_sum():
    W, L = gaussian(3, 4, 5), gaussian(3, 4, 5, seed=1)
    eta = exact_rate(W, L).item()
    grid = np.linspace(-3, 3, 60001)
    total = sum(objective(W[g].numpy(), L[g].numpy(), grid) for g in range(3))
    assert eta == pytest.approx(grid[total.argmin()], abs=1e-4)  # the grid's spacing
    blocks = torch.block_diag(*W), torch.block_diag(*L)  # which is what the layer is
    assert eta == pytest.approx(exact_rate(*blocks).item(), abs=1e-9)
    assert paper_rate(W, L).item() == pytest.approx(paper_rate(*blocks).item(), abs=1e-12)


@pytest.mark.parametrize("rule", [paper_rate, exact_rate])
@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e30])
def test_tiny_and_huge_gradients_do_not_over_or_underflow(rule, scale):
    W, L = gaussian(5, 4).float(), gaussian(5, 4, seed=1).float()
    if rule(W, L) < 0:
        L = -L
    # One rounding of each entry of L, damped: the rates are smooth functions of it.
    assert rule(W, L * scale).item() * scale == pytest.approx(rule(W, L).item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("samples", "size"), [(8, 6), (512, 32), (4096, 64)])
def test_a_loss_that_does_not_see_the_length_of_the_weight_never_stops_it(dtype, samples, size):
    """⟨W, L⟩ is zero then (Euler), but computed as some eps‖W‖‖L‖, which is no rate to go on with."""
    torch.manual_seed(0)
    for _ in range(40):
        W = torch.randn(size, size, dtype=dtype, requires_grad=True)
        x = torch.randn(samples, size, dtype=dtype)
        y = x @ (W / torch.linalg.matrix_norm(W)).mT
        (y.tanh().square().mean() * 1e3).backward()
        assert paper_rate(W.detach(), W.grad).item() == 0.0


def test_a_product_that_is_not_rounding_is_not_taken_for_it():
    """Of random pairs ⟨W, L⟩ is about ‖W‖‖L‖/√N, far above the bound up to N = 1/eps."""
    for n in (8, 64, 1024):
        W, L = torch.randn(n, n), torch.randn(n, n)
        L = L + 0.05 / n * W  # and never below a twentieth of that
        assert paper_rate(W, L).item() != 0.0


def test_a_product_within_rounding_counts_as_zero():
    """Along the tangent space of an orthogonal W the sign of ⟨W, L⟩ is noise, which must not choose a rate of 1e-8."""
    W, A = orthogonal(8, 0).float(), gaussian(8, 8, seed=1).float()
    L = W @ (A - A.T)
    assert abs((W * L).sum()) < 1e-5
    assert paper_rate(W, L) == 0


# The step --------------------------------------------------------------------------------------------------------


def options_of(name: str) -> list[dict]:
    more = {
        "SGD": [
            {"momentum": 0.9, "weight_decay": 1e-2},
            {"momentum": 0.9, "nesterov": True, "foreach": True},
            {"momentum": 0.5, "dampening": 0.3, "fused": True},
            {"maximize": True},
        ],
        "Adam": [{"amsgrad": True, "weight_decay": 1e-2, "foreach": True}, {"fused": True}],
        "AdamW": [{"weight_decay": 0.1, "foreach": False}, {"fused": True, "weight_decay": 0.1}],
        "NAdam": [{"weight_decay": 0.1, "decoupled_weight_decay": True}],
        "RAdam": [{"weight_decay": 0.1, "decoupled_weight_decay": True}],
        "RMSprop": [{"momentum": 0.9, "centered": True}],
        "Adagrad": [{"lr_decay": 0.1}],
    }
    return [{}, *more.get(name, [])]


STEPS = [(cls.__name__, options) for cls in LINEAR_IN_LR for options in options_of(cls.__name__)]


@pytest.mark.parametrize(("name", "options"), STEPS)
@pytest.mark.parametrize("rule", ["paper", "exact"])
def test_a_step_equals_that_of_a_group_of_its_own_with_that_rate(name, options, rule):
    """The same gradients to the same optimizer, where the weight has its own group whose lr is set by hand.

    This also shows that the optimizer's step is proportional to its rate and that its state does not depend on it.
    """
    optimizer_class = getattr(torch.optim, name)
    weight = gaussian(6, 4, seed=9).float()
    mine, own = nn.Parameter(weight.clone()), nn.Parameter(weight.clone())
    optimizer = optimizer_class([mine], lr=0.5, **options)
    olr = OptimalLearningRate(optimizer, {"w": mine}, rule=rule)
    reference = optimizer_class([own], lr=0.5, **options)
    taken = 0
    for i in range(8):
        gradient = gaussian(6, 4, seed=i).float()
        mine.grad, own.grad = gradient.clone(), gradient.clone()
        before = own.detach().clone()
        optimizer.step()
        L = -gradient if options.get("maximize") else gradient
        eta = (paper_rate if rule == "paper" else exact_rate)(before, L).item()
        reference.param_groups[0]["lr"] = eta if 0 < eta < 0.5 else 0.5
        reference.step()
        taken += 0 < eta < 0.5
        # The rate is a smooth function of a weight that agrees to the tolerance below.
        assert olr.rates()["w"].item() == pytest.approx(reference.param_groups[0]["lr"], rel=1e-4)
    assert 0 < taken < 8
    assert olr.counts() == {"w": {"shortened": taken}}
    # Each step rounds p' and its interpolation once (eps·|p|), and the rate moves with that: a factor of 10 per step.
    error = (mine - own).abs().max().item() / own.abs().max().item()
    assert error <= 8 * 10 * torch.finfo(torch.float32).eps
    for key, value in reference.state[own].items():
        if isinstance(value, torch.Tensor):
            assert torch.allclose(optimizer.state[mine][key], value, rtol=1e-4, atol=1e-6), key


@pytest.mark.parametrize("name", ["ASGD", "Rprop", "Adafactor", "LBFGS", "SparseAdam"])
def test_an_optimizer_with_an_unknown_direction_is_refused(name):
    layer = nn.Linear(3, 4)
    optimizer = getattr(torch.optim, name)(layer.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=rf"layer 'fc' \(Linear\).*{name}"):
        OptimalLearningRate(optimizer, {"fc": layer})
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SGD", {"momentum": 0.9}),
        ("SGD", {"momentum": 0.9, "nesterov": True, "foreach": True}),
        ("SGD", {"momentum": 0.9, "weight_decay": 1e-2, "fused": True}),
        ("Adam", {"amsgrad": True, "foreach": True}),
        ("AdamW", {"fused": True}),
        ("AdamW", {"capturable": True}),
        ("RMSprop", {"momentum": 0.5, "centered": True}),
    ],
)
@pytest.mark.parametrize("rule", ["paper", "exact"])
def test_a_capped_step_is_the_optimizers_own_bit_for_bit(name, options, rule, monkeypatch):
    """Weights, and the optimizer's state and groups."""
    if options.get("capturable"):  # otherwise refused on the CPU, where there is no graph to capture
        module = importlib.import_module("torch.optim.adam")
        monkeypatch.setattr(module, "_get_capturable_supported_devices", lambda *_, **__: ["cpu"])
    torch.manual_seed(0)
    model = small_net()
    twin = copy.deepcopy(model)
    data = batches(6)
    lr = 1e-6  # far below every η*
    optimizer, plain = (getattr(torch.optim, name)(net.parameters(), lr=lr, **options) for net in (model, twin))
    olr = OptimalLearningRate(optimizer, {"conv": model[0]}, rule=rule)
    train(model, optimizer, data)
    train(twin, plain, data)
    assert same(model, twin)
    assert olr.rates()["conv"].item() == lr
    assert olr.counts() == {"conv": {"shortened": 0}}
    mine, theirs = optimizer.state_dict(), plain.state_dict()
    assert mine["param_groups"] == theirs["param_groups"]
    assert list(mine["state"]) == list(theirs["state"])
    for index, state in theirs["state"].items():
        for key, value in state.items():
            other = mine["state"][index][key]
            assert torch.equal(other, value) if isinstance(value, torch.Tensor) else other == value


@pytest.mark.parametrize("rule", ["paper", "exact"])
@pytest.mark.parametrize(
    "gradient",
    [
        pytest.param(torch.zeros(4, 3), id="zero"),
        pytest.param(torch.full((4, 3), float("nan")), id="nan"),
        pytest.param(torch.full((4, 3), float("inf")), id="inf"),
        pytest.param(-torch.eye(4, 3), id="away"),
    ],
)
def test_negative_undefined_and_infinite_rates_give_the_cap(rule, gradient):
    """W = 1.5 I is too large: along −W the best rate is negative, which eq. (21) as printed would let through."""
    twin, layer = nn.Linear(3, 4, bias=False), nn.Linear(3, 4, bias=False)
    for net in (twin, layer):
        net.weight.data = 1.5 * torch.eye(4, 3)
        net.weight.grad = gradient.clone()
    if rule == "exact" and gradient[0, 0] == -1:
        assert exact_rate(layer.weight.detach(), gradient).item() < 0
    optimizer, plain = (torch.optim.SGD(net.parameters(), lr=0.1) for net in (layer, twin))
    olr = OptimalLearningRate(optimizer, {"fc": layer}, rule=rule)
    optimizer.step()
    plain.step()
    assert olr.rates()["fc"].item() == pytest.approx(0.1)
    assert torch.equal(layer.weight.nan_to_num(5.0), twin.weight.nan_to_num(5.0))


@settings(deadline=None, max_examples=60)
@given(seed=seeds, lr=st.floats(0, 2), rule=st.sampled_from(["paper", "exact"]))
def test_the_rate_is_never_above_the_cap_nor_negative(seed, lr, rule):
    parameter = nn.Parameter(gaussian(5, 3, seed=seed))
    optimizer = torch.optim.SGD([parameter], lr=lr)
    olr = OptimalLearningRate(optimizer, parameter, rule=rule)
    parameter.grad = gaussian(5, 3, seed=seed + 1)
    optimizer.step()
    assert 0 <= olr.rates()["0"].item() <= lr
    assert parameter.isfinite().all()


SCHEDULERS = {
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: min(1.0, step / 4)),  # warm-up from 0
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=3, gamma=0.3),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=8),
    "cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=[1.0, 0.5], total_steps=10),
    "warm-up, then cosine": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=3), torch.optim.lr_scheduler.CosineAnnealingLR(o, 6)],
        milestones=[3],
    ),
    "two groups": lambda o: torch.optim.lr_scheduler.LambdaLR(o, [lambda s: 0.5**s, lambda s: 0.9**s]),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("built_first", [False, True])
def test_schedulers_of_either_age_set_the_cap(scheduler, built_first):
    """Parameter groups stay as they are, so a scheduler built before the treatment keeps fitting them."""
    torch.manual_seed(0)
    weight, other = nn.Parameter(gaussian(6, 4).float()), nn.Parameter(gaussian(3).float())
    twin = nn.Parameter(other.detach().clone())
    optimizer = torch.optim.SGD([{"params": [weight], "lr": 0.8}, {"params": [other], "lr": 0.2}], momentum=0.9)
    plain = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(6, 4))], "lr": 0.8}, {"params": [twin], "lr": 0.2}],
                            momentum=0.9)  # fmt: skip
    schedule = SCHEDULERS[scheduler](optimizer) if built_first else None
    olr = OptimalLearningRate(optimizer, {"w": weight}, rule="exact")
    schedule = schedule or SCHEDULERS[scheduler](optimizer)
    plain_schedule = SCHEDULERS[scheduler](plain)
    for i in range(9):
        cap = optimizer.param_groups[0]["lr"]
        assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in plain.param_groups]
        weight.grad, other.grad, twin.grad = gaussian(6, 4, seed=i).float(), other.detach(), twin.detach()
        before = weight.detach().clone()
        optimizer.step()
        plain.step()
        schedule.step()
        plain_schedule.step()
        assert olr.rates()["w"].item() <= cap
        if cap == 0:
            assert torch.equal(weight, before)
    assert torch.equal(other, twin)  # the other layers' steps are untouched
    assert 0 < olr.counts()["w"]["shortened"] < 9


def test_a_tensor_rate_works_as_a_number():
    def final(lr) -> torch.Tensor:
        parameter = nn.Parameter(gaussian(5, 4).float())
        optimizer = torch.optim.SGD([parameter], lr=lr, momentum=0.9, foreach=False)
        OptimalLearningRate(optimizer, parameter)
        for i in range(5):
            parameter.grad = gaussian(5, 4, seed=i).float()
            optimizer.step()
        return parameter.detach()

    assert torch.allclose(final(torch.tensor(0.25)), final(0.25), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_on_the_update_the_rate_is_the_best_along_the_real_move(name):
    """The move of an untreated twin gives the true direction; no rate on a grid along it is better."""
    options = {"momentum": 0.9, "nesterov": True} if name == "SGD" else {"weight_decay": 0.1}
    weight = gaussian(6, 4)
    mine, twin = nn.Parameter(weight.clone()), nn.Parameter(weight.clone())
    optimizer, plain = (getattr(torch.optim, name)([p], lr=0.9, **options) for p in (mine, twin))
    olr = OptimalLearningRate(optimizer, mine, rule="exact", direction="update")
    for i in range(6):
        mine.grad, twin.grad = gaussian(6, 4, seed=i), gaussian(6, 4, seed=i)
        start = mine.detach().clone()
        twin.data.copy_(start)
        optimizer.step()
        plain.step()
        direction = (start - twin.detach()) / 0.9
        grid = np.linspace(0, 0.9, 9001)
        values = objective(start.numpy(), direction.numpy(), grid)
        rate = olr.rates()["0"].item()
        if 0 < rate < 0.9:
            assert rate == pytest.approx(grid[values.argmin()], abs=1e-4) or values[-1] < values.min() + 1e-9
        assert torch.allclose(mine.detach(), start - rate * direction, rtol=0, atol=1e-12)
    assert olr.counts()["0"]["shortened"] > 0


@pytest.mark.parametrize("kind", LAYERS)
def test_every_layer_uses_its_own_matrices(kind):
    layer = LAYERS[kind]().double()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e6)
    olr = OptimalLearningRate(optimizer, {"x": layer}, rule="exact")
    gradient = gaussian(*layer.weight.shape, seed=1)
    pairs = [(W, L) for (W, _), (L, _) in zip(matrices(layer, layer.weight), matrices(layer, gradient), strict=True)]
    grid = np.linspace(-5, 5, 10001)
    best = grid[sum(objective(W, L, grid) for W, L in pairs).argmin()]
    if best < 0:  # take the direction in which the best rate is positive
        gradient, best = -gradient, -best
    layer.weight.grad = gradient
    optimizer.step()
    assert olr.rates()["x"].item() == pytest.approx(best, abs=1e-3)  # the grid's spacing


def test_it_sees_the_gradient_that_nog_has_made():
    layer = nn.Linear(6, 6, bias=False).double()
    layer.weight.data = 2 * orthogonal(6, 0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=10.0)
    NearestOrthogonalGradient(optimizer, layer)
    olr = OptimalLearningRate(optimizer, layer, rule="exact")
    layer.weight.grad = layer.weight.detach() * 100.0  # its polar factor is W/2
    optimizer.step()
    rate = olr.rates()["0"].item()
    assert min(abs(rate - 1), abs(rate - 3)) < 1e-6  # where 2Q − ηQ is orthogonal
    assert torch.dist(layer.weight.T @ layer.weight, torch.eye(6)) < 1e-6


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_does_not_change_the_rates(fused):
    torch.manual_seed(0)
    model = small_net()
    twin = copy.deepcopy(model)
    scaled, plain = (torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9, fused=fused) for net in (model, twin))
    olr, plain_olr = OptimalLearningRate(scaled, model[0]), OptimalLearningRate(plain, twin[0])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for x, y in batches(4):
        scaled.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
        scaler.step(scaled)
        scaler.update()
    train(twin, plain, batches(4))
    assert olr.counts() == plain_olr.counts()
    assert torch.allclose(olr.rates()["0"], plain_olr.rates()["0"], rtol=1e-4)
    assert torch.dist(model[0].weight, twin[0].weight) < 1e-5


def test_the_rates_are_those_of_the_last_step_only():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    olr = OptimalLearningRate(optimizer, {"a": model[0], "b": model[1]})
    for frozen, moved in ((None, {"a", "b"}), (0, {"b"}), (1, {"a"}), (None, {"a", "b"})):
        for i, layer in enumerate(model):
            layer.requires_grad_(i != frozen)
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()
        assert set(olr.rates()) == moved
    optimizer.zero_grad()
    optimizer.step()
    assert olr.rates() == {}


def test_a_closure_is_treated_after_it_made_the_gradients():
    layer = nn.Linear(4, 4, bias=False)
    layer.weight.data = 2 * torch.eye(4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=10.0)
    olr = OptimalLearningRate(optimizer, layer, rule="exact")

    def closure() -> torch.Tensor:
        layer.weight.grad = torch.eye(4)
        return torch.zeros(())

    optimizer.step(closure)
    assert torch.dist(layer.weight.abs(), torch.eye(4)) < 1e-6
    assert olr.counts() == {"0": {"shortened": 1}}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_round_once(dtype):
    weight = gaussian(6, 4).to(dtype)
    parameter, single = nn.Parameter(weight.clone()), nn.Parameter(weight.float())
    optimizer, plain = torch.optim.SGD([parameter], lr=0.5), torch.optim.SGD([single], lr=0.5)
    olr, plain_olr = (OptimalLearningRate(o, p, rule="exact") for o, p in ((optimizer, parameter), (plain, single)))
    gradient = gaussian(6, 4, seed=1).to(dtype)
    gradient = gradient if exact_rate(weight, gradient) > 0 else -gradient
    parameter.grad, single.grad = gradient.clone(), gradient.float()
    optimizer.step()
    plain.step()
    assert torch.equal(olr.rates()["0"], plain_olr.rates()["0"])
    # p' is rounded once by the optimizer and the result once more.
    assert (parameter.float() - single).abs().max() <= 2 * torch.finfo(dtype).eps * weight.abs().max()


def test_removed_it_is_gone_bit_for_bit_and_its_counts_can_be_loaded():
    torch.manual_seed(0)
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    olr = OptimalLearningRate(optimizer, {"conv": model[0]}, rule="exact")
    train(model, optimizer, batches(5))
    state = olr.state_dict()
    olr.remove()
    twin = copy.deepcopy(model)
    plain = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9)
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # or both would share their buffers
    train(model, optimizer, batches(3, seed=1))
    train(twin, plain, batches(3, seed=1))
    assert same(model, twin)
    again = OptimalLearningRate(optimizer, {"conv": model[0]}, rule="exact")
    again.load_state_dict(state)
    assert again.counts() == olr.counts()
    assert torch.equal(again.rates()["conv"], olr.rates()["conv"])


def test_bad_options_and_layers_are_refused():
    layer = nn.Linear(3, 4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="did you mean 'exact'"):
        OptimalLearningRate(optimizer, layer, rule="exakt")
    with pytest.raises(ValueError, match="did you mean 'update'"):
        OptimalLearningRate(optimizer, layer, direction="updates")
    with pytest.raises(ValueError, match=r"layer 'norm' \(LayerNorm\) has a weight of shape \(3,\)"):
        OptimalLearningRate(optimizer, {"norm": nn.LayerNorm(3)})
    with pytest.raises(ValueError, match="does not hold its weight"):
        OptimalLearningRate(optimizer, nn.Linear(3, 4))
    OptimalLearningRate(optimizer, layer)
    with pytest.raises(ValueError, match="already on"):
        OptimalLearningRate(optimizer, layer)


def test_a_count_is_a_dict_and_still_the_number_that_it_was():
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=100.0)
    olr = OptimalLearningRate(optimizer, {"fc": layer})
    layer.weight.grad = layer.weight.detach().clone()
    optimizer.step()
    count = olr.counts()["fc"]
    assert count == {"shortened": 1} and count["shortened"] == 1
    for old in (lambda: count == 1, lambda: int(count) == 1, lambda: 0 < count < 2, lambda: [0, 7][count] == 7):
        with pytest.warns(DeprecationWarning, match=r"read counts\(\)\[layer\]\['shortened'\]"):
            assert old()
