"""The layers before each of several layers: what a search for each finds, with the model traced once for all."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from wellcond.experiments.run.models import build_model
from wellcond.monitor import ConditionMonitor
from wellcond.nn import DecorrelatedBatchNorm2d, GlobalCovariancePool2d, replace_batchnorm
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


class OneOfTwo(nn.Module):
    """It ignores its second input, and has a part, so that no search ends in it but its own."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x, y):
        return self.act(x)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.gate, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), OneOfTwo(), nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(self.gate(self.a(x), self.b(x)))


class Named(nn.Module):
    def forward(self, x):
        return {"x": x}


class Summed(nn.Module):
    """A layer whose output cannot be traced through from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.named, self.norm, self.own = nn.Linear(4, 4), Named(), nn.BatchNorm1d(4), Scale(4)

    def forward(self, x):
        return self.own(self.norm(sum(self.named(self.a(x)).values())))


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


def replaced() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    replace_batchnorm(model, which="all")
    return model


MODELS = {
    "resnet8": lambda: build_model("resnet8", num_classes=4, norm="zca", head="gcp", width=8),
    "own norms": lambda: nn.Sequential(nn.Linear(4, 4), Scale(4), Mlp(4), Scale(4), nn.Linear(4, 2), Scale(2)),
    "a watched layer in a watched layer": lambda: nn.Sequential(
        nn.Linear(4, 4), nn.Sequential(nn.BatchNorm1d(4), nn.ReLU()), nn.Linear(4, 4), nn.BatchNorm1d(4)
    ),
    "norm and tail": replaced,
    "one of two": Gated,
    "a dict": Summed,
    "nothing before": lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4)),
}


@pytest.mark.parametrize("name", MODELS)
def test_each_is_what_a_search_for_it_finds(name):
    model = MODELS[name]()
    watched = [*norms(model), *(name for name, m in model.named_modules() if isinstance(m, (nn.Sequential, OneOfTwo)))]
    watched = [name for name in watched if name]
    found = layers_before(model, watched)
    assert list(found) == watched
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
    traced.clear()
    deep = nn.Sequential(*(nn.Linear(4, 4) for _ in range(9)))
    found = layers_before(deep, [str(i) for i in range(1, 9)])
    assert traced == [deep] and list(found["8"]) == ["7"]


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
    whole = "_orig_mod.1._orig_mod.1"
    assert list(layers_before(torch.compile(model), whole)[whole]) == ["1.0"]
    parallel = nn.DataParallel(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    assert {name: list(layers) for name, layers in layers_before(parallel, "module.1").items()} == {"module.1": ["0"]}
    with pytest.raises(ValueError, match=r"no layer '1\.2'; did you mean"):
        layers_before(model, ["1.2"])
    assert layers_before(nn.BatchNorm1d(3), [""]) == {"": {}}
