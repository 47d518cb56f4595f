"""Runs in `channels_last`: the results of `contiguous` to rounding, and no layer copies a map from one to the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from small_runs import small
from wellcond.experiments.data.load import load_images
from wellcond.experiments.errors import ConfigError
from wellcond.experiments.run.build import build
from wellcond.experiments.run.config import run_config
from wellcond.experiments.run.models import build_model

PARTS = [("batch", "avg"), ("zca", "avg"), ("iter", "avg"), ("batch", "gcp"), ("zca", "gcp")]


class Copies(TorchDispatchMode):
    """Counts the copies of tensors of so many entries."""

    def __init__(self, entries: int) -> None:
        super().__init__()
        self.entries, self.count = entries, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        copies = func.overloadpacket in (torch.ops.aten.clone, torch.ops.aten.copy_, torch.ops.aten._to_copy)
        self.count += copies and isinstance(out, torch.Tensor) and out.numel() == self.entries
        return out


@pytest.mark.parametrize(("norm", "head"), PARTS)
def test_logits_and_gradients_are_equal_to_rounding(norm: str, head: str):
    """float64: sums of up to 4096 terms in another order, 1e-16 each, times κ ≤ 1e5 of whitening and square root."""
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model: Any = build_model("resnet8", num_classes=10, norm=norm, head=head, width=8).double()
        model.to(memory_format=layout)
        x = torch.randn(16, 3, 16, 16, dtype=torch.float64).contiguous(memory_format=layout)
        logits = model(x)
        logits.square().sum().backward()
        found.append([logits, *(p.grad for p in model.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8 * float(one.detach().abs().max()))


@pytest.mark.parametrize(("norm", "head"), PARTS[1:])
def test_spectral_layers_copy_no_map(norm: str, head: str):
    """As many copies of the size of the layer's map as in `contiguous`, forward and backward."""
    model: Any = build_model("resnet8", num_classes=10, norm=norm, head=head, width=8)
    layers = [model.norm1] if head == "avg" else [model.pool]
    for layer in layers:
        channels = layer.num_features if hasattr(layer, "num_features") else layer.in_channels
        counts = []
        for layout in (torch.contiguous_format, torch.channels_last):
            layer.to(memory_format=layout)
            x = torch.randn(16, channels, 9, 9).contiguous(memory_format=layout).requires_grad_()
            with Copies(x.numel()) as copies:
                y = layer(x)
                y.backward(torch.randn_like(y))
            if y.dim() == 4:
                assert y.is_contiguous(memory_format=layout)
            counts.append(copies.count)
        assert counts[1] <= counts[0]


@pytest.mark.parametrize("name", ["channels_last", "contiguous"])
def test_model_and_batches_are_in_the_format_of_the_run(name: str):
    module, images = build(small(memory_format=name, augment=True), load_images("digits", limit=130))
    layout = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}[name]
    weight = module.model.get_submodule("stage2.0.conv1").weight
    batch, _ = images.on_after_batch_transfer(next(iter(images.train_dataloader())), 0)
    for tensor in (weight, batch):
        assert isinstance(tensor, torch.Tensor) and tensor.is_contiguous(memory_format=layout)
    assert weight.is_contiguous() == (name == "contiguous")


def test_photographs_come_in_their_own_layout_and_leave_in_the_run_s(tmp_path: Any):
    """Decoded images lie as in their files; the batch is in the run's format whatever that is."""
    from image_files import pictures, write_image

    for i, pixels in enumerate(pictures(40, 0, (9, 9))):
        write_image(tmp_path / "ab"[i % 2] / f"{i}.png", pixels)
    batches = []
    for budget in (0, 2**30):
        data = load_images(tmp_path, memory_budget=budget)
        _, images = build(small(memory_format="contiguous", batch_size=8), data)
        batches.append(images.on_after_batch_transfer(next(iter(images.train_dataloader())), 0)[0])
    assert torch.equal(*batches)
    assert batches[0].stride() == batches[1].stride()


def test_narrow_networks_are_not_channels_last():
    """On some CPUs PyTorch corrupts memory in channels-last 1 × 1 convolutions of fewer than 8 channels."""
    assert run_config(width=4).memory_format == "contiguous"
    assert run_config(width=8).memory_format == run_config().memory_format == "channels_last"
    assert run_config(width=4, memory_format="contiguous").memory_format == "contiguous"
    for option in ({"memory_format": "channels_last"}, {"compile": True}):
        with pytest.raises(ConfigError, match=f"{next(iter(option))}.* corrupts memory on some CPUs"):
            build(run_config(width=4, **option), None)
    with pytest.raises(ConfigError, match="width must be at least 1, got 0"):
        run_config(width=0)
