"""How much faster is the covariance head than iSQRT-COV with five steps?

The reference is iSQRT-COV as published (Li et al., CVPR 2018), differentiated by autograd: the covariance through the
centring matrix, divided by its trace, five coupled Newton–Schulz steps, compensated by the root of the trace, upper
triangle by a boolean mask's indices. Forward and backward of both take turns on the same input, and the ratio is that
of their minimum times. The gradients are compared with those of the exact root in float64, so that speed is not read
without accuracy.

    python benchmarks/how_fast_is_covariance_pooling.py --rounds 15
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from wellcond.bench.gauges import take_turns
from wellcond.bench.ratios import add_ratios_option, write_ratios
from wellcond.nn import GlobalCovariancePool2d


def isqrt_cov(x: Tensor, steps: int = 5) -> Tensor:
    """(N, C, H, W) to (N, C(C + 1)/2): the published head, step by step."""
    N, d, n = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    X = x.flatten(2)
    J = torch.eye(n, dtype=x.dtype, device=x.device) / n - 1.0 / n**2
    P = X @ J @ X.mT
    trace = P.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    eye = torch.eye(d, dtype=x.dtype, device=x.device).expand(N, d, d)
    A = P / trace
    M = (3 * eye - A) / 2
    Y, Z = A @ M, M
    for _ in range(1, steps - 1):
        M = (3 * eye - Z @ Y) / 2
        Y, Z = Y @ M, M @ Z
    Y = Y @ (3 * eye - Z @ Y) / 2
    upper = torch.ones(d, d, device=x.device).triu().flatten().nonzero().squeeze(1)
    return (Y * trace.sqrt()).flatten(1)[:, upper]


def gradient(head: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor) -> Tensor:
    """Forward and backward."""
    return torch.autograd.grad(head(x), x, direction.to(x.dtype))[0]


def gradient_error(head: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Relative to the exact root in float64, on the first two images."""
    x = x[:2].detach().requires_grad_()
    wide = x.detach().double().requires_grad_()
    exact = GlobalCovariancePool2d(x.shape[1]).to(x.device)
    direction = torch.randn(2, exact.out_features, device=x.device)
    truth = gradient(exact, wide, direction)
    return ((gradient(head, x, direction).double() - truth).norm() / truth.norm()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="three rounds of the first shape")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_ratios_option(parser)
    options = parser.parse_args()
    ratios: dict[str, float] = {}
    rounds = 3 if options.quick else options.rounds
    shapes = [(32, 256, 7, 7), (32, 64, 7, 7), (16, 256, 14, 14), (16, 128, 28, 28)]
    torch.manual_seed(0)
    for shape in shapes[: 1 if options.quick else None]:
        x = torch.randn(shape, device=options.device, requires_grad=True)
        heads = {"ours": GlobalCovariancePool2d(shape[1]).to(options.device), "iSQRT-COV": isqrt_cov}
        direction = torch.randn(shape[0], shape[1] * (shape[1] + 1) // 2, device=options.device)
        calls = {name: partial(gradient, head, x, direction) for name, head in heads.items()}
        times = take_turns(calls, x.device, seconds=0.0, rounds=(rounds, rounds))
        least = {name: time.minimum for name, time in times.items()}
        ratios[f"{shape}, of iSQRT-COV"] = least["ours"] / least["iSQRT-COV"]
        errors = {name: gradient_error(head, x) for name, head in heads.items()}
        columns = ", ".join(f"{name} {1e3 * least[name]:.1f} ms (gradient off by {errors[name]:.0e})" for name in heads)
        print(f"{shape}: {columns}; ratio {least['iSQRT-COV'] / least['ours']:.1f}", flush=True)
    write_ratios(options.ratios, ratios)


if __name__ == "__main__":
    main()
