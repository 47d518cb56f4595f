"""A subspace layer is U(L ∘ z) + μ with an orthonormal basis, and every treatment acts on U as on any weight."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helpers import eps_of, relative_error, unitary
from wellcond.nn import DecorrelatedBatchNorm1d, SubspaceLayer, to_plain
from wellcond.orthogonality import (
    NearestOrthogonalGradient,
    OptimalLearningRate,
    OrthogonalLoss,
    pre_spectral_layers,
    treat,
    weight_matrices,
)

Q, D = 5, 40


def deviation(U: Tensor) -> float:
    """‖UᵀU − I‖_F in double precision."""
    U = U.detach().double()
    return float(torch.dist(U.T @ U, torch.eye(U.shape[1], dtype=torch.float64)))


def generator() -> nn.Sequential:
    return nn.Sequential(SubspaceLayer(Q, D), nn.LeakyReLU(0.2), nn.Linear(D, 7))


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int, extra=lambda: 0.0) -> None:
    """Train towards fixed random images of fixed latents, which U must turn for."""
    z, images = torch.randn(16, Q), torch.randn(16, 7)
    for _ in range(count):
        optimizer.zero_grad()
        ((model(z) - images).square().mean() + extra()).backward()
        optimizer.step()


def test_the_output_is_the_origin_and_a_sum_of_scaled_directions():
    layer = SubspaceLayer(Q, D, dtype=torch.float64)
    nn.init.normal_(layer.bias)
    z = torch.randn(3, 2, Q, dtype=torch.float64)
    want = layer.bias + sum(z[..., i, None] * layer.scale[i] * layer.weight[:, i] for i in range(Q))
    assert layer(z).shape == (3, 2, D)
    assert relative_error(layer(z), want) < 20 * eps_of(torch.float64)


@pytest.mark.parametrize(("n_basis", "dim"), [(1, 1), (5, 5), (5, 40), (6, 4096)])
def test_the_basis_starts_orthonormal_and_the_scales_fall(n_basis, dim):
    layer = SubspaceLayer(n_basis, dim)
    assert layer.weight.shape == (dim, n_basis)
    # A column of Householder QR is orthonormal to a small multiple of eps, whatever its length.
    assert deviation(layer.weight) < 10 * n_basis * eps_of(torch.float32)
    assert layer.scale.tolist() == [3.0 * i for i in range(n_basis, 0, -1)]
    assert layer.bias.tolist() == [0.0] * dim


def test_it_is_differentiable_twice_under_every_transform():
    layer = SubspaceLayer(2, 4, dtype=torch.float64)
    inputs = [torch.randn(3, 2, dtype=torch.float64, requires_grad=True), *layer.parameters()]
    names = [name for name, _ in layer.named_parameters()]

    def f(z, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (z,)).sin()

    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)
    jacobian = torch.func.vmap(torch.func.jacfwd(layer))(inputs[0])
    assert relative_error(jacobian, (layer.weight * layer.scale).expand(3, 4, 2)) < 10 * eps_of(torch.float64)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SubspaceLayer(6, 5), "6 directions of 5 dimensions.*n_basis=5 or fewer"),
        (lambda: SubspaceLayer(0, 5), "must be positive, got 0 and 5"),
        (lambda: SubspaceLayer(3, 5)(torch.randn(4, 2)), r"3 latent variables \(got shape \(4, 2\)\)"),
        (lambda: SubspaceLayer(1, 5)(torch.tensor(1.0)), r"1 latent variables \(got shape \(\)\)"),
    ],
)
def test_bad_sizes_are_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_weight_matrices_have_a_row_per_output():
    layer = SubspaceLayer(Q, D)
    assert torch.equal(weight_matrices(layer)[0], layer.weight)


def test_nog_moves_the_basis_by_the_nearest_orthogonal_matrix_of_its_gradient():
    model = generator()
    before, optimizer = copy.deepcopy(model), torch.optim.SGD(model.parameters(), lr=0.1)
    treat(model, optimizer, "nog", layers=["0"])
    z = torch.randn(16, Q)
    before(z).square().mean().backward()
    U, _, Vh = np.linalg.svd(before[0].weight.grad.double().numpy(), full_matrices=False)
    want = before[0].weight.detach().double() - 0.1 * torch.from_numpy(U @ Vh)
    model(z).square().mean().backward()
    optimizer.step()
    # The factor of a gradient of condition κ is known to κ eps; it is below 100 here.
    assert relative_error(model[0].weight, want) < 100 * eps_of(torch.float32)
    assert torch.equal(model[0].scale, before[0].scale - 0.1 * before[0].scale.grad)


def test_ow_keeps_the_basis_orthonormal_where_the_plain_layer_leaves_it():
    plain, treated = generator(), generator()
    for model in (plain, treated):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05, weight_decay=0.1)
        if model is treated:
            treat(model, optimizer, "ow", layers=[model[0]])
        steps(model, optimizer, 40)
    assert deviation(treated[0].weight) < 10 * Q * eps_of(torch.float32)
    assert deviation(plain[0].weight) > 0.1


def test_ol_draws_the_basis_back_to_an_orthonormal_one():
    model = generator()
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.02)
    treatment = treat(model, optimizer, "ol", layers=["0"], options={"ol": {"form": "double_soft"}})
    # UᵀU = 2.25·I, so that the term is 2·q·1.25².
    assert treatment.loss().item() == pytest.approx(2 * Q * 1.25**2, rel=1e-5)
    for _ in range(100):
        optimizer.zero_grad()
        treatment.loss().backward()
        optimizer.step()
    assert deviation(model[0].weight) < 1e-3


def test_olr_takes_the_rate_that_leads_nearest_to_orthogonality():
    """Against a search over the rates, for eq. (18)."""
    layer = SubspaceLayer(Q, D, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(unitary(D, Q) * torch.linspace(1.0, 1.4, Q, dtype=torch.float64))
    direction = layer.weight.detach() * torch.linspace(0.2, 1.0, Q, dtype=torch.float64) + 0.1 * torch.randn(D, Q)
    optimizer = torch.optim.SGD([layer.weight], lr=1.0)
    model = nn.Sequential(layer)
    treatment = treat(model, optimizer, "olr", layers=["0"], options={"olr": {"rule": "exact"}})
    start = layer.weight.detach().clone()
    layer.weight.grad = direction.clone()
    optimizer.step()
    rates = torch.linspace(0, 1, 20001, dtype=torch.float64)
    moved = start - rates[:, None, None] * direction
    gaps = torch.linalg.matrix_norm(moved.mT @ moved - torch.eye(Q, dtype=torch.float64))
    best = rates[gaps.argmin()].item()
    assert treatment.rates()["0"].item() == pytest.approx(best, abs=1e-4)


@pytest.mark.parametrize("kind", [NearestOrthogonalGradient, OptimalLearningRate])
def test_a_basis_in_rows_is_treated_as_one_in_columns(kind):
    """Of code that stores U as n_basis × dim."""
    columns = nn.Parameter(unitary(D, Q))
    rows = nn.Parameter(columns.detach().T.contiguous())
    gradient = columns.detach() + torch.randn(D, Q, dtype=torch.float64)
    for parameter, its in ((columns, gradient), (rows, gradient.T)):
        optimizer = torch.optim.SGD([parameter], lr=0.5)
        kind(optimizer, {"U": parameter})
        parameter.grad = its.clone()
        optimizer.step()
    assert relative_error(rows.T, columns) < 100 * eps_of(torch.float64)
    terms = [OrthogonalLoss([parameter])().item() for parameter in (columns, rows)]
    assert terms[0] == pytest.approx(terms[1], rel=1e-12)


def test_all_together_train_and_come_off_again():
    model = generator()
    names, start = list(model.state_dict()), model[0].weight.detach().clone()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    treatment = treat(model, optimizer, "nog+ow+olr+ol", layers=["0"])
    steps(model, optimizer, 5, treatment.loss)
    assert treatment.nog.counts()["0"]["treated"] == 5
    assert deviation(model[0].weight) < 10 * Q * eps_of(torch.float32)
    assert not torch.equal(model[0].weight, start)
    treatment.remove()
    assert list(model.state_dict()) == names


def test_it_is_found_before_a_spectral_layer():
    model = nn.Sequential(nn.Linear(3, Q), SubspaceLayer(Q, 16), nn.ReLU(), DecorrelatedBatchNorm1d(16))
    assert list(pre_spectral_layers(model)) == ["1"]
    assert list(pre_spectral_layers(model, torch.randn(40, 3))) == ["1"]


def test_the_map_of_convolutions_is_refused():
    model = generator()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="layer '0' \\(SubspaceLayer\\)"):
        treat(model, optimizer, "ow", layers=["0"], options={"ow": {"map": "soc"}})


def test_copies_states_and_exports_are_the_layer(fresh_compiler):
    layer, z = SubspaceLayer(Q, D), torch.randn(3, Q)
    want = layer(z)
    other = SubspaceLayer(Q, D)
    other.load_state_dict(layer.state_dict())
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    exported = torch.export.export(layer, (z,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},)).module()
    traced = torch.fx.symbolic_trace(nn.Sequential(layer))
    for found in (other, copy.deepcopy(layer), torch.load(file, weights_only=False), exported, traced, to_plain(layer)):
        assert torch.equal(found(z), want)
    assert relative_error(torch.compile(layer, fullgraph=True)(z), want) < 10 * eps_of(torch.float32)
    assert relative_error(layer.bfloat16()(z.bfloat16()).float(), want) < 10 * eps_of(torch.bfloat16)


def test_autocast_keeps_the_layer_and_its_gradient():
    layer, z = SubspaceLayer(Q, D), torch.randn(3, Q)
    want = layer(z)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(z)
    assert relative_error(found.float(), want) < 10 * eps_of(torch.bfloat16)
    found.float().square().mean().backward()
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_it_starts_as_in_single_rounded(dtype):
    torch.manual_seed(0)
    layer = SubspaceLayer(Q, D, dtype=dtype)
    torch.manual_seed(0)
    single = SubspaceLayer(Q, D)
    assert layer.weight.dtype == layer.scale.dtype == layer.bias.dtype == dtype
    assert torch.equal(layer.weight, single.weight.to(dtype))
    assert layer(torch.randn(3, Q, dtype=dtype)).dtype == dtype
