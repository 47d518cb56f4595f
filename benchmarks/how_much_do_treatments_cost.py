"""How much of a training step do the treatments take?

A CIFAR ResNet-18 with decorrelated batch norm, SGD with momentum, batch 128, random images of 32 × 32. Two measures:

- directly, which is the precise one: what forward, backward and optimizer step of the treated layer's weight take more
  than those of the same weight untreated, all other work left out, over the time of an untreated training step;
- whole training steps of a treated and an untreated copy of the network in turn; on a CPU the treatments are far
  below the spread of a step there.

Minimum times of all repeats: whatever else the machine does only lengthens them.

    python benchmarks/how_much_do_treatments_cost.py --rounds 5
    python benchmarks/how_much_do_treatments_cost.py --quick
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
from torch import nn

from wellcond.bench.gauges import Call, take_turns
from wellcond.bench.ratios import add_ratios_option, write_ratios
from wellcond.experiments.run.models import build_model
from wellcond.orthogonality import treat

TREATMENTS = ("sn", "ol", "ow", "nog", "olr", "nog+ow+olr")


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)


def minimum(works: list[Call], rounds: int, device: str) -> list[float]:
    """Seconds of each piece of work, which take turns."""
    calls = {str(index): work for index, work in enumerate(works)}
    times = take_turns(calls, torch.device(device), seconds=0.0, rounds=(rounds, rounds))
    return [time.minimum for time in times.values()]


def training_step(
    model: nn.Module, treatments: str | None, size: int, device: str, map: str = "exp"
) -> Callable[[], object]:
    """A whole step on one batch, an orthogonal weight with this map."""
    optimizer = sgd(model)
    options = {"ow": {"map": map}} if treatments and "ow" in treatments.split("+") else None
    treatment = treat(model, optimizer, treatments, options=options) if treatments else None
    x, y = torch.randn(size, 3, 32, 32, device=device), torch.randint(0, 100, (size,), device=device)

    def step() -> None:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        (loss + treatment.loss() if treatment else loss).backward()
        optimizer.step()

    return step


def weight_step(layer: nn.Module, treatments: str | None) -> Callable[[], object]:
    """The weight's part of a step: its forward pass, the backward pass of a given gradient, the optimizer."""
    optimizer = sgd(layer)
    treatment = treat(layer, optimizer, treatments, layers=[layer]) if treatments else None
    gradient = torch.randn_like(layer.weight)

    def step() -> None:
        optimizer.zero_grad()
        product = (layer.weight * gradient).sum()
        (product + treatment.loss() if treatment else product).backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3, help="of whole steps")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="resnet8, batch 32")
    add_ratios_option(parser)
    options = parser.parse_args()
    if options.quick:
        options.model, options.batch = "resnet8", 32
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = options.device
    model = build_model(options.model, num_classes=100, norm="zca").to(device)
    kinds = ((None, "exp"), ("nog+ow+olr", "exp"), ("ow", "soc"))
    steps = [training_step(copy.deepcopy(model), names, options.batch, device, map) for names, map in kinds]
    untreated, treated, convolved = minimum(steps, options.rounds, device)
    print(f"{options.model}, batch {options.batch}, {device}, {options.threads} threads", flush=True)
    print(
        f"whole steps in turn: untreated {untreated:.3f} s, nog+ow+olr {treated:.3f} s, {treated / untreated - 1:+.2%}"
    )
    print(f"ow with map='soc', which convolves the activations several times: {convolved / untreated - 1:+.2%}")
    layer = model.get_submodule("conv1")
    works = [weight_step(copy.deepcopy(layer), names) for names in (None, *TREATMENTS)]
    plain, *others = minimum(works, 200, device)
    print(f"the weight alone, untreated: {1e3 * plain:.3f} ms")
    ratios = {
        "a whole step, of the untreated": treated / untreated,
        "a whole step of ow with map='soc', of the untreated": convolved / untreated,
    }
    for names, seconds in zip(TREATMENTS, others, strict=True):
        ratios[f"the weight alone, {names}, of the untreated"] = seconds / plain
        print(f"{names:<12} {1e3 * (seconds - plain):+.3f} ms, {(seconds - plain) / untreated:.3%} of a step")
    write_ratios(options.ratios, ratios)


if __name__ == "__main__":
    main()
