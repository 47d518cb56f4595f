"""From how few samples on is whitening by the factor faster than by the covariance?

``whiten(X, eps=1e-3)`` forward and backward both ways, taking turns; the least times count, and their ratio is printed.
``via="auto"`` takes the factor up to half as many samples as channels.

    python benchmarks/when_does_the_factor_pay.py --rounds 20
"""

from __future__ import annotations

import argparse
import time

import torch

import wellcond.linalg as wl

SHAPES = [(d, max(d * share // 8, 1)) for d in (64, 256) for share in (1, 2, 4, 6, 8, 32)]


def seconds(X: torch.Tensor, G: torch.Tensor, via: str) -> float:
    X = X.detach().requires_grad_()
    start = time.perf_counter()
    wl.whiten(X, eps=1e-3, via=via).backward(G)  # pyright: ignore[reportArgumentType]
    if X.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="three rounds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    for d, n in SHAPES:
        X = torch.randn(options.batch, d, n, device=options.device)
        G = torch.randn_like(X)
        least = {"factor": float("inf"), "covariance": float("inf")}
        for _ in range(3 if options.quick else options.rounds):
            for via in least:
                least[via] = min(least[via], seconds(X, G, via))
        ratio = least["covariance"] / least["factor"]
        print(
            f"{options.batch} x {d} x {n}: covariance {1e3 * least['covariance']:.2f} ms, "
            f"factor {1e3 * least['factor']:.2f} ms, {ratio:.2f} times as fast",
            flush=True,
        )


if __name__ == "__main__":
    main()
