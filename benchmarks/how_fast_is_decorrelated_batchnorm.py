"""How fast is decorrelated batch norm, and how much memory does it take?

Everything is a ratio, measured in one run: the contestants take turns in random order, and of each the minimum
counts, because whatever else the machine does only lengthens it. For training (forward and backward with ∂l/∂y given):

- to ``torch.nn.BatchNorm2d``;
- to a plain implementation that centres, takes ``torch.linalg.svd`` of the covariance and leaves the rest to autograd;
- to the floor: five products of d × d by d × M written to memory that is there already, and a batch norm for its
  passes over memory.

For evaluation, to a 1 × 1 convolution with bias. Memory is the peak of a forward and backward pass above what was
there before (input, ∂l/∂y and parameters), in units of the input: the output and the gradient make 2.

    python benchmarks/how_fast_is_decorrelated_batchnorm.py
    python benchmarks/how_fast_is_decorrelated_batchnorm.py --quick --groups 4 --channels-last
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from wellcond.bench.gauges import Call, peak_bytes, take_turns
from wellcond.bench.ratios import add_ratios_option, write_ratios
from wellcond.nn import DecorrelatedBatchNorm2d

SHAPES = [(128, 64, 32, 32), (256, 256, 14, 14)]


class BySvd(nn.Module):
    """Decorrelated batch norm as one writes it down: autograd goes through every step, the decomposition included."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        N, C, H, W = x.shape
        X = x.float().transpose(0, 1).reshape(self.groups, C // self.groups, -1)
        X = X - X.mean(-1, keepdim=True)
        P = X @ X.mT / X.shape[-1] + 1e-5 * torch.eye(X.shape[1], device=x.device)
        U, s, _ = torch.linalg.svd(P)
        Y = (U * s.rsqrt().unsqueeze(-2)) @ U.mT @ X
        y = Y.reshape(C, N, H, W).transpose(0, 1)
        return (y * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)).to(x.dtype)


def training(layer: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], None]:
    inputs = (x, *layer.parameters())

    def run() -> None:
        torch.autograd.grad(layer(x), inputs, grad)

    return run


def five_products(x: Tensor, groups: int) -> Callable[[], None]:
    """x xᵀ, S x, g xᵀ, S g and D x in float32, without any new memory."""
    N, C, H, W = x.shape
    X = x.detach().float().reshape(N * groups, C // groups, H * W)
    out, square = torch.empty_like(X), X.new_empty(X.shape[0], X.shape[1], X.shape[1])
    S = torch.eye(X.shape[1], device=x.device).expand_as(square)

    def run() -> None:
        for _ in range(2):
            torch.bmm(X, X.mT, out=square)
        for _ in range(3):
            torch.bmm(S, X, out=out)

    return run


def minimum(calls: dict[str, Call], rounds: int, device: torch.device) -> dict[str, float]:
    """Seconds of each, all of them called twice before to warm up."""
    for call in 2 * [*calls.values()]:
        call()
    return {
        name: time.minimum for name, time in take_turns(calls, device, seconds=0.0, rounds=(rounds, rounds)).items()
    }


def compare(shape: tuple[int, ...], dtype: torch.dtype, options: argparse.Namespace) -> dict[str, float]:
    device, C = torch.device(options.device), shape[1]
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    x, grad = (torch.randn(shape, device=device).to(dtype).contiguous(memory_format=layout) for _ in range(2))
    x = (x + options.mean).requires_grad_()
    ours = DecorrelatedBatchNorm2d(C, groups=options.groups).to(device)
    batchnorm, by_svd = nn.BatchNorm2d(C).to(device), BySvd(C, options.groups).to(device)
    contestants = {
        "ours": training(ours, x, grad),
        "batch norm": training(batchnorm, x, grad),
        "five products": five_products(x, options.groups),
    }
    seconds = minimum(contestants, options.rounds, device)
    slow = {"svd": training(by_svd, x, grad), "ours": contestants["ours"]}
    plain = minimum(slow, max(2, options.rounds // 5), device)

    conv = nn.Conv2d(C, C, 1, groups=options.groups).to(device, dtype)
    evaluated = copy.deepcopy(ours).eval()
    with torch.no_grad():
        inference = {"ours": lambda: evaluated(x), "convolution": lambda: conv(x)}
        still = minimum(inference, options.rounds, device)
    measured = (contestants["ours"], contestants["batch norm"], slow["svd"])
    peaks = [peak_bytes(call, device) / x.nbytes for call in measured]
    floor = seconds["five products"] + seconds["batch norm"]
    print(
        f"{shape} {str(dtype).removeprefix('torch.')}, {options.groups} groups: training {1e3 * seconds['ours']:.1f} ms"
        f" = {seconds['ours'] / seconds['batch norm']:.2f} x batch norm, {seconds['ours'] / floor:.2f} x products and"
        f" batch norm, 1/{plain['svd'] / plain['ours']:.1f} of autograd through the SVD;"
        f" evaluation {1e3 * still['ours']:.1f} ms = {still['ours'] / still['convolution']:.2f} x a 1x1 convolution;"
        f" peak memory {peaks[0]:.2f} x the input (batch norm {peaks[1]:.2f}, SVD {peaks[2]:.2f})",
        flush=True,
    )
    where = f"{shape} {str(dtype).removeprefix('torch.')}"
    return {
        f"{where}, of batch norm": seconds["ours"] / seconds["batch norm"],
        f"{where}, of autograd through the SVD": plain["ours"] / plain["svd"],
        f"{where}, evaluation, of a convolution": still["ours"] / still["convolution"],
        f"{where}, peak memory, of the input": peaks[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--quick", action="store_true", help="a quarter of the batch, 5 rounds")
    parser.add_argument("--groups", type=int, default=1)
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--mean", type=float, default=0.0, help="of the activations, in deviations")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_ratios_option(parser)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.quick:
        options.rounds = 5
    torch.manual_seed(0)
    print(torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} threads")
    ratios: dict[str, float] = {}
    for batch, *rest in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            ratios |= compare((batch // 4 if options.quick else batch, *rest), dtype, options)
    write_ratios(options.ratios, ratios)


if __name__ == "__main__":
    main()
