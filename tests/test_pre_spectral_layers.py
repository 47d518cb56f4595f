"""The layers before the spectral layers are found in any model, by tracing and by running, or the reason is given."""

from __future__ import annotations

import copy
import re
from collections import UserDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from treatment_models import same
from wellcond.nn import (
    DecorrelatedBatchNorm1d,
    DecorrelatedBatchNorm2d,
    GlobalCovariancePool2d,
    SpectralModule,
    replace_batchnorm,
    update_statistics,
)
from wellcond.orthogonality import orthogonal_weight, pre_spectral_layers, spectral_norm, treat

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """A residual block, with a convolution in its shortcut or the identity."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, padding=1)
        self.bn = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1)
        self.shortcut = nn.Identity() if inside == outside else nn.Conv2d(inside, outside, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv2(F.relu(self.bn(self.conv1(x)), inplace=True))
        y += self.shortcut(x)
        return F.relu(y)


class FunctionalWeights(nn.Module):
    """A weight used through torch.nn.functional; and one that is transposed first."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.transposed = transposed
        self.owner = nn.Linear(4, 6) if transposed else nn.Conv2d(4, 6, 1)
        self.norm = DecorrelatedBatchNorm2d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if self.transposed:
            return self.norm((x.movedim(1, -1) @ self.owner.weight.t()).movedim(-1, 1))
        return self.norm(F.conv2d(x, self.owner.weight))


class Guarded(nn.Module):
    """Asks about its input, as layers that check shapes do, in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 1)
        self.norm = DecorrelatedBatchNorm2d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() != 4:
            raise ValueError(f"expected 4D, got {x.dim()}D")
        if x.shape[1] == 3:
            return self.norm(self.conv(x))
        raise ValueError("expected 3 channels")


class VisionTransformer(nn.Module):
    """Patches, a position embedding, one encoder layer, and covariance pooling over the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, stride=4)
        self.position = nn.Parameter(torch.zeros(1, 4, 8))
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = GlobalCovariancePool2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.encoder(self.patch(x).flatten(2).transpose(1, 2) + self.position)
        return self.head(tokens.transpose(1, 2).unflatten(2, (2, 2)))


class Own(SpectralModule):
    """A user's spectral layer: only the mark makes it one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class NewMark(nn.Module):
    is_spectral_layer = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.svdvals(x.flatten(2)) if x.sum() > 0 else x


def parametrised() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True), DecorrelatedBatchNorm2d(6))
    spectral_norm(orthogonal_weight(model[0]))
    return model


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3), DecorrelatedBatchNorm2d(4))
    model[1].requires_grad_(False)
    return model


MODELS = {
    "sequential": (
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3), DecorrelatedBatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3)),
        ["0"],
    ),
    "what lies between": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.PReLU(), nn.MaxPool2d(2), nn.Dropout(), Own(), nn.Flatten()
        ),
        ["0"],
    ),
    "linear": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 12), nn.Linear(12, 5), DecorrelatedBatchNorm1d(5)),
        ["2"],
    ),
    "two spectral layers": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3), DecorrelatedBatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1), GlobalCovariancePool2d(4)
        ),
        ["0", "3"],
    ),
    "one spectral layer behind another": (
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3), DecorrelatedBatchNorm2d(6), nn.ReLU(), GlobalCovariancePool2d(6)),
        ["0"],
    ),
    "reduction": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), GlobalCovariancePool2d(8, reduction=4)),
        ["2.reduction.0"],
    ),
    "residual": (
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3), Block(6, 8), Block(8, 8), GlobalCovariancePool2d(8)),
        ["1.conv2", "1.shortcut", "2.conv2"],
    ),
    "functional": (lambda: FunctionalWeights(False), ["owner"]),
    "functional transposed": (lambda: FunctionalWeights(True), ["owner"]),
    "guarded": (Guarded, ["conv"]),
    "parametrised": (parametrised, ["0"]),
    "frozen": (frozen, ["1"]),
    "whitened input": (
        lambda: nn.Sequential(DecorrelatedBatchNorm2d(3), nn.Conv2d(3, 6, 3), DecorrelatedBatchNorm2d(6)),
        ["1"],
    ),
    "layer norm over several dimensions": (
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.LayerNorm([6, 6, 6]), nn.ReLU(), DecorrelatedBatchNorm2d(6)),
        ["0"],
    ),
    "only the mark": (lambda: nn.Sequential(nn.Conv2d(3, 6, 3), NewMark()), ["0"]),
    "wrapped": (lambda: nn.ModuleDict({"module": Guarded()})["module"], ["conv"]),
}


@pytest.mark.parametrize("how", ["tracing", "running"])
@pytest.mark.parametrize("kind", MODELS)
def test_they_are_found(kind, how):
    torch.manual_seed(0)
    make, names = MODELS[kind]
    model = make().train()
    before = copy.deepcopy(model)
    found = pre_spectral_layers(model, None if how == "tracing" else IMAGES)
    assert list(found) == names
    assert all(found[name] is model.get_submodule(name) for name in names)
    # The search leaves no trace: statistics, mode, hooks, gradients.
    assert same(model, before)
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_a_transformer_is_found_by_running():
    """Its residual sums join the patches, the attention's output and the last linear layer."""
    found = pre_spectral_layers(VisionTransformer(), IMAGES)
    assert list(found) == ["patch", "encoder.self_attn.out_proj", "encoder.linear2"]


class TokenPooling(nn.Module):
    """A small vision transformer: two encoder layers and a normalisation, then covariance pooling over the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 2, stride=2)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(16))
        self.reduce = nn.Linear(16, 6)
        self.pool = GlobalCovariancePool2d(6)
        self.classifier = nn.Linear(self.pool.out_features, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.reduce(self.encoder(self.patch(x).flatten(2).transpose(1, 2)))
        return self.classifier(self.pool(tokens.transpose(1, 2).unsqueeze(-1)).flatten(1))


def test_a_vision_transformer_is_treated_and_trains():
    """Also the layers inside its encoder, whose evaluation takes PyTorch's fused path that reads weights by itself."""
    torch.manual_seed(0)
    for layers in (None, ["encoder.layers.1.linear2", "encoder.layers.1.self_attn.out_proj"]):
        model = TokenPooling()
        before = copy.deepcopy(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        treatment = treat(model, optimizer, "nog+ow+olr", layers=layers, example_input=IMAGES)
        assert list(treatment.layers) == (layers or ["reduce"])
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(IMAGES), torch.arange(4)).backward()
            optimizer.step()
        assert all(p.isfinite().all() for p in model.parameters())
        for layer in treatment.layers.values():
            W = layer.weight.detach().double()
            gram = W @ W.T if W.shape[0] <= W.shape[1] else W.T @ W
            assert torch.dist(gram, torch.eye(len(gram), dtype=torch.float64)) < 1e-5
        trained = model(IMAGES)
        with torch.no_grad():
            assert (model.eval()(IMAGES) - trained).abs().max() < 1e-4
        treatment.remove()
        assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]


def test_examples_may_be_tuples_and_mappings():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Linear(3, 4), nn.Linear(2, 4), DecorrelatedBatchNorm1d(4)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.norm(self.a(x) + self.b(y))

    x, y = torch.randn(8, 3), torch.randn(8, 2)
    for example in ((x, y), {"x": x, "y": y}, UserDict(x=x, y=y), None):
        assert list(pre_spectral_layers(Two(), example)) == ["a", "b"]


class Hiding(torch.autograd.Function):
    """Runs a module in its forward pass, as reversible blocks do: its weights are no inputs."""

    @staticmethod
    def forward(ctx, x, module):
        return module(x)

    @staticmethod
    def backward(ctx, gradient):
        raise NotImplementedError


class Doubling(torch.autograd.Function):
    """An operation without a weight."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class Opaque(nn.Module):
    """Its second layer is called by ``call``; the spectral layer outside, or inside too."""

    def __init__(self, call, inside: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3), DecorrelatedBatchNorm2d(8)
        self.call, self.inside = call, inside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.inside:
            return self.call(nn.Sequential(self.b, self.norm), self.a(x))
        return self.norm(self.call(self.b, self.a(x)).relu())


CALLS = {
    "a checkpoint (take use_reentrant=False)": lambda f, x: checkpoint(f, x, use_reentrant=True),
    "a checkpoint (take use_reentrant=False) ": lambda f, x: checkpoint(
        lambda z: F.conv2d(z, f.weight) if isinstance(f, nn.Conv2d) else f(z), x, use_reentrant=True
    ),
    "Hiding": lambda f, x: Hiding.apply(x, f),
}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_layers_that_the_graph_does_not_show_are_not_passed_over(name, inside):
    model = Opaque(CALLS[name], inside)
    with pytest.raises(ValueError, match=re.escape(f"inside {name.strip()} cannot be found") + ".*layers="):
        pre_spectral_layers(model, IMAGES)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("inside", [False, True])
def test_a_checkpoint_without_reentry_is_followed(inside):
    assert list(pre_spectral_layers(Opaque(lambda f, x: checkpoint(f, x, use_reentrant=False), inside), IMAGES)) == [
        "b"
    ]


def test_of_two_functions_with_one_forward_only_the_one_that_hides_a_layer_is_refused():
    class Other(Hiding):
        pass

    class Model(Opaque):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.call(nn.Conv2d(3, 3, 1), x)  # its output is not used
            return self.norm(self.b(Hiding.apply(self.a(x), nn.Identity())))

    assert list(pre_spectral_layers(Model(lambda f, x: Other.apply(x, f)), IMAGES)) == ["b"]


def test_functions_that_hide_no_layer_are_followed():
    model = Opaque(lambda f, x: Doubling.apply(f(Doubling.apply(x))))
    assert list(pre_spectral_layers(model, IMAGES)) == ["b"]


def test_a_mixed_mode_is_restored():
    model = Guarded()
    model.conv.eval()
    pre_spectral_layers(model, IMAGES)
    assert model.training
    assert not model.conv.training


def test_a_shared_spectral_layer_sees_all_its_callers():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), DecorrelatedBatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.b(self.norm(self.a(x))))

    for example in (None, IMAGES):
        assert list(pre_spectral_layers(Shared(), example)) == ["a", "b"]


class DataDependent(nn.Module):
    """Which layer is used depends on the values of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), DecorrelatedBatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.a(x) if x.sum() > 1e9 else self.b(x))


class Loop(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.conv, self.norm = form, nn.Conv2d(3, 3, 1), DecorrelatedBatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.form == "len":
            x = torch.stack([self.conv(x[i : i + 1])[0] for i in range(len(x))])
        elif self.form == "int":
            x = self.conv(x).repeat(int(x.shape[0]), 1, 1, 1)
        else:
            while x.sum() > 1e9:
                x = self.conv(x)
        return self.norm(self.conv(x))


class Raw(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.norm = nn.Parameter(torch.eye(8)), DecorrelatedBatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x @ self.matrix)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), DecorrelatedBatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


class Refuses(Unused):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no forward pass today")


BOTH = (None, IMAGES)
REFUSED = {
    "no spectral layer": (lambda: nn.Linear(3, 3), BOTH, "Linear has no spectral layer; put one in .*layers="),
    "nothing before": (
        lambda: nn.Sequential(DecorrelatedBatchNorm2d(3), nn.Conv2d(3, 4, 1)),
        BOTH,
        "no layer with a matrix-like weight comes before the spectral layer '0'.*layers=",
    ),
    "data dependent": (DataDependent, (None,), "depends on its data; give an example_input"),
    "len": (lambda: Loop("len"), (None,), "cannot be traced symbolically .*len.*; give an example_input"),
    "int": (lambda: Loop("int"), (None,), "cannot be traced symbolically .*int.*; give an example_input"),
    "while": (lambda: Loop("while"), (None,), "more than 64 paths .*; give an example_input"),
    "raw": (Raw, BOTH, "parameter 'matrix' before the spectral layer is not the weight of a layer; pass it to"),
    "lstm": (
        lambda: nn.Sequential(nn.LSTM(8, 4), NewMark()),
        (None,),
        r"layer '0' \(LSTM\) before the spectral layer has several weights.*give an example_input",
    ),
    "transformer": (VisionTransformer, (None,), r"'encoder' \(TransformerEncoderLayer\).*give an example_input"),
    "never called": (Unused, BOTH, "Unused.*called? no spectral layer|calls no spectral layer"),
    "raises": (Refuses, BOTH, "no forward pass today"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_found_is_explained(case):
    make, examples, message = REFUSED[case]
    for example in examples:
        model = make()
        with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
            pre_spectral_layers(model, example)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert model.training


@pytest.mark.parametrize("model", [DataDependent, lambda: Loop("len"), lambda: Loop("int"), lambda: Loop("while")])
def test_an_example_helps_where_tracing_does_not(model):
    assert next(iter(pre_spectral_layers(model(), IMAGES))) in ("b", "conv")


class Remembering(nn.Module):
    """Keeps in evaluation what it computes from its weight, and forgets it when it trains: as LeViT its biases."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.kept = nn.Parameter(torch.ones(1)), None

    def train(self, mode: bool = True) -> Remembering:
        if mode:
            self.kept = None
        return super().train(mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            return x * self.weight.exp()
        if self.kept is None:
            self.kept = self.weight.exp()
        return x * self.kept


@pytest.mark.parametrize("training", [True, False])
def test_a_run_on_an_example_leaves_nothing_that_the_model_remembers(training):
    """Else it could not be copied, and would go on evaluating with the weights of before."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Remembering(), nn.BatchNorm2d(4), nn.Dropout()).train(training)
    model[3].train(not training)
    x = torch.randn(8, 3, 5, 5)
    replace_batchnorm(model, example_input=x)
    assert model[1].kept is None
    assert list(pre_spectral_layers(model, example_input=x)) == ["0"]
    assert model[1].kept is None
    update_statistics(model, [x])
    assert model[1].kept is None
    assert [module.training for module in model] == [training, training, training, not training]
    copy.deepcopy(model)
