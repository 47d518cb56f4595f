"""Is wellcond faster than autograd through eigh, by how much, and how far is it from the decomposition alone?

Forward and backward of the default solver on every shape of ``wellcond bench``, the contestants in turn, minimum times:

- never slower than autograd through ``torch.linalg.eigh``;
- at least 1.7 times as fast on batches of matrices;
- at least 8 times as fast as iSQRT-COV of five steps on 32 maps of (256, 7, 7);
- at most 15 % above one ``eigh`` and five products of the matrices.

    python benchmarks/are_we_faster_than_autograd.py
"""

from __future__ import annotations

import argparse

import torch

from wellcond.bench import report
from wellcond.bench.cases import FEATURE_SHAPES, MATRIX_SHAPES, QUICK_SHAPES, cases
from wellcond.bench.contestants import AUTO, ISQRT, REFERENCE
from wellcond.bench.measure import measure_case
from wellcond.bench.ratios import add_ratios_option, write_ratios
from wellcond.experiments.results.table import Table
from wellcond.experiments.show.render import for_markdown

TASKS = ("sqrt", "invsqrt", "covariance_sqrt", "pooling_layer", "whitening_layer")
ON_MATRICES = ("sqrt", "invsqrt")
POOLING_SHAPE = (32, 256, 7, 7)


def verdict(what: str, values: dict[str, float], bound: float, *, at_least: bool) -> str:
    """One line: the worst case against the bound."""
    if not values:
        return f"- {what}: not measured on these shapes"
    where = (min if at_least else max)(values, key=lambda size: values[size])
    met = values[where] >= bound if at_least else values[where] <= bound
    return f"- {what}: {values[where]:.2f} at worst ({where}), wanted {bound}: {'met' if met else 'missed'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer shapes and timings")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_ratios_option(parser)
    options = parser.parse_args()
    shapes = QUICK_SHAPES if options.quick else (*MATRIX_SHAPES, *FEATURE_SHAPES)
    names = (REFERENCE, AUTO, ISQRT)
    seconds = 1.0 if options.quick else 5.0
    device = torch.device(options.device)
    results = [measure_case(case, torch.float32, device, seconds=seconds, names=names) for case in cases(TASKS, shapes)]
    print(f"{device}, float32, {torch.get_num_threads()} threads\n")
    heads = ["task", "shape", "vs eigh", f"vs {ISQRT}", "over eigh and 5 products"]
    rows = []
    eigh, isqrt, over = {}, {}, {}
    for result in results:
        where = f"{result.case.task} {result.case.size}"
        ours, theirs = result[AUTO].both, result[ISQRT].both
        assert ours is not None and theirs is not None
        eigh[where], isqrt[where] = result.faster(result[AUTO]) or 0.0, theirs.minimum / ours.minimum
        if result.case.task in ON_MATRICES and result.overhead is not None:
            over[where] = result.overhead
        overhead = f"{over[where]:+.0%}" if where in over else "—"
        rows.append([*where.split(), report.ratio(eigh[where]), report.ratio(isqrt[where]), overhead])
    print(for_markdown(Table(heads, rows)), "\n")
    ratios = {f"{where}, of eigh": 1 / speed for where, speed in eigh.items() if speed}
    write_ratios(options.ratios, ratios | {f"{where}, of the limit": 1 + value for where, value in over.items()})
    batches = {f"{r.case.task} {r.case.size}" for r in results if r.case.task in ON_MATRICES and r.case.shape[0] > 1}
    pooling = {f"{task} {'×'.join(map(str, POOLING_SHAPE))}" for task in ("covariance_sqrt", "pooling_layer")}
    print(verdict("times as fast as autograd through eigh", eigh, 1.0, at_least=True))
    print(verdict("the same on batches", {w: v for w, v in eigh.items() if w in batches}, 1.7, at_least=True))
    print(verdict(f"times as fast as {ISQRT}", {w: v for w, v in isqrt.items() if w in pooling}, 8.0, at_least=True))
    print(verdict("time over eigh and five products, less 1", over, 0.15, at_least=False))


if __name__ == "__main__":
    main()
