"""How far off is each published gradient of the SVD, at which condition number and which gap?

Matrices in float32 with eigenvalues from 1 down to 1/κ, evenly on a logarithmic axis, of which every second is brought
to a relative gap below the one before it; a gap of 0 is a tie up to rounding. The truth is the exact gradient in double
precision at the same numbers, by ``eigh``. ``error`` is ‖got − truth‖/‖truth‖, ``largest`` the largest entry over that
of the truth; the worst of the draws. In the second table the root is computed in double precision: what is left is what
the remedy does, without rounding. Beside them stand our exact gradient and that of five Newton–Schulz steps as a root.

The third table is of what covariance pooling sees: the covariance of fewer samples than channels, 3 to 4 as in the
paper's Table 5 (196 positions of 256 channels), whose last eigenvalues are rounding. The gradient is that of the
features, where it is bounded though that of the covariance is not; the truth is that of the factor form.

    python benchmarks/svd_gradients.py
    python benchmarks/svd_gradients.py --root invsqrt --size 128
"""

from __future__ import annotations

import argparse
import math
import warnings

import torch
from torch import Tensor

import wellcond.linalg as wl
from wellcond.experiments.results.table import Table, number
from wellcond.experiments.show.render import for_markdown

KAPPAS, GAPS = (1e2, 1e4, 1e6), (None, 1e-2, 1e-4, 0.0)
SOLVERS = ("eigh", *(f"svd:{name}" for name in wl.Svd.variants), "newton_schulz")
ROOTS = {"sqrt": wl.sqrtm, "invsqrt": wl.invsqrtm}

NOTE = (
    "Error relative to the exact gradient in double precision, largest entry relative to its largest; inf is not "
    "finite. An eigenvalue of 1e-6 is below the rounding of the float32 matrix around it: there `eigh` leaves out its "
    "derivative."
)

FEATURES = "sqrt of covariances of {d} channels and {n} samples: error and length of the gradient of the features"


def draw(d: int, kappa: float, gap: float | None) -> Tensor:
    """A symmetric matrix in float64; a gap of None leaves the eigenvalues as they are."""
    values = torch.logspace(0, -math.log10(kappa), d, dtype=torch.float64)
    if gap is not None:
        values[1::2] = values[: 2 * (d // 2) : 2] * (1 - gap)
    U = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)).Q
    P = (U * values) @ U.mT
    return (P + P.mT) / 2


def gradient(P: Tensor, G: Tensor, solver: str, root: str) -> Tensor | None:
    """None where the solver refuses the matrix."""
    tracked = P.clone().requires_grad_()
    try:
        return torch.autograd.grad(ROOTS[root](tracked, solver=solver), tracked, G)[0]
    except wl.NotPositiveSemidefiniteError:
        return None


def worst(solver: str, root: str, matrices: list[Tensor], dtype: torch.dtype) -> str:
    """Error and largest entry, as in the table."""
    errors, sizes = [], []
    for P in matrices:
        P = P.float()
        G = torch.randn(P.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()
        want = gradient(P.double(), G.double(), "eigh", root)
        got = gradient(P.to(dtype), G.to(dtype), solver, root)
        if want is None or got is None:
            return "refused"
        got = got.double()
        errors.append(((got - want).norm() / want.norm()).nan_to_num(math.inf).item())
        sizes.append((got.abs().max() / want.abs().max()).nan_to_num(math.inf).item())
    return f"{number(max(errors))} / {number(max(sizes))}"


def of_features(solver: str | None, X: Tensor, G: Tensor) -> Tensor:
    """The gradient of X of the square root of its covariance; by its factor for None."""
    x = X.clone().requires_grad_()
    root = wl.covariance_sqrtm(x) if solver is None else wl.sqrtm(wl.covariance(x), solver=solver)
    return torch.autograd.grad(root, x, G)[0].double()


def few_samples(d: int, draws: int) -> Table:
    """Error and length of that gradient for images of d channels and 3/4 d positions, rectified as behind a ReLU."""
    n, rank = 3 * d // 4, max(2, d // 8)
    images = torch.relu(torch.randn(8 * draws, d, rank) @ torch.randn(8 * draws, rank, n)) + torch.rand(8 * draws, d, n)
    G = torch.randn(8 * draws, d, d)
    G = G + G.mT
    want = of_features(None, images.double(), G.double())
    rows = []
    for solver in (None, *SOLVERS):
        cells = [solver or "factor form"]
        for dtype in (torch.float32, torch.float64):
            got = of_features(solver, images.to(dtype), G.to(dtype))
            cells += [
                number(((got - want).norm() / want.norm()).nan_to_num(math.inf).item()),
                number((got.norm() / want.norm()).nan_to_num(math.inf).item()),
            ]
        rows.append(cells)
    return Table(["gradient", "error, float32", "length", "error, float64", "length"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", choices=ROOTS, default="sqrt")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one draw of a small size")
    options = parser.parse_args()
    d, draws = (16, 1) if options.quick else (options.size, options.draws)
    warnings.simplefilter("ignore", wl.ApproximateRootWarning)
    torch.manual_seed(0)
    cases = {(kappa, gap): [draw(d, kappa, gap) for _ in range(draws)] for kappa in KAPPAS for gap in GAPS}
    heads = [f"κ {kappa:.0e}, gap {'as is' if gap is None else f'{gap:g}'}" for kappa, gap in cases]
    tables = []
    for dtype in (torch.float32, torch.float64):
        rows = [[solver, *(worst(solver, options.root, m, dtype) for m in cases.values())] for solver in SOLVERS]
        tables.append(f"{options.root}, {d} × {d}, in {str(dtype)[6:]}: error of the gradient / its largest entry")
        tables.append(for_markdown(Table(["gradient", *heads], rows)))
    print("\n\n".join([*tables, NOTE]))
    print(f"\n{FEATURES.format(d=d, n=3 * d // 4)}\n\n{for_markdown(few_samples(d, draws))}")


if __name__ == "__main__":
    main()
