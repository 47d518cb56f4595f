"""Residual networks with an optional spectral layer at either end.

He, Zhang, Ren & Sun, "Deep residual learning for image recognition", CVPR 2016: the networks of 6n + 2 layers of
section 4.2 (three stages, 16-32-64 channels) and those of table 1 (four stages, 64-128-256-512, basic or bottleneck
blocks). The stem is one convolution of stride 1 without pooling, for images of about 32×32; or the article's ImageNet
stem, 7×7 with stride 2 and max-pooling. Shortcuts that change the shape are always 1×1 convolutions with batch norm
(the article's option B), and a bottleneck has its stride in the 3×3 convolution (in the article: in the first 1×1), as
is now usual.

Decorrelated batch norm replaces the batch norm after the first convolution, as in Song, Sebe & Wang (ECCV 2022),
section 6.1. A covariance head replaces the average pooling, as in section 6.2 and the code it builds on: a 1×1
convolution to 256 channels, batch norm and ReLU before the covariance, and the upper triangle of its square root after
it. If the last stage has fewer than 512 channels, they are reduced by half instead.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

from torch import Tensor, nn

from wellcond._shared.names import require_known
from wellcond.experiments.run.parts import HEADS, NORMS, SpectralOptions


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut around them."""

    expansion = 1
    conv1: nn.Conv2d
    bn1: nn.BatchNorm2d
    conv2: nn.Conv2d
    bn2: nn.BatchNorm2d
    shortcut: nn.Module
    relu: nn.ReLU

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(in_channels, channels, 3, stride), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = _conv(channels, channels, 3, 1), nn.BatchNorm2d(channels)
        self.shortcut = _shortcut(in_channels, channels, stride)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu(y + self.shortcut(x))


class Bottleneck(nn.Module):
    """1×1, 3×3 (with the stride) and 1×1 convolutions, the last to four times the channels, and a shortcut."""

    expansion = 4
    conv1: nn.Conv2d
    bn1: nn.BatchNorm2d
    conv2: nn.Conv2d
    bn2: nn.BatchNorm2d
    conv3: nn.Conv2d
    bn3: nn.BatchNorm2d
    shortcut: nn.Module
    relu: nn.ReLU

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1, self.bn1 = _conv(in_channels, channels, 1, 1), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = _conv(channels, channels, 3, stride), nn.BatchNorm2d(channels)
        self.conv3, self.bn3 = _conv(channels, out_channels, 1, 1), nn.BatchNorm2d(out_channels)
        self.shortcut = _shortcut(in_channels, out_channels, stride)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu(y + self.shortcut(x))


class Design(NamedTuple):
    """The design of a residual network."""

    block: type[BasicBlock] | type[Bottleneck]
    depths: tuple[int, ...]  # blocks in each stage
    width: int  # of the first stage; every further stage doubles it and, with stride 2, halves the image


MODELS = {
    "resnet8": Design(BasicBlock, (1, 1, 1), 16),
    "resnet18": Design(BasicBlock, (2, 2, 2, 2), 64),
    "resnet34": Design(BasicBlock, (3, 4, 6, 3), 64),
    "resnet50": Design(Bottleneck, (3, 4, 6, 3), 64),
    "resnet101": Design(Bottleneck, (3, 4, 23, 3), 64),
}

STEMS = ("cifar", "imagenet")
STEM_KERNEL = 3
"""Default kernel size of the `cifar` stem."""


def build_model(
    name: str,
    *,
    num_classes: int,
    in_channels: int = 3,
    norm: str = "batch",
    head: str = "avg",
    width: int | None = None,
    stem: str = "cifar",
    stem_kernel: int = STEM_KERNEL,
    **spectral: Any,
) -> nn.Sequential:
    """A residual network for (N, in_channels, H, W) images, returning (N, num_classes) logits.

    A sequence of `conv1`, `norm1`, `relu`, (`maxpool`,) `stage1` …, `pool`, `flatten`, `classifier`, so that the layer
    before a spectral layer is easy to see and to trace.

    Convolutions are initialised from N(0, 2 / fan_out) (He et al., "Delving deep into rectifiers", ICCV 2015), norms as
    the identity, and the classifier as in `torch.nn.Linear`; all from torch's global generator.

    Args:
        name: `resnet8`, `resnet18`, `resnet34`, `resnet50` or `resnet101`.
        num_classes: logits per image.
        in_channels: channels of the images.
        norm: after the first convolution: `batch` norm; `zca`, decorrelated batch norm; or `iter`, the same by the
            Newton–Schulz iteration. All other norms are batch norms.
        head: `avg`, the mean over positions; or `gcp`, the square root of the covariance over positions, after a 1×1
            convolution to 256 channels (or half of the last stage's, if fewer). With `gcp` the last stage is not
            downsampled, as in that literature, for more positions.
        width: channels of the first stage (default 16 for `resnet8`, 64 for the others).
        stem: `cifar`, a convolution of stride 1; or `imagenet`, 7×7 with stride 2, norm, ReLU, and a 3×3 max-pooling
            with stride 2, so that 224×224 images enter the first stage as 56×56.
        stem_kernel: odd kernel size of the `cifar` stem. The covariance of its output has rank at most
            in_channels · stem_kernel²; full rank needs a `width` of at most that.
        spectral: options of the spectral layers, as in :class:`SpectralOptions`.

    Raises:
        ValueError: an unknown name (with the closest valid one), an invalid size, or a ``stem_kernel`` with the
            `imagenet` stem.

    Example:
        >>> import torch
        >>> model = build_model("resnet18", num_classes=10, norm="zca")
        >>> model(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    names = (("model", name, MODELS), ("norm", norm, NORMS), ("head", head, HEADS), ("stem", stem, STEMS))
    for kind, chosen, known in names:
        require_known(chosen, known, kind)
    design = MODELS[name]
    width = design.width if width is None else width
    for what, value in (("num_classes", num_classes), ("in_channels", in_channels), ("width", width)):
        if value < 1:
            raise ValueError(f"{what} must be at least 1, got {value}")
    if stem_kernel < 1 or stem_kernel % 2 == 0:
        raise ValueError(f"stem_kernel must be odd and positive, got {stem_kernel}")
    if stem == "imagenet" and stem_kernel != STEM_KERNEL:
        raise ValueError(f"the imagenet stem has a 7×7 convolution: leave stem_kernel out, got {stem_kernel}")
    kernel, stride = (7, 2) if stem == "imagenet" else (stem_kernel, 1)
    parts: dict[str, nn.Module] = {
        "conv1": _conv(in_channels, width, kernel, stride),
        "norm1": NORMS[norm].build(width, SpectralOptions(**spectral)),
        "relu": nn.ReLU(),
    }
    if stem == "imagenet":
        parts["maxpool"] = nn.MaxPool2d(3, stride=2, padding=1)
    channels = width
    for stage, depth in enumerate(design.depths):
        halve = stage > 0 and not (HEADS[head].spectral and stage == len(design.depths) - 1)
        blocks = nn.Sequential()
        for i in range(depth):
            blocks.append(design.block(channels, width << stage, stride=2 if halve and i == 0 else 1))
            channels = (width << stage) * design.block.expansion
        parts[f"stage{stage + 1}"] = blocks
    pool, features = HEADS[head].build(channels, SpectralOptions(**spectral))
    parts |= {"pool": pool, "flatten": nn.Flatten(), "classifier": nn.Linear(features, num_classes)}
    model = nn.Sequential(OrderedDict(parts))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def _conv(in_channels: int, out_channels: int, kernel: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(_conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))
