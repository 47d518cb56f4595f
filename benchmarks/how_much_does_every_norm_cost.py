"""What does a training step cost if every batch norm of a ResNet-18 is decorrelated?

The networks of ``wellcond train``: ResNet-18 for images of 32 × 32, with its batch norms as they are, and with all of
them replaced (``replace_batchnorm(which=all)``) in groups of 16 and of 64 channels. Whole steps of SGD with momentum
take turns in random order, and of each the minimum counts, over that of the plain network. Wanted are at most 1.15 and
1.25 times a step of batch norm.

The bound is what this machine's BLAS and LAPACK leave: a step of batch norm and, for each norm that was replaced, one
decomposition and the five products of its groups (covariance, whitening, and three backward), of features that stay in
the cache, with nothing between them.

The norms are decomposed one after another: each needs the activations that the one before it whitened, so that no two
of one forward pass can be decomposed at once. The groups of one norm are; they are a batch of G matrices.

    python benchmarks/how_much_does_every_norm_cost.py
    python benchmarks/how_much_does_every_norm_cost.py --batch 128 --rounds 20
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from wellcond.bench.gauges import take_turns
from wellcond.bench.ratios import add_ratios_option, write_ratios
from wellcond.experiments.run.models import build_model
from wellcond.linalg import NewtonSchulz
from wellcond.linalg.lapack import eigh
from wellcond.nn import DecorrelatedBatchNorm2d, replace_batchnorm

WANTED = {"groups of 16": 1.15, "groups of 64": 1.25}
CACHED = 1 << 17  # entries
STEPS = NewtonSchulz(5, tolerance=None)  # IterNorm
NETWORKS: dict[str, dict[str, Any] | None] = {
    "batch norm": None,
    "groups of 16": {"group_size": 16},
    "groups of 64": {"group_size": 64},
    "IterNorm, groups of 16": {"group_size": 16, "solver": STEPS},
    "IterNorm, groups of 64": {"group_size": 64, "solver": STEPS},
}


def network(model: str, width: int, options: dict[str, Any] | None) -> tuple[nn.Module, int]:
    """The network, and how many of its norms were replaced."""
    torch.manual_seed(0)
    net = build_model(model, num_classes=100, norm="batch", width=width)
    return net, 0 if options is None else len(replace_batchnorm(net, "all", **options))


def training_step(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], object]:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()

    return step


def arithmetic_of(net: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    """The products and decompositions of the decorrelated norms of a step, on features in the cache; nothing else."""
    sizes: list[tuple[int, int, int]] = []

    def note(norm: DecorrelatedBatchNorm2d, args: tuple[torch.Tensor, ...]) -> None:
        channels = norm.num_features
        sizes.append((norm.groups, channels // norm.groups, args[0].numel() // channels))

    norms = [module for module in net.modules() if isinstance(module, DecorrelatedBatchNorm2d)]
    handles = [norm.register_forward_pre_hook(note) for norm in norms]
    net(x)
    for handle in handles:
        handle.remove()
    pieces = {
        size: torch.randn(*size[:2], min(size[2], CACHED // (size[0] * size[1])), device=x.device) for size in sizes
    }
    outputs = {size: torch.empty_like(X) for size, X in pieces.items()}
    covariances = {size: X @ X.mT / X.shape[-1] for size, X in pieces.items()}

    def run() -> None:
        for size in sizes:
            X, out, P = pieces[size], outputs[size], covariances[size]
            eigh(P)
            for _ in range(size[2] // X.shape[-1]):
                for _ in range(2):
                    torch.bmm(X, X.mT)
                for _ in range(3):
                    torch.bmm(P, X, out=out)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--width", type=int, default=64, help="channels of the first stage")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=32, help="of the images")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="two rounds of a ResNet-8")
    add_ratios_option(parser)
    options = parser.parse_args()
    if options.quick:
        options.model, options.rounds = "resnet8", 2
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    x = torch.randn(options.batch, 3, options.size, options.size, device=device)
    y = torch.randint(0, 100, (options.batch,), device=device)
    counts, steps = {}, {}
    for name, replacing in NETWORKS.items():
        net, counts[name] = network(options.model, options.width, replacing)
        steps[name] = training_step(net.to(device).train(), x, y)
        if name in WANTED:
            steps[f"arithmetic, {name}"] = arithmetic_of(net, x)
    for step in 2 * [*steps.values()]:
        step()
    times = take_turns(steps, device, seconds=0.0, rounds=(options.rounds, options.rounds))
    print(f"{options.model}, batch {options.batch}, {device}, {options.threads} threads\n")
    print("| every norm | replaced | ms a step | of batch norm | bound | wanted |\n|---|---:|---:|---:|---:|---|")
    ratios: dict[str, float] = {}
    plain = times["batch norm"].minimum
    for name in NETWORKS:
        time, alone = times[name], times.get(f"arithmetic, {name}")
        ratio = time.minimum / plain
        bound = "" if alone is None else f"{1 + alone.minimum / plain:.2f}"
        wanted = WANTED.get(name)
        verdict = "" if wanted is None else f"≤ {wanted}: {'met' if ratio <= wanted else 'missed'}"
        print(f"| {name} | {counts[name]} | {1e3 * time.minimum:.1f} | {ratio:.2f} | {bound} | {verdict} |")
        if counts[name]:
            ratios[f"{name}, of batch norm"] = ratio
    write_ratios(options.ratios, ratios)


if __name__ == "__main__":
    main()
