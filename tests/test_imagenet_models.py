"""Networks for photographs: the stem and the sizes of the article, and the covariance head of the paper's Table 5."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from wellcond.experiments.run.config import run_config
from wellcond.experiments.run.models import build_model
from wellcond.orthogonality import pre_spectral_layers

# Of the same networks in torchvision, from its documentation (``num_params`` of the weights).
PARAMETERS = {"resnet18": 11_689_512, "resnet34": 21_797_672, "resnet50": 25_557_032, "resnet101": 44_549_160}


def shapes(model: nn.Module, x: torch.Tensor) -> dict[str, tuple[int, ...]]:
    """The shape of what each part gives out, without the batch; on meta tensors, which compute nothing."""
    found: dict[str, tuple[int, ...]] = {}
    for name, part in model.named_children():
        x = part(x)
        found[name] = tuple(x.shape[1:])
    return found


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_as_many_as_people_quote_for_imagenet(name: str):
    with torch.device("meta"):
        model = build_model(name, num_classes=1000, stem="imagenet")
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_maps_have_the_sizes_of_the_article():
    """Table 1 of He et al.: 112 after the convolution, 56 after the pooling, then 56, 28, 14 and 7."""
    with torch.device("meta"):
        plain = shapes(build_model("resnet50", num_classes=1000, stem="imagenet").eval(), torch.empty(1, 3, 224, 224))
    sides = {name: shape[1] for name, shape in plain.items() if len(shape) == 3}
    assert (sides["conv1"], sides["norm1"], sides["maxpool"]) == (112, 112, 56)
    assert [sides[f"stage{i}"] for i in (1, 2, 3, 4)] == [56, 56 // 2, 14, 7]


def test_the_covariance_head_is_that_of_table_5():
    """ResNet-18, last stage at 14 × 14, to 256 channels, and 32,896 features; the convolution is what is treated."""
    model = build_model("resnet18", num_classes=10, head="gcp", stem="imagenet").eval()
    reduction = model.pool.reduction
    assert [type(part) for part in reduction] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    assert reduction[0].weight.shape == (256, 512, 1, 1) and reduction[0].bias is None
    with torch.no_grad():
        found = shapes(model, torch.randn(1, 3, 224, 224))
    assert found["stage4"] == (512, 14, 14)
    assert found["flatten"] == (32_896,)
    assert set(pre_spectral_layers(model)) == {"pool.reduction.0"}


def test_the_stem_pools_the_largest_of_what_the_norm_gives():
    """Written out with the functions that the article names, in float64."""
    torch.manual_seed(0)
    model = build_model("resnet18", num_classes=3, stem="imagenet", norm="zca", width=4).double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    seen: list[torch.Tensor] = []
    model.stage1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(x)
    convolved = nn.functional.conv2d(x, model.conv1.weight, stride=2, padding=3)
    expected = nn.functional.max_pool2d(model.norm1(convolved).relu(), 3, 2, 1)
    assert seen[0].shape == (2, 4, 8, 8)
    torch.testing.assert_close(seen[0], expected, rtol=1e-14, atol=1e-14)
    assert set(pre_spectral_layers(model)) == {"conv1"}


def test_a_kernel_that_would_be_ignored_is_refused():
    with pytest.raises(ValueError, match="imagenet stem has a 7×7 convolution: leave stem_kernel out, got 5"):
        build_model("resnet18", num_classes=2, stem="imagenet", stem_kernel=5)
    with pytest.raises(ValueError, match="unknown stem 'imagnet'; did you mean 'imagenet'"):
        build_model("resnet18", num_classes=2, stem="imagnet")
    assert run_config(data="digits").stem_kernel == 5
    assert run_config(data="digits", stem="imagenet").stem_kernel == 3  # their own is of the other stem
