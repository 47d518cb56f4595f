"""Residual networks: the layers of the article, a spectral layer where asked for, and what the treatments need."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from wellcond.experiments.data.load import load_images
from wellcond.experiments.data.named import NAMED
from wellcond.experiments.grid.configs import grid
from wellcond.experiments.run import parts
from wellcond.experiments.run.models import MODELS, build_model
from wellcond.linalg import NewtonSchulz
from wellcond.nn import DecorrelatedBatchNorm2d, GlobalCovariancePool2d, IterNorm2d
from wellcond.orthogonality import pre_spectral_layers

BASIC, BOTTLENECK = "basic", "bottleneck"
# He et al. (CVPR 2016): section 4.2 with n = 1; table 1, the columns of 18, 34, 50 and 101 layers.
ARTICLE = {
    "resnet8": (BASIC, (1, 1, 1), 16),
    "resnet18": (BASIC, (2, 2, 2, 2), 64),
    "resnet34": (BASIC, (3, 4, 6, 3), 64),
    "resnet50": (BOTTLENECK, (3, 4, 6, 3), 64),
    "resnet101": (BOTTLENECK, (3, 4, 23, 3), 64),
}
ALL = [
    (name, norm, head)
    for name in ("resnet8", "resnet18", "resnet50")
    for norm in ("batch", "zca")
    for head in ("avg", "gcp")
]


def count(kind: str, depths: tuple[int, ...], width: int, classes: int, in_channels: int = 3, stem: int = 3) -> int:
    """Parameters by arithmetic: a k×k convolution from a to b channels has k²ab, a batch norm of b has 2b."""

    def conv_bn(a: int, b: int, k: int) -> int:
        return k * k * a * b + 2 * b

    total, channels = conv_bn(in_channels, width, stem), width
    for stage, depth in enumerate(depths):
        inner = width * 2**stage
        outer = inner if kind == BASIC else 4 * inner
        for block in range(depth):
            if kind == BASIC:
                total += conv_bn(channels, inner, 3) + conv_bn(inner, inner, 3)
            else:
                total += conv_bn(channels, inner, 1) + conv_bn(inner, inner, 3) + conv_bn(inner, outer, 1)
            if block == 0 and (stage > 0 or channels != outer):
                total += conv_bn(channels, outer, 1)
            channels = outer
    return total + channels * classes + classes


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ARTICLE)
@pytest.mark.parametrize("classes", [10, 100])
def test_parameters_are_as_many_as_the_article_implies(name: str, classes: int):
    assert parameters(build_model(name, num_classes=classes)) == count(*ARTICLE[name], classes)
    assert set(ARTICLE) == set(MODELS)


def test_parameters_agree_with_the_figures_that_people_quote_for_cifar10():
    assert round(count(*ARTICLE["resnet18"], 10) / 1e6, 2) == 11.17
    assert round(count(*ARTICLE["resnet50"], 10) / 1e6, 1) == 23.5


def test_the_digits_network_has_the_stem_and_width_asked_for():
    model = build_model("resnet8", num_classes=10, in_channels=1, width=12, stem_kernel=5)
    assert parameters(model) == count(BASIC, (1, 1, 1), 12, 10, in_channels=1, stem=5)
    assert model.conv1.weight.shape == (12, 1, 5, 5)
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 10)


def maps(model: nn.Module, x: Tensor) -> dict[str, tuple[int, ...]]:
    """The shape of what each part of the network gives out, without the batch."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, part in model.named_children():
        x = part(x)
        shapes[name] = tuple(x.shape[1:])
    return shapes


@pytest.mark.parametrize("name", ARTICLE)
def test_stages_halve_the_image_and_the_covariance_head_keeps_the_last_one(name: str):
    kind, depths, width = ARTICLE[name]
    factor = 4 if kind == BOTTLENECK else 1
    with torch.no_grad():
        plain = maps(build_model(name, num_classes=7).eval(), torch.randn(1, 3, 32, 32))
        pooled = maps(build_model(name, num_classes=7, head="gcp").eval(), torch.randn(1, 3, 32, 32))
    assert plain["conv1"] == plain["relu"] == (width, 32, 32)
    for stage in range(len(depths)):
        side, last = 32 >> stage, stage == len(depths) - 1
        assert plain[f"stage{stage + 1}"] == (factor * width << stage, side, side)
        side = side * 2 if last else side
        assert pooled[f"stage{stage + 1}"] == (factor * width << stage, side, side)
    reduced = min(256, (factor * width << len(depths) - 1) // 2)
    assert pooled["flatten"] == (reduced * (reduced + 1) // 2,), "the upper triangle of a covariance"
    assert plain["classifier"] == pooled["classifier"] == (7,)


@pytest.mark.parametrize(("name", "norm", "head"), ALL)
def test_only_what_was_asked_for_is_a_spectral_layer(name: str, norm: str, head: str):
    model = build_model(name, num_classes=10, norm=norm, head=head, groups=2, eps=1e-3)
    decorrelated = [n for n, m in model.named_modules() if isinstance(m, DecorrelatedBatchNorm2d)]
    assert decorrelated == (["norm1"] if norm == "zca" else [])
    if norm == "zca":
        assert (model.norm1.groups, model.norm1.eps) == (2, 1e-3)
    assert [n for n, m in model.named_modules() if isinstance(m, GlobalCovariancePool2d)] == (
        ["pool"] if head == "gcp" else []
    )


@pytest.mark.parametrize(
    ("norm", "head", "layers"),
    [("zca", "avg", {"conv1"}), ("batch", "gcp", {"pool.reduction.0"}), ("zca", "gcp", {"conv1", "pool.reduction.0"})],
)
@pytest.mark.parametrize("name", ARTICLE)
def test_the_layer_before_the_spectral_layer_is_found_by_tracing(name: str, norm: str, head: str, layers: set[str]):
    found = pre_spectral_layers(build_model(name, num_classes=10, norm=norm, head=head))
    assert set(found) == layers


@pytest.mark.parametrize(("norm", "head"), [("batch", "avg"), ("zca", "avg"), ("zca", "gcp")])
def test_every_parameter_gets_a_finite_gradient_and_a_step_lowers_the_loss(norm: str, head: str):
    torch.manual_seed(0)
    model = build_model("resnet8", num_classes=4, norm=norm, head=head, width=8)
    x, y = torch.randn(32, 3, 8, 8), torch.arange(32) % 4
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.01), []
    for _ in range(5):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        for name, p in model.named_parameters():
            assert p.grad is not None, name
            assert p.grad.isfinite().all(), name
            assert p.grad.any(), name
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_weights_begin_as_he_et_al_draw_them():
    """Deviation √(2 / (k² · out)); the sample's is within 5 standard errors (1 / √(2n) of it), n ≥ 400."""
    torch.manual_seed(1)
    for name, module in build_model("resnet18", num_classes=10, head="gcp").named_modules():
        if isinstance(module, nn.Conv2d):
            weight = module.weight.detach().double()
            expected = (2 / (module.kernel_size[0] * module.kernel_size[1] * module.out_channels)) ** 0.5
            assert module.bias is None, name
            assert abs(weight.std() / expected - 1) < 5 / (2 * weight.numel()) ** 0.5, name
            assert abs(weight.mean()) < 5 * expected / weight.numel() ** 0.5, name
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()


@pytest.mark.parametrize("norm", ["batch", "zca"])
def test_channels_last_gives_the_same_logits(norm: str):
    torch.manual_seed(0)
    model, x = build_model("resnet8", num_classes=10, norm=norm).double(), torch.randn(8, 3, 16, 16).double()
    expected = model(x)
    model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    found = model(x.to(memory_format=torch.channels_last))
    # float64 sums in another order: about 1e-16 · √(terms) a layer, times κ ≤ 1e5 of the whitening
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("kernel", "rank"), [(5, 16), (3, 9)])
def test_a_wide_enough_stem_lets_the_covariance_of_the_digits_have_full_rank(kernel: int, rank: int):
    """Rank ≤ in_channels · kernel²; shown on scikit-learn's digits by the singular values of the centred features."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    torch.manual_seed(0)
    model = build_model("resnet8", num_classes=10, in_channels=1, width=16, stem_kernel=kernel).double()
    with torch.no_grad():
        features = model.conv1(torch.from_numpy(digits.images[:64])[:, None]).transpose(0, 1).flatten(1)
    singular = torch.linalg.svdvals(features - features.mean(1, keepdim=True)).numpy()
    tolerance = singular[0] * max(features.shape) * np.finfo(np.float64).eps
    assert (singular > tolerance).sum() == rank


def test_the_iterative_norm_asks_for_the_newton_schulz_solver():
    zca, iterated = (build_model("resnet8", num_classes=10, norm=norm).norm1 for norm in ("zca", "iter"))
    assert zca.solver == "auto"
    assert isinstance(iterated, IterNorm2d) and isinstance(iterated.solver, NewtonSchulz)
    assert (iterated.solver.steps, iterated.solver.tolerance) == (5, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"name": "resnet19"},
            r"unknown model 'resnet19'; did you mean 'resnet18'\? "
            r"\(known: resnet8, resnet18, resnet34, resnet50, resnet101\)",
        ),
        ({"name": "ResNet50"}, r"unknown model 'ResNet50'; did you mean 'resnet50'"),
        ({"name": "vit"}, r"unknown model 'vit' \(known"),
        ({"norm": "zcaa"}, r"unknown norm 'zcaa'; did you mean 'zca'"),
        ({"head": "max"}, r"unknown head 'max'.*known: avg, gcp"),
        ({"num_classes": 0}, r"num_classes must be at least 1, got 0"),
        ({"in_channels": 0}, r"in_channels must be at least 1, got 0"),
        ({"width": -4}, r"width must be at least 1, got -4"),
        ({"stem_kernel": 4}, r"stem_kernel must be odd and positive, got 4"),
        ({"norm": "zca", "groups": 7}, r"7"),
    ],
)
def test_what_cannot_be_built_is_named(options: dict[str, Any], message: str):
    arguments = {"name": "resnet8", "num_classes": 10, **options}
    with pytest.raises(ValueError, match=message):
        build_model(arguments.pop("name"), **arguments)


def test_a_new_norm_or_data_set_is_one_entry(monkeypatch: pytest.MonkeyPatch):
    """Configuration, grid, network and loader read the same tables."""
    norm = parts.Norm(lambda channels, options: DecorrelatedBatchNorm2d(channels, eps=2 * options.eps))
    monkeypatch.setitem(parts.NORMS, "mine", norm)
    data = SimpleNamespace(load=NAMED["digits"].load, SETTINGS={"model": "resnet8", "epochs": 7})
    monkeypatch.setitem(NAMED, "scans", data)
    (config,) = grid(["mine"], ["avg"], ["nog"], [0], data="scans")
    assert (config.label, config.model, config.epochs) == ("mine+nog", "resnet8", 7)
    assert build_model("resnet8", num_classes=2, norm="mine", eps=1e-3).norm1.eps == 2e-3
    assert load_images("scans").num_classes == 10
    with pytest.raises(ValueError, match="did you mean 'scans'"):
        load_images("scan")
