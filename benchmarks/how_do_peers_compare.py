"""How do the packages compare that one can install for the same functions?

Speed as a multiple of autograd through eigh, and errors against double precision, on what each of them offers: roots
(spd-learn, pyriemann, ``torch.linalg.matrix_sqrth`` of newer PyTorch), the polar factor (``torch.linalg.polar``, the
iteration of ``torch.optim.Muon``), whitening (kornia); and orthogonal weights (geotorch, PyTorch's parametrisation).
Those that are not installed are named and left out. The full comparison wants

    pip install kornia spd-learn pyriemann geotorch
    python benchmarks/how_do_peers_compare.py
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable

import torch
from torch import nn

from wellcond.bench import report
from wellcond.bench.cases import Case
from wellcond.bench.contestants import AUTO, PEERS, REFERENCE, missing_peers
from wellcond.bench.gauges import take_turns
from wellcond.bench.measure import measure_case
from wellcond.bench.ratios import add_ratios_option, write_ratios
from wellcond.experiments.results.table import Table
from wellcond.experiments.show.render import for_markdown
from wellcond.orthogonality import orthogonal_weight

CASES = (
    Case("sqrt", (128, 64, 64)),
    Case("invsqrt", (128, 64, 64)),
    Case("polar", (16, 128, 128)),
    Case("whitening_layer", (32, 64, 14, 14)),
)
QUICK_CASES = (
    Case("sqrt", (16, 32, 32)),
    Case("invsqrt", (16, 32, 32)),
    Case("polar", (8, 32, 32)),
    Case("whitening_layer", (8, 32, 7, 7)),
)


def orthogonal_weights(size: int, device: torch.device, seconds: float) -> tuple[Table, float]:
    """A linear layer whose weight is kept orthogonal: time of the weight and its gradient, and how orthogonal it is;
    and our time over that of torch's parametrisation."""
    makers: dict[str, Callable[[nn.Linear], object]] = {
        AUTO: lambda layer: orthogonal_weight(layer),
        "torch parametrizations": lambda layer: nn.utils.parametrizations.orthogonal(layer),
    }
    try:
        geotorch = importlib.import_module("geotorch")
    except ImportError:
        print("geotorch: not installed\n")
    else:
        makers["geotorch"] = lambda layer: geotorch.orthogonal(layer, "weight")
    calls, gaps = {}, {}
    for name, make in makers.items():
        layer = nn.Linear(size, size, bias=False).to(device)
        make(layer)

        def call(layer: nn.Linear = layer) -> None:
            layer.weight.sum().backward()

        with torch.no_grad():
            W = layer.weight.double()
            gaps[name] = torch.linalg.matrix_norm(W @ W.mT - torch.eye(size, device=device)).item()
        call()
        calls[name] = call
    times = take_turns(calls, device, seconds=seconds)
    body = [[name, f"{times[AUTO].minimum / times[name].minimum:.2g}", f"{gaps[name]:.1e}"] for name in calls]
    ratio = times[AUTO].minimum / times["torch parametrizations"].minimum
    return Table([f"{size}×{size}", f"times as fast as {AUTO}", "‖WWᵀ − I‖"], body), ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller shapes and fewer timings")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_ratios_option(parser)
    options = parser.parse_args()
    device = torch.device(options.device)
    seconds = 0.5 if options.quick else 8.0
    names = (REFERENCE, AUTO, *PEERS)
    print(f"{device}, float32, {torch.get_num_threads()} threads\n")
    results = []
    for case in QUICK_CASES if options.quick else CASES:
        results.append(measure_case(case, torch.float32, device, seconds=seconds, names=names))
        print(f"{case.task} {case.size}\n")
        print(for_markdown(report.detail_table(results[-1])), "\n")
    for line in report.remarks(results, missing_peers(), {}):
        print(f"{line}\n")
    weights, ratio = orthogonal_weights(16 if options.quick else 128, device, seconds)
    print(for_markdown(weights))
    speeds = {f"{r.case.task} {r.case.size}": r.faster(r[AUTO]) for r in results}
    ratios = {f"{where}, of eigh": 1 / speed for where, speed in speeds.items() if speed}
    write_ratios(options.ratios, ratios | {"orthogonal weight, of torch's": ratio})


if __name__ == "__main__":
    main()
