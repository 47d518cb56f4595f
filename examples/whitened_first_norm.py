"""Whiten the channels of a model of timm and of one of torchvision: ZCA in place of the first batch norm.

Neither model is changed by hand. `replace_batchnorm` finds the norm that is computed first, also where it is fused
with its activation as in timm's MobileNets; `treat` finds the convolution before it. Afterwards `fold` takes the norm
out for inference. The task is to tell from a crop which of scikit-learn's two photographs it was cut from.

    pip install timm torchvision
    python examples/whitened_first_norm.py
"""

from __future__ import annotations

import argparse
import copy

import torch
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from wellcond.monitor import ConditionMonitor
from wellcond.nn import fold, replace_batchnorm
from wellcond.orthogonality import treat


def build(name: str) -> nn.Module:
    """A model with random weights for two classes: LIBRARY:ARCHITECTURE."""
    library, _, architecture = name.partition(":")
    if library == "timm":
        import timm

        return timm.create_model(architecture, num_classes=2)
    import torchvision

    return torchvision.models.get_model(architecture, num_classes=2)


def crops(photographs: list[Tensor], count: int, size: int = 64) -> tuple[Tensor, Tensor]:
    """Random crops (count, 3, size, size), and which photograph each is of."""
    labels = torch.randint(2, (count,))
    images = []
    for label in labels:
        photograph = photographs[label]
        top, left = (int(torch.randint(side - size, ())) for side in photograph.shape[1:])
        images.append(photograph[:, top : top + size, left : left + size])
    return torch.stack(images), labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["timm:mobilenetv3_small_050", "torchvision:resnet18"])
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    photographs = [torch.tensor(image).permute(2, 0, 1) / 128 - 1 for image in load_sample_images().images]
    for name in options.models:
        torch.manual_seed(0)
        model = build(name)
        images, labels = crops(photographs, 16)
        replaced = replace_batchnorm(model, "first", example_input=images)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        treatment = treat(model, optimizer, "nog", example_input=images)
        with ConditionMonitor(model, every=1, optimizer=optimizer) as monitor:
            for _ in range(options.steps):
                images, labels = crops(photographs, 16)
                nn.functional.cross_entropy(model(images), labels).backward()
                optimizer.step()
                optimizer.zero_grad()
        model.eval()
        deployed = fold(copy.deepcopy(model), example_input=images)
        with torch.no_grad():
            expected, folded = model(images), deployed(images)
        gap = ((folded - expected).norm() / expected.norm()).item()
        print(f"{name}: whitened {replaced[0]}, treated {', '.join(treatment.layers)}")
        first, last = (record.kappa_eps for record in (monitor.records[0], monitor.records[-1]))
        print(f"  κ(P + εI) before it {first:.1e}, after {options.steps} steps {last:.1e}")
        print(f"  relative difference of the folded model {gap:.0e}")


if __name__ == "__main__":
    main()
