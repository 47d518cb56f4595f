"""The treatments of the weight act on any matrix of a module, by its name."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from treatment_models import matrices
from wellcond.nn import to_plain
from wellcond.orthogonality import orthogonal_weight, spectral_norm, weight_matrices

EPS = torch.finfo(torch.float32).eps


class LowRank(nn.Module):
    """As in adapters: its matrices have names of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(torch.randn(2, 5)), nn.Parameter(torch.randn(7, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.A.T @ self.B.T


NAMED = {
    "attention": (lambda: nn.MultiheadAttention(4, 2), "in_proj_weight", lambda m, x: m(x, x, x)[0], (3, 2, 4)),
    "lstm": (lambda: nn.LSTM(3, 4), "weight_hh_l0", lambda m, x: m(x)[0], (5, 2, 3)),
    "adapter": (LowRank, "A", lambda m, x: m(x), (6, 5)),
    "bilinear": (lambda: nn.Bilinear(3, 3, 2), "weight", lambda m, x: m(x, x), (6, 3)),
}


def column_gap(W: torch.Tensor) -> torch.Tensor:
    W = W.detach().flatten(1).double()
    G = W.T @ W if W.shape[0] >= W.shape[1] else W @ W.T
    return (G - torch.eye(len(G))).abs().max()


@pytest.mark.parametrize("case", NAMED)
def test_any_matrix_of_a_module_is_treated_by_its_name(case):
    make, name, run, shape = NAMED[case]
    layer, x = make(), torch.randn(shape)
    held = dict(layer.named_parameters(recurse=False))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    untouched = {key: value.detach().clone() for key, value in held.items() if key != name}
    assert orthogonal_weight(layer, name) is layer
    assert layer.parametrizations[name].original is held[name]
    assert column_gap(getattr(layer, name)) < 50 * EPS
    assert all(torch.equal(getattr(layer, key), value) for key, value in untouched.items())
    before = run(layer, x)
    run(layer, x).square().sum().backward()
    optimizer.step()
    assert not torch.equal(run(layer, x), before)  # the layer uses the weight that the step has moved
    assert column_gap(getattr(layer, name)) < 50 * EPS
    # PyTorch cannot copy a recurrent layer that holds the computed weight of its last forward pass.
    copies = [] if case == "lstm" else [copy.deepcopy(layer)]
    for twin in (*copies, pickle.loads(pickle.dumps(layer))):
        assert torch.equal(run(twin, x), run(layer, x))
    other = orthogonal_weight(make(), name)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(run(other, x), run(layer, x))
    in_use = getattr(layer, name).detach().clone()
    parametrize.remove_parametrizations(layer, name)
    assert torch.equal(getattr(layer, name), in_use)


def test_two_tensors_of_a_module_may_be_treated():
    layer = nn.LSTM(3, 4)
    spectral_norm(orthogonal_weight(layer, "weight_hh_l0"), "weight_ih_l0")
    assert column_gap(layer.weight_hh_l0) < 50 * EPS
    assert torch.linalg.matrix_norm(layer.weight_ih_l0, 2).item() == pytest.approx(1, rel=20 * EPS)
    with pytest.raises(ValueError, match=r"orthogonal weight of layer '' .* is already on"):
        orthogonal_weight(layer, "weight_hh_l0")
    twin, x = pickle.loads(pickle.dumps(layer)), torch.randn(5, 2, 3)
    assert torch.equal(twin(x)[0], layer(x)[0])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_layer_can_be_copied_after_a_pass_in_training(kind):
    model, x = nn.Sequential(orthogonal_weight(kind(3, 4), "weight_hh_l0")), torch.randn(5, 2, 3)
    expected, _ = model(x)
    twin = copy.deepcopy(copy.deepcopy(model))
    assert torch.equal(twin(x)[0], expected) and torch.equal(copy.deepcopy(model.eval())(x)[0], expected)
    assert isinstance(twin[0].parametrizations.weight_hh_l0[0], type(model[0].parametrizations.weight_hh_l0[0]))
    assert not {t.data_ptr() for t in tensors(twin)} & {t.data_ptr() for t in tensors(model)}
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(torch.randn_like(p))
    assert column_gap(twin[0].weight_hh_l0) < 50 * EPS
    assert torch.equal(model(x)[0], expected) and not torch.equal(twin(x)[0], expected)
    plain = to_plain(model)
    assert type(plain[0]) is kind
    torch.testing.assert_close(plain(x)[0], expected)


def tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers(), *model[0]._flat_weights]


def test_copies_keep_what_is_tied_and_a_copy_function_of_the_layers_own():
    class Own(nn.LSTM):
        def __deepcopy__(self, memo):
            raise NotImplementedError("of its own")

    model = nn.Module()
    model.lstm, model.tied = orthogonal_weight(nn.LSTM(3, 4), "weight_hh_l0"), nn.Linear(3, 16)
    model.tied.weight = model.lstm.weight_ih_l0
    model.again = model.lstm
    model.lstm(torch.randn(5, 2, 3))
    twin = copy.deepcopy(model)
    assert twin.again is twin.lstm and twin.tied.weight is twin.lstm.weight_ih_l0
    assert twin.lstm._flat_weights[0] is twin.tied.weight
    with pytest.raises(NotImplementedError, match="of its own"):
        copy.deepcopy(orthogonal_weight(Own(3, 4), "weight_hh_l0"))


@pytest.mark.parametrize("treatment", [orthogonal_weight, spectral_norm])
def test_a_tensor_that_is_none_or_no_matrix_is_refused_with_the_right_name(treatment):
    layer = nn.Linear(3, 2)
    for name, message in (
        ("bias", r"parameter 'bias' of layer '' \(Linear\) .* shape \(2,\), .* \(matrices: weight\)"),
        ("wieght", r"no parameter 'wieght' .*did you mean 'weight'"),
    ):
        with pytest.raises(ValueError, match=message):
            treatment(layer, name)
    with pytest.raises(ValueError, match=r"\(LSTM\) has no parameter 'weight_hh' .*did you mean 'weight_hh_l0'"):
        treatment(nn.LSTM(2, 2), "weight_hh")
    assert type(layer) is nn.Linear


def test_a_map_in_the_place_of_the_name_is_deprecated():
    layer = nn.Linear(5, 3)
    with pytest.warns(DeprecationWarning, match=r"write orthogonal_weight\(layer, map='cayley'\)"):
        orthogonal_weight(layer, "cayley")
    assert layer.parametrizations.weight[0].map == "cayley"
    own = nn.Module()
    own.exp = nn.Parameter(torch.randn(4, 2))
    orthogonal_weight(own, "exp")
    assert column_gap(own.exp) < 50 * EPS


def test_weight_matrices_are_those_of_the_weight_in_use():
    layer = orthogonal_weight(nn.Conv2d(6, 9, 3, groups=3))
    for W, (expected, _) in zip(weight_matrices(layer), matrices(layer, layer.weight), strict=True):
        assert np.array_equal(W.detach().double().numpy(), expected)
