"""Is decorrelated batch norm slow on small inputs, where Python and small operations cost more than the arithmetic?

Forward and backward on the CPU in one thread, in training, with ∂l/∂y given. The contestants take turns in random
order, and of each the minimum counts:

- ours, and IterNorm of 5 steps;
- plain autograd: the layer as one writes it down, with the same duties (γ, β and running statistics), differentiated
  through ``torch.linalg.eigh``;
- ``torch.nn.BatchNorm2d``.

Wanted is a ratio of at most 1 to plain autograd at every shape.

    python benchmarks/are_small_inputs_slow.py
    python benchmarks/are_small_inputs_slow.py --profile 8 16 8 8     # where the time of ours goes
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
from functools import partial

import torch
from torch import Tensor, nn

from wellcond.bench.gauges import take_turns
from wellcond.bench.ratios import add_ratios_option, write_ratios
from wellcond.nn import DecorrelatedBatchNorm2d, IterNorm2d

SHAPES = [(8, 16, 8, 8), (16, 64, 7, 7), (64, 32, 8, 8), (32, 256, 7, 7)]


class Plain(nn.Module):
    """ZCA of the channels with running statistics and affine parameters, in the fewest lines."""

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_cov", torch.eye(channels))

    def forward(self, x: Tensor) -> Tensor:
        N, C, H, W = x.shape
        X = x.transpose(0, 1).reshape(C, -1)
        mean = X.mean(1, keepdim=True)
        X = X - mean
        P = X @ X.mT / X.shape[1]
        with torch.no_grad():
            self.running_mean.lerp_(mean.flatten(), self.momentum)
            self.running_cov.lerp_(P * (X.shape[1] / (X.shape[1] - 1)), self.momentum)
        eigvals, U = torch.linalg.eigh(P + self.eps * torch.eye(C))
        Y = self.weight[:, None] * ((U * eigvals.rsqrt()) @ U.mT @ X) + self.bias[:, None]
        return Y.view(C, N, H, W).transpose(0, 1)


def step(layer: nn.Module, x: Tensor, grad: Tensor) -> None:
    torch.autograd.grad(layer(x), (x, *layer.parameters()), grad)


def compare(shape: tuple[int, ...], options: argparse.Namespace) -> dict[str, float]:
    x, grad = torch.randn(shape).requires_grad_(), torch.randn(shape)
    layers = {
        "ours": DecorrelatedBatchNorm2d(shape[1]),
        "IterNorm": IterNorm2d(shape[1]),
        "plain": Plain(shape[1]),
        "batch norm": nn.BatchNorm2d(shape[1]),
    }
    calls = {name: partial(step, layer, x, grad) for name, layer in layers.items()}
    for call in 10 * [*calls.values()]:
        call()
    times = take_turns(calls, torch.device("cpu"), seconds=options.seconds, rounds=(5, 400))
    ms = [1e3 * times[name].minimum for name in calls]
    numbers = [f"{ms[0]:.3f}", f"{ms[0] / ms[2]:.2f}", f"{ms[0] / ms[3]:.1f}", f"{ms[1] / ms[2]:.2f}"]
    print(f"| {shape} | {' | '.join(numbers)} |", flush=True)
    return {f"{shape} of plain": ms[0] / ms[2], f"{shape} IterNorm, of plain": ms[1] / ms[2]}


def profile(shape: tuple[int, ...]) -> None:
    x, grad, layer = torch.randn(shape).requires_grad_(), torch.randn(shape), DecorrelatedBatchNorm2d(shape[1])
    for _ in range(100):
        step(layer, x, grad)
    with cProfile.Profile() as profiler:
        for _ in range(2000):
            step(layer, x, grad)
    pstats.Stats(profiler).sort_stats("tottime").print_stats(30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="for each shape")
    parser.add_argument("--quick", action="store_true", help="half a second for each shape")
    add_ratios_option(parser)
    parser.add_argument("--profile", type=int, nargs=4, metavar=("N", "C", "H", "W"))
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if options.profile:
        profile(tuple(options.profile))
        return
    print("| (N, C, H, W) | ours, ms | of plain autograd | of batch norm | IterNorm, of plain |")
    print("|---|---:|---:|---:|---:|")
    if options.quick:
        options.seconds = min(options.seconds, 0.5)
    ratios: dict[str, float] = {}
    for shape in SHAPES:
        ratios |= compare(shape, options)
    write_ratios(options.ratios, ratios)


if __name__ == "__main__":
    main()
