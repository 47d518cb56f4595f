"""From how few samples on is whitening by the factor faster than by the covariance?

``whiten(X, eps=1e-3)`` forward and backward both ways, taking turns; the ratio of the minimum times is printed.
``via="auto"`` takes the factor up to half as many samples as channels.

    python benchmarks/when_does_the_factor_pay.py --rounds 20
"""

from __future__ import annotations

import argparse

import torch

import wellcond.linalg as wl
from wellcond.bench.gauges import take_turns
from wellcond.bench.ratios import add_ratios_option, write_ratios

SHAPES = [(d, max(d * share // 8, 1)) for d in (64, 256) for share in (1, 2, 4, 6, 8, 32)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="three rounds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_ratios_option(parser)
    options = parser.parse_args()
    ratios: dict[str, float] = {}
    for d, n in SHAPES:
        X = torch.randn(options.batch, d, n, device=options.device, requires_grad=True)
        G = torch.randn_like(X)
        calls = {
            via: lambda X=X, G=G, via=via: torch.autograd.grad(wl.whiten(X, eps=1e-3, via=via), X, G)
            for via in ("factor", "covariance")
        }
        rounds = 3 if options.quick else options.rounds
        least = {via: t.minimum for via, t in take_turns(calls, X.device, seconds=0.0, rounds=(rounds, rounds)).items()}
        ratio = least["covariance"] / least["factor"]
        ratios[f"{options.batch}x{d}x{n}, factor of covariance"] = 1 / ratio
        print(
            f"{options.batch} x {d} x {n}: covariance {1e3 * least['covariance']:.2f} ms, "
            f"factor {1e3 * least['factor']:.2f} ms, {ratio:.2f} times as fast",
            flush=True,
        )
    write_ratios(options.ratios, ratios)


if __name__ == "__main__":
    main()
