"""The layers before each of several layers: what a search for each finds, with the model traced once for all."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from wellcond.experiments.run.models import build_model
from wellcond.monitor import ConditionMonitor
from wellcond.nn import DecorrelatedBatchNorm2d, GlobalCovariancePool2d
from wellcond.orthogonality import _symbolic_walk as walk
from wellcond.orthogonality import layers_before, pre_spectral_layers

NORMS = nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm, DecorrelatedBatchNorm2d, GlobalCovariancePool2d


class Scale(nn.Module):
    """A norm of a class of its own, which torch.fx would trace into."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.gain, self.d = nn.Parameter(torch.ones(d)), d

    def forward(self, x):
        if x.shape[1] != self.d:
            raise ValueError("other channels")
        return x * self.gain / x.norm(dim=1, keepdim=True)


class Mlp(nn.Module):
    """A layer that holds matrices, and may itself be watched."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(d, d), Scale(d), nn.Linear(d, d))

    def forward(self, x):
        return x + self.inner(x)


class Blocks(nn.Module):
    """A trunk that cannot be traced, of parts that can."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(depth))

    def forward(self, x):
        for block in self.blocks:
            x = block(x) * float(x.sum())
        return x


def norms(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, (*NORMS, Scale))]


MODELS = {
    "resnet8": lambda: build_model("resnet8", num_classes=4, norm="zca", head="gcp", width=8),
    "own norms": lambda: nn.Sequential(nn.Linear(4, 4), Scale(4), Mlp(4), Scale(4), nn.Linear(4, 2), Scale(2)),
    "nothing before": lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4)),
}


@pytest.mark.parametrize("name", MODELS)
def test_each_is_what_a_search_for_it_finds(name):
    model = MODELS[name]()
    found = layers_before(model, norms(model))
    assert list(found) == norms(model)
    for of, layers in found.items():
        try:
            wanted = pre_spectral_layers(model, of=of)
        except ValueError:
            wanted = {}
        assert list(layers.items()) == list(wanted.items()), of


def test_a_layer_that_holds_matrices_does_not_hide_them_from_the_others():
    model = MODELS["own norms"]()
    found = layers_before(model, ["2", "3", "2.inner.1"])
    assert {name: list(layers) for name, layers in found.items()} == {
        "2": ["0"],
        "3": ["0", "2.inner.2"],
        "2.inner.1": ["2.inner.0"],
    }


@pytest.fixture
def traced(monkeypatch):
    """The modules that are traced, in order."""
    seen: list[nn.Module] = []
    original = walk.graphs_of
    monkeypatch.setattr(walk, "graphs_of", lambda model, *rest: (seen.append(model), original(model, *rest))[1])
    return seen


def test_a_model_is_traced_once(traced):
    model = MODELS["resnet8"]()
    ConditionMonitor(model, layers=[name for name in norms(model) if not name.startswith("pool")])
    assert traced == [model]
    traced.clear()
    layers_before(model, ["norm1", "pool"])  # which holds the convolution of its reduction
    assert traced == [model, model]


def test_parts_are_tried_where_the_model_cannot_be_traced_each_once(traced):
    model = Blocks(5)
    found = layers_before(model, [f"blocks.{i}.1" for i in range(5)])
    assert {name: list(layers) for name, layers in found.items()} == {
        f"blocks.{i}.1": [f"blocks.{i}.0"] for i in range(5)
    }
    assert traced == [model, model.blocks, *model.blocks]


def test_names_of_compiled_parts_and_unknown_ones():
    model = nn.Sequential(nn.Linear(4, 4), torch.compile(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))))
    assert [list(layers) for layers in layers_before(model, ["1.1", "1._orig_mod.1"]).values()] == [["1.0"], ["1.0"]]
    assert list(layers_before(torch.compile(model), ["1.1"])["1.1"]) == ["1.0"]
    assert layers_before(model, []) == {}
    with pytest.raises(ValueError, match=r"no layer '1\.2'; did you mean"):
        layers_before(model, ["1.2"])
    assert layers_before(nn.BatchNorm1d(3), [""]) == {"": {}}
