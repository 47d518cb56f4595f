"""Where does the matmul-only solver become faster than the eigendecomposition, and does ``auto`` know?

First the time of ``minimax_or_eigh`` over that of ``eigh``, forward and backward of ``sqrtm`` at κ = 1e4 in float32, by
size and batch: where it is below 1, the rule in ``wellcond/linalg/solvers/_auto.py`` has something to gain. Then, on
the shapes of ``wellcond bench``, how far ``auto`` is from the best of the solvers whose value and gradient are right
there; 1.2 is what it should keep.

    python benchmarks/where_does_auto_cross_over.py
"""

from __future__ import annotations

import argparse

import torch

from wellcond.bench.cases import MATRIX_SHAPES, Case, make_input
from wellcond.bench.gauges import Time, take_turns
from wellcond.bench.ratios import add_ratios_option, write_ratios
from wellcond.experiments.results.table import Table
from wellcond.experiments.show.render import for_markdown
from wellcond.linalg import auto_solver, sqrtm

# Those whose value and gradient are right on these matrices: κ = 1e4 and simple eigenvalues.
RIGHT = ("eigh", "minimax_or_eigh", "minimax", "svd")


def times(shape: tuple[int, ...], device: torch.device, seconds: float) -> dict[str, Time]:
    """Forward and backward of the solvers that are right here, and of auto."""
    P = make_input(Case("sqrt", shape), torch.float32, device).requires_grad_()
    G = torch.randn_like(P)
    calls = {
        name: lambda name=name: torch.autograd.grad(sqrtm(P, solver=name), P, G)  # pyright: ignore[reportArgumentType]
        for name in (*RIGHT, "auto")
    }
    for call in calls.values():
        call()
    return take_turns(calls, device, seconds=seconds, rounds=(5, 60))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer sizes and timings")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_ratios_option(parser)
    options = parser.parse_args()
    device = torch.device(options.device)
    seconds = 0.2 if options.quick else 1.5
    sizes = (16, 64, 256) if options.quick else (16, 32, 64, 128, 256, 512)
    batches = (1, 16) if options.quick else (1, 8, 64, 256)
    most = 2**27 if device.type == "cpu" else 2**34
    ratios: dict[int, dict[int, float]] = {}
    for d in sizes:
        for batch in batches:
            if batch == 1 or batch * d**3 <= most:
                t = times((batch, d, d), device, seconds)
                ratios.setdefault(d, {})[batch] = t["minimax_or_eigh"].minimum / t["eigh"].minimum
    print(f"{device}, float32, {torch.get_num_threads()} threads: time of minimax_or_eigh over that of eigh\n")
    heading = ["size", *(f"batch {batch}" for batch in batches)]
    cells = [[str(d), *(f"{row[b]:.2g}" if b in row else "—" for b in batches)] for d, row in ratios.items()]
    print(for_markdown(Table(heading, cells)))
    print()
    shapes = MATRIX_SHAPES[:3] if options.quick else MATRIX_SHAPES
    cells = []
    worst = 0.0
    best: dict[str, float] = {}
    for shape in shapes:
        t = times(shape, device, seconds)
        taken = auto_solver(torch.empty(shape, device=device)).name
        # Auto and the solver it takes are the same code: what differs between the two is the noise of the machine.
        lost = min(t["auto"].minimum, t[taken].minimum) / min(time.minimum for time in t.values())
        worst = max(worst, lost)
        best[f"{'×'.join(map(str, shape))}, auto of the best"] = lost
        cells.append(["×".join(map(str, shape)), taken, f"{lost:.2f}"])
    print(for_markdown(Table(["shape", "auto takes", "auto / best"], cells)))
    write_ratios(options.ratios, best)
    print(f"\nauto is within {worst:.2f} of the best (to keep: 1.2)")


if __name__ == "__main__":
    main()
