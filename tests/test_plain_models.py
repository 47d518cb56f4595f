"""A plain copy has the layers, the names and the outputs of the model: whatever builds that one saves and loads it."""

from __future__ import annotations

import warnings

import lightning
import pytest
import torch
import transformers
from torch import nn

from helpers import relative_error
from test_folding import LAYERS, trained
from wellcond.nn import (
    DecorrelatedBatchNorm1d,
    DecorrelatedBatchNorm2d,
    GlobalCovariancePool2d,
    IterNorm2d,
    SpectralModule,
    fold,
    replace_batchnorm,
    to_plain,
)
from wellcond.orthogonality import orthogonal_weight, spectral_norm

BATCHNORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def pure(model: nn.Module) -> bool:
    """Whether every module is torch's own, so that its pickle needs nothing of ours."""
    return all(type(m).__module__.startswith("torch.nn") for m in model.modules())


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("affine", [True, False])
def test_the_model_with_ordinary_batch_norm_loads_the_plain_copy(name, affine):
    layer, shape = LAYERS[name]
    untreated = nn.Sequential(layer(), BATCHNORMS[len(shape)](6, eps=3e-3, affine=affine), nn.ReLU()).double()
    model = nn.Sequential(*untreated)
    replace_batchnorm(model, groups=2, eps=1e-2, relative=True)
    orthogonal_weight(model[0])
    trained(model, shape)
    x = torch.randn(shape, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = to_plain(model)
    assert pure(plain) and not plain.training
    untreated = nn.Sequential(layer(), BATCHNORMS[len(shape)](6, eps=3e-3, affine=affine), nn.ReLU()).double().eval()
    untreated.load_state_dict(plain.state_dict())
    expected = model.eval()(x)
    # float64: eps64 times the condition number of the whitening, below 1e3 with this ε.
    for same in (plain, untreated):
        torch.testing.assert_close(same(x), expected, rtol=1e-11, atol=1e-11)
    assert list(plain.state_dict()) == list(untreated.state_dict())


HUGGING_FACE = {
    "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    "RegNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 4},
    "MobileNetV2": {"depth_multiplier": 0.25, "image_size": 32},
    "SwiftFormer": {"depths": [1, 1], "embed_dims": [8, 16], "image_size": 32},
}


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_untraceable_models_fold_by_an_example_and_go_through_pretrained(name, tmp_path):
    kind = getattr(transformers, f"{name}ForImageClassification")
    config = getattr(transformers, f"{name}Config")(num_labels=3, **HUGGING_FACE[name])
    model = kind(config)
    replace_batchnorm(model, groups=2)
    orthogonal_weight(next(m for m in model.modules() if isinstance(m, nn.Conv2d)))
    x = torch.randn(8, 3, 32, 32)
    model.train()(x)
    expected = model.eval()(x).logits
    names = set(kind(config).state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folded, plain = fold(model, x[:2]), to_plain(model, example_input={"pixel_values": x[:2]})
    for copy in (folded, plain):
        assert not any(isinstance(m, SpectralModule) for m in copy.modules())
        assert relative_error(copy(x).logits, expected) < 1e-5
    assert set(plain.state_dict()) == names
    plain.save_pretrained(tmp_path)
    loaded, report = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert relative_error(loaded.eval()(x).logits, expected) < 1e-5


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 2))

    def forward(self, x):
        return self.net(x)


def test_lightning_loads_the_plain_copy_from_a_checkpoint(tmp_path):
    model = Classifier()
    replace_batchnorm(model)
    spectral_norm(model.net[0])
    trained(model, (8, 3, 6, 6))
    path = tmp_path / "plain.ckpt"
    checkpoint = {"state_dict": to_plain(model).state_dict(), "pytorch-lightning_version": lightning.__version__}
    torch.save(checkpoint, path)
    x = torch.randn(4, 3, 6, 6)
    # float32: eps times the condition number of the whitening, some 100.
    assert relative_error(Classifier.load_from_checkpoint(path).eval()(x), model.eval()(x)) < 1e-4


def test_a_whole_plain_model_is_saved_and_loaded_by_torch_alone(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 6, 3), IterNorm2d(6), nn.ReLU(), orthogonal_weight(nn.Conv2d(6, 4, 3)))
    trained(model, (8, 3, 8, 8))
    x = torch.randn(4, 3, 8, 8)
    plain = to_plain(model)
    assert pure(plain)
    torch.save(plain, tmp_path / "model.pt")
    assert relative_error(torch.load(tmp_path / "model.pt", weights_only=False)(x), model.eval()(x)) < 1e-5


@pytest.mark.parametrize("plain_copy", [fold, to_plain])
def test_weights_without_a_norm_behind_become_plain_too(plain_copy):
    conv, dense = orthogonal_weight(nn.Conv2d(3, 6, 3)), spectral_norm(nn.Linear(96, 5))
    lstm = orthogonal_weight(nn.LSTM(5, 4), "weight_hh_l0")
    model = nn.ModuleDict({"net": nn.Sequential(conv, nn.ReLU(), nn.Flatten(), dense), "lstm": lstm})
    untreated = nn.ModuleDict(
        {"net": nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5)), "lstm": nn.LSTM(5, 4)}
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    copy = plain_copy(model)
    untreated.load_state_dict(copy.state_dict())
    assert pure(copy)
    assert [p.shape for p in copy.net.parameters()] == [p.shape for p in untreated.net.parameters()]
    x = torch.randn(4, 3, 6, 6)
    for same in (copy, untreated):
        torch.testing.assert_close(same.net(x), model.net(x))
        torch.testing.assert_close(same.lstm(model.net(x))[0], model.lstm(model.net(x))[0])
    assert nn.utils.parametrize.is_parametrized(conv)


def test_a_frozen_weight_stays_frozen():
    model = nn.Sequential(orthogonal_weight(nn.Conv2d(3, 6, 3).requires_grad_(False)), DecorrelatedBatchNorm2d(6))
    assert not to_plain(model)[0].weight.requires_grad
    assert to_plain(model)[1].weight.requires_grad


def test_a_norm_without_a_layer_before_it_becomes_a_convolution_and_is_named():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), DecorrelatedBatchNorm2d(6)).double()
    trained(model, (8, 3, 6, 6))
    with pytest.warns(UserWarning, match="'2': no layer before"):
        plain = to_plain(model)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    assert pure(plain)
    torch.testing.assert_close(plain(x), model.eval()(x), rtol=1e-9, atol=1e-9)


def test_a_norm_of_the_batch_is_refused():
    model = nn.Sequential(nn.Linear(3, 6), DecorrelatedBatchNorm1d(6, track_running_stats=False))
    with pytest.raises(ValueError, match=r"layer '1' .* keeps no running statistics"):
        to_plain(model)


def test_a_head_of_covariances_stays_and_its_state_is_that_of_plain_layers():
    head = GlobalCovariancePool2d(6, reduction=4)
    model = nn.Sequential(orthogonal_weight(nn.Conv2d(3, 6, 3)), DecorrelatedBatchNorm2d(6), nn.ReLU(), head)
    trained(model, (8, 3, 6, 6))
    plain = to_plain(model)
    assert list(plain[3].state_dict()) == list(head.state_dict())
    x = torch.randn(2, 3, 6, 6)
    assert relative_error(plain(x), model.eval()(x)) < 1e-4  # as above


def test_what_does_not_run_on_its_example_says_so():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), DecorrelatedBatchNorm2d(6))
    with pytest.raises(ValueError, match="Sequential could not be run on the example input"):
        fold(model, torch.randn(2, 4, 6, 6))


@pytest.mark.parametrize("example", [False, True])
@pytest.mark.parametrize("plain_copy", [fold, to_plain])
@pytest.mark.parametrize(
    "compiled", [("0",), ("1",), ("0", "1", "3"), ("", "0", "1", "2", "2.0", "2.1"), ("2", "2.1.1")]
)
def test_compiled_parts_are_plain_in_the_copy_and_stay_in_the_model(compiled, plain_copy, example, fresh_compiler):
    inner = nn.Sequential(nn.Conv2d(6, 6, 3), nn.Sequential(nn.ReLU(), nn.Conv2d(6, 6, 3), DecorrelatedBatchNorm2d(6)))
    model: nn.Module = nn.Sequential(
        nn.Conv2d(4, 6, 3), DecorrelatedBatchNorm2d(6), inner, nn.Conv2d(6, 6, 3, padding=1)
    )
    orthogonal_weight(model[3], map="soc")
    model = trained(model.double(), (8, 4, 16, 16))
    x = torch.randn(8, 4, 16, 16, dtype=torch.float64)
    expected = model.eval()(x)
    for name in sorted(compiled, key=len, reverse=True):  # a part before what it is in
        part = torch.compile(model.get_submodule(name), backend="eager")
        if name:
            model.set_submodule(name, part)
        else:
            model = part
    names = list(model.state_dict())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'3': a convolution of torch.nn is not skew-orthogonal")
        plain = plain_copy(model, x if example else None)
    assert list(model.state_dict()) == names
    assert not any(isinstance(m, DecorrelatedBatchNorm2d) for m in plain.modules())
    assert not [name for name, _ in plain.named_modules() if "_orig_mod" in name]
    assert all(max(m.kernel_size) > 1 for m in plain.modules() if isinstance(m, nn.Conv2d))  # none was put in
    torch.testing.assert_close(plain(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("plain_copy", [fold, to_plain])
def test_a_hook_around_a_compiled_part_goes_on_in_the_copy(plain_copy, fresh_compiler):
    model = trained(nn.Sequential(nn.Conv2d(4, 6, 3), DecorrelatedBatchNorm2d(6)).double(), (8, 4, 9, 9))
    model[0] = torch.compile(model[0], backend="eager")
    model[0].register_forward_hook(lambda module, args, out: 2 * out)
    x = torch.randn(8, 4, 9, 9, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # to_plain names the 1 × 1 convolution
        torch.testing.assert_close(plain_copy(model)(x), model.eval()(x), rtol=1e-9, atol=1e-9)
