"""How much of a training step does the condition monitor take at its default interval?

A CIFAR ResNet-8 with decorrelated batch norm after its first convolution, SGD with momentum, batch 128, random images
of 32 × 32. Three kinds of step take turns in random order: unwatched, watched between records, and with a record; of
their minimum times u, b and r the share is ((every − 1) b + r) / (every u) − 1. On a CPU the time is that of one thread
on the processor, on a GPU the clock's; whatever else the machine does only lengthens it, hence the minimum. With 64
channels the covariance behind the 3 × 3 × 3 filters has rank 27, with 16 it is regular.

    python benchmarks/how_much_does_the_monitor_cost.py --rounds 15
"""

from __future__ import annotations

import argparse
import random
import time
from contextlib import nullcontext

import torch
from torch import nn

from wellcond.bench.ratios import add_ratios_option, write_ratios
from wellcond.experiments.run.models import build_model
from wellcond.monitor import ConditionMonitor


def seconds(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> float:
    """Time of one training step."""
    clock = time.perf_counter if x.is_cuda else time.process_time
    start = clock()
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    if x.is_cuda:
        torch.cuda.synchronize()
    return clock() - start


def measure(width: int, rounds: int, device: str) -> dict[str, float]:
    """Minimum seconds of a step of each kind."""
    torch.manual_seed(0)
    model = build_model("resnet8", num_classes=10, norm="zca", width=width).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x, y = torch.randn(128, 3, 32, 32, device=device), torch.randint(0, 10, (128,), device=device)
    times: dict[str, list[float]] = {"unwatched": [], "between": [], "record": []}
    for round_ in range(rounds + 1):
        for kind in random.sample(list(times), len(times)):
            with nullcontext() if kind == "unwatched" else ConditionMonitor(model, every=1 << 40) as monitor:
                if kind == "between":
                    model(x)  # makes the record of this monitor
                time_ = seconds(model, optimizer, x, y)
            assert monitor is None or len(monitor.records) == 1
            if round_:  # the first one warms up
                times[kind].append(time_)
    return {kind: min(values) for kind, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--width", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="two rounds of the narrower network")
    add_ratios_option(parser)
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.width = 2, options.width[:1]
    torch.set_num_threads(1)
    ratios: dict[str, float] = {}
    for width in options.width:
        times = measure(width, options.rounds, options.device)
        share = ((options.every - 1) * times["between"] + times["record"]) / (options.every * times["unwatched"]) - 1
        ratios[f"{width} channels, of a step unwatched"] = 1 + share
        steps = ", ".join(f"{kind} {1e3 * time_:.1f} ms" for kind, time_ in times.items())
        print(
            f"{width} channels, {options.device}: {steps}; every {options.every} steps: {share:+.2%} of a step",
            flush=True,
        )
    write_ratios(options.ratios, ratios)


if __name__ == "__main__":
    main()
