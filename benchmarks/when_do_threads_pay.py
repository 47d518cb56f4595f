"""From where on is a batch of eigendecompositions faster in threads?

For every size and batch the time of ``torch.linalg.eigh`` over that of the same batch cut into one chunk a thread,
whatever the thresholds of ``wellcond.linalg.lapack._batches`` say; then what they make of it. A star marks the batches
that the library does cut: each of them should be above 1, and no other far above.

    python benchmarks/when_do_threads_pay.py
"""

from __future__ import annotations

import argparse
from unittest import mock

import torch

from wellcond.bench.cases import Case, make_input
from wellcond.bench.gauges import take_turns
from wellcond.bench.ratios import add_ratios_option, write_ratios
from wellcond.experiments.results.table import Table
from wellcond.experiments.show.render import for_markdown
from wellcond.linalg.lapack import _batches

CPU = torch.device("cpu")


def gain(P: torch.Tensor, seconds: float) -> float:
    """How many times as fast the threads are."""

    def cut() -> None:
        with mock.patch.multiple(_batches, SMALLEST_CHUNK=1, WAKING=0, LARGE_MATRIX=10_000, LARGEST_MATRIX=P.shape[-1]):
            _batches.in_threads(torch.linalg.eigh, P)

    times = take_turns({"whole": lambda: torch.linalg.eigh(P), "cut": cut}, CPU, seconds=seconds, rounds=(5, 100))
    return times["whole"].minimum / times["cut"].minimum


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer sizes and timings")
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    add_ratios_option(parser)
    options = parser.parse_args()
    ratios: dict[str, float] = {}
    sizes = (16, 64, 256) if options.quick else (8, 16, 32, 64, 128, 256, 384, 512)
    batches = (2, 16, 128) if options.quick else (2, 4, 8, 16, 64, 256)
    cells: list[list[str]] = []
    cut: list[float] = []
    for d in sizes:
        row = [str(d)]
        for batch in batches:
            if batch * d**3 > 2**30:  # seconds a call, and long clear
                row.append("—")
                continue
            P = make_input(Case("sqrt", (batch, d, d)), getattr(torch, options.dtype), CPU)
            faster = gain(P, 0.2 if options.quick else 1.0)
            starred = _batches.chunk_count(P) > 1
            row.append(f"{faster:.2f}{'*' if starred else ''}")
            cut += [faster] if starred else []
            if starred:
                ratios[f"{batch}x{d}x{d}, in threads"] = 1 / faster
        cells.append(row)
    print(f"{options.dtype}, {torch.get_num_threads()} threads: times as fast in threads; * is cut by the library\n")
    print(for_markdown(Table(["size", *(f"batch {batch}" for batch in batches)], cells)))
    write_ratios(options.ratios, ratios)
    if cut:
        print(f"\nminimum and maximum gain where it is cut: {min(cut):.2f}, {max(cut):.2f}")


if __name__ == "__main__":
    main()
