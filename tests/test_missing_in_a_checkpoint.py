"""What a checkpoint lacks: `from_pretrained` leaves it unwritten, and `init_missing` makes it as new."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, ResNetConfig, ResNetForImageClassification

from treatment_models import orthogonality_gap
from wellcond.nn import (
    DecorrelatedBatchNorm1d,
    DecorrelatedBatchNorm2d,
    GlobalCovariancePool2d,
    IterNorm2d,
    SkewOrthogonalConv2d,
    SubspaceLayer,
    replace_batchnorm,
)
from wellcond.orthogonality import orthogonal_weight, spectral_norm
from wellcond.transformers import init_missing

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


class Plain(PreTrainedModel):
    """A model whose checkpoint lacks what the derived ones add."""

    config_class = PreTrainedConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.add()
        self.post_init()

    def add(self) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def initialize_weights(self) -> None:
        init_missing(self)
        super().initialize_weights()


class WithNewLayers(Plain):
    def add(self) -> None:
        replace_batchnorm(self.net)
        self.norm = DecorrelatedBatchNorm1d(4, running="whitening")
        self.iter = IterNorm2d(4, track_running_stats=False)
        self.subspace = SubspaceLayer(3, 5)
        self.convolution = SkewOrthogonalConv2d(3, 4, 3)
        exponent = nn.Parameter(torch.tensor(0.3))
        self.head = GlobalCovariancePool2d(4, function="power", exponent=exponent)


class WithTreatedLayers(Plain):
    def add(self) -> None:
        self.linear = spectral_norm(orthogonal_weight(nn.Linear(4, 3)))
        self.grouped = orthogonal_weight(nn.ConvTranspose2d(4, 6, 3, groups=2))
        self.skew = orthogonal_weight(nn.Conv2d(3, 4, 3, padding=1), map="soc")
        self.recurrent = orthogonal_weight(nn.LSTM(3, 4), "weight_hh_l0")
        orthogonal_weight(self.net[0])


@pytest.fixture
def plain_checkpoint(tmp_path: Path) -> tuple[Plain, Path]:
    model = Plain(PreTrainedConfig())
    for _ in range(3):
        model.train()(torch.randn(4, 3, 8, 8) + 1)
    model.save_pretrained(tmp_path / "plain")
    return model, tmp_path / "plain"


@pytest.fixture
def memory_of_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is not initialised holds ones, and not by luck what the layer starts with."""
    empty_like = torch.empty_like

    def ones(x: Tensor, **options: Any) -> Tensor:
        made = empty_like(x, **options)
        return made if made.is_meta else made.fill_(1)

    monkeypatch.setattr(torch, "empty_like", ones)


@pytest.mark.usefixtures("memory_of_ones")
def test_layers_that_a_checkpoint_lacks_start_as_they_are_made(plain_checkpoint: tuple[Plain, Path]) -> None:
    model, folder = plain_checkpoint
    made = WithNewLayers.from_pretrained(folder)
    norm = made.net[1]
    assert isinstance(norm, DecorrelatedBatchNorm2d)
    assert torch.equal(norm.running_mean, model.net[1].running_mean)  # what the checkpoint has stays
    assert torch.equal(norm.running_cov, torch.eye(8)[None])
    assert norm.num_batches_tracked == 3
    fresh = WithNewLayers(PreTrainedConfig())
    for name in ("norm.running_mean", "norm.running_whitening", "norm.weight", "norm.num_batches_tracked", "iter.bias"):
        assert torch.equal(made.state_dict()[name], fresh.state_dict()[name])
    torch.testing.assert_close(made.subspace.weight.T @ made.subspace.weight, torch.eye(3))
    assert torch.equal(made.subspace.scale, torch.tensor([9.0, 6.0, 3.0]))
    assert torch.isfinite(made.convolution.kernel()).all() and made.convolution.kernel().abs().max() > 1e-3
    assert torch.isfinite(made.eval()(torch.randn(2, 3, 8, 8))).all()
    assert [p.item() for name, p in made.named_parameters() if "exponent" in name] == [0.5]
    assert [p.item() for name, p in fresh.named_parameters() if "exponent" in name] == [torch.tensor(0.3).item()]
    made.save_pretrained(folder.parent / "own")
    again = WithNewLayers.from_pretrained(folder.parent / "own")
    for name, value in made.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.usefixtures("memory_of_ones")
def test_treated_layers_that_a_checkpoint_lacks_are_treated_and_random(plain_checkpoint: tuple[Plain, Path]) -> None:
    _, folder = plain_checkpoint
    made = WithTreatedLayers.from_pretrained(folder)
    for layer in (made.linear, made.net[0], made.grouped):
        assert orthogonality_gap(layer) < 1e-5
        assert layer.parametrizations.weight.original.std() > 1e-2
    recurrent = made.recurrent.weight_hh_l0
    torch.testing.assert_close(recurrent.T @ recurrent, torch.eye(4))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    made.double().eval()
    torch.testing.assert_close((made.skew(x) - made.skew.bias.view(-1, 1, 1)).norm(), x.norm())  # 3 channels in 4
    assert made.skew.parametrizations.weight.original.std() > 1e-3
    made.save_pretrained(folder.parent / "own")
    again = WithTreatedLayers.from_pretrained(folder.parent / "own", dtype=torch.float64)
    torch.testing.assert_close(again.eval()(x), made(x))
    torch.testing.assert_close(again.skew(x), made.skew(x))


class WhitenedResNet(ResNetForImageClassification):
    """The new layers are in a model inside the model, which initialises its parts by itself."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        replace_batchnorm(self)
        orthogonal_weight(self.resnet.embedder.embedder.convolution)
        self.post_init()

    def initialize_weights(self) -> None:
        init_missing(self)
        super().initialize_weights()


@pytest.mark.usefixtures("memory_of_ones")
@pytest.mark.filterwarnings("default::UserWarning")
def test_layers_in_a_model_in_the_model_are_initialised_with_a_warning(tmp_path: Path) -> None:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    plain = ResNetForImageClassification(config)
    plain.save_pretrained(tmp_path / "plain")
    where = "resnet.embedder.embedder"
    with pytest.warns(UserWarning, match=rf"{where}.convolution.weight, {where}.normalization"):
        made = WhitenedResNet.from_pretrained(tmp_path / "plain")
    embedder = made.get_submodule(where)
    assert torch.equal(embedder.normalization.running_cov, torch.eye(8)[None])
    assert orthogonality_gap(embedder.convolution) < 1e-5
    assert torch.equal(made.classifier[1].weight, plain.classifier[1].weight)
    made.save_pretrained(tmp_path / "own")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = WhitenedResNet.from_pretrained(tmp_path / "own")
    for name, value in made.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
