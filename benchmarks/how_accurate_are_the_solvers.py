"""How far off is each solver, forward and backward, at which condition number?

Matrices with eigenvalues from 1 down to 1/κ, evenly on a logarithmic axis, in random bases. The truth belongs to the
matrix as rounded: in double precision for float32 and complex64 (κ eps64 is 1e-9 at worst), at 50 digits by mpmath for
float64 and complex128, at a smaller size. The error is ‖got − truth‖/‖truth‖ in the Frobenius norm; the worst of the
draws is printed. Beside it stands what the library promises for the exact solvers: 10 eps √κ for square roots, 10 eps κ
for inverse ones, √κ times more for their gradients. ``--polar`` prints the polar factor too.

    python benchmarks/how_accurate_are_the_solvers.py --quick
    python benchmarks/how_accurate_are_the_solvers.py --polar --json accuracy.json
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import mpmath
import torch
from torch import Tensor

import wellcond.linalg as wl

DTYPES = {str(t)[6:]: t for t in (torch.float32, torch.complex64, torch.float64, torch.complex128)}
KAPPAS = {torch.float32: (1e1, 1e2, 1e4, 1e6, 1e7), torch.float64: (1e2, 1e4, 1e8, 1e12, 1e15)}


class Row(NamedTuple):
    """One line of the table: relative errors, infinite where it was refused, None where there is no gradient."""

    function: str
    solver: str
    dtype: str
    d: int
    kappa: float
    forward: float
    gradient: float | None
    promised_forward: float
    promised_gradient: float | None


def unitary(d: int, dtype: torch.dtype) -> Tensor:
    return torch.linalg.qr(torch.randn(d, d, dtype=torch.complex128 if dtype.is_complex else torch.float64)).Q


def draw(d: int, kappa: float, dtype: torch.dtype) -> Tensor:
    """A Hermitian matrix whose smallest eigenvalue survives the rounding to ``dtype``."""
    values = torch.logspace(0, -torch.tensor(kappa).log10().item(), d, dtype=torch.float64)
    for _ in range(200):
        U = unitary(d, dtype)
        P = ((U * values) @ U.mH).to(dtype)
        P = (P + P.mH) / 2
        if mp_eigenpairs(P)[0][0] > 0.2 / kappa if d <= 8 else torch.linalg.eigvalsh(widened(P))[0] > 0.2 / kappa:
            return P
    raise RuntimeError(f"no positive definite draw at kappa {kappa:g} in {dtype}")


def widened(P: Tensor) -> Tensor:
    return P.to(torch.complex128 if P.is_complex() else torch.float64)


def mp_eigenpairs(P: Tensor) -> tuple[list[Any], Any]:
    with mpmath.workdps(50):
        values, U = mpmath.eighe(mpmath.matrix([[mpmath.mpmathify(x) for x in row] for row in P.tolist()]))
        return list(values), U


def truth(P: Tensor, G: Tensor, power: float) -> tuple[Tensor, Tensor]:
    """P^power and its derivative along G, by divided differences of the square roots s: no λi − λj is formed."""
    if P.dtype in (torch.float32, torch.complex64):
        eigvals, U = torch.linalg.eigh(widened(P))
        s = eigvals.sqrt()
        K = 1 / (s[:, None] + s[None])
        if power < 0:
            K = -K / (s[:, None] * s[None])
        return (U * eigvals.pow(power)) @ U.mH, U @ (K * (U.mH @ widened(G) @ U)) @ U.mH
    with mpmath.workdps(50):
        values, U = mp_eigenpairs(P)
        s = [mpmath.sqrt(v) for v in values]
        inside = U.H * mpmath.matrix([[mpmath.mpmathify(x) for x in row] for row in G.tolist()]) * U
        for i, a in enumerate(s):
            for j, b in enumerate(s):
                inside[i, j] *= 1 / (a + b) if power > 0 else -1 / (a * b * (a + b))
        root = U * mpmath.diag([x if power > 0 else 1 / x for x in s]) * U.H
        return tuple(  # pyright: ignore[reportReturnType]
            torch.tensor([[complex(M[i, j]) for j in range(M.cols)] for i in range(M.rows)], dtype=torch.complex128)
            for M in (root, U * inside * U.H)
        )


def error(got: Tensor, want: Tensor) -> float:
    return ((got.to(torch.complex128) - want.to(torch.complex128)).norm() / want.norm()).item()


def roots(dtype: torch.dtype, d: int, kappas: tuple[float, ...], draws: int) -> list[Row]:
    eps, rows = torch.finfo(dtype).eps, []
    for kappa in kappas:
        matrices = [draw(d, kappa, dtype) for _ in range(draws)]
        for name, f, power in (("sqrtm", wl.sqrtm, 0.5), ("invsqrtm", wl.invsqrtm, -0.5)):
            worst = {solver: [0.0, 0.0] for solver in wl.SOLVERS}
            for P in matrices:
                G = torch.randn(d, d, dtype=dtype)
                G = (G + G.mH) / 2
                want = truth(P, G, power)
                for solver, errors in worst.items():
                    errors[:] = [max(a, b) for a, b in zip(errors, measure(f, solver, P, G, want), strict=True)]
            promise = 10 * eps * kappa ** (0.5 if power > 0 else 1.0)
            rows += [
                Row(name, solver, str(dtype)[6:], d, kappa, *errors, promise, promise * kappa**0.5)
                for solver, errors in worst.items()
            ]
    return rows


def measure(f: Callable[..., Tensor], solver: str, P: Tensor, G: Tensor, want: tuple[Tensor, Tensor]) -> list[float]:
    tracked = P.clone().requires_grad_()
    try:
        out = f(tracked, solver=solver)
    except wl.NotPositiveSemidefiniteError:
        return [float("inf")] * 2
    (gradient,) = torch.autograd.grad(out, tracked, G)
    # NaN has to lose every comparison.
    return [e if e == e else float("inf") for e in (error(out.detach(), want[0]), error(gradient, want[1]))]


def polar_factors(d: int, draws: int) -> list[Row]:
    rows = []
    for dtype in (torch.float32, torch.float64):
        eps = torch.finfo(dtype).eps
        for kappa in (1e1, 1e2, 1e4):
            for solver in ("svd", "minimax", "muon"):
                worst = 0.0
                for _ in range(draws):
                    G = (draw(d, kappa, torch.float64) @ unitary(d, torch.float64)).to(dtype)
                    U, _, Vh = torch.linalg.svd(G.double())
                    worst = max(worst, error(wl.polar(G, solver=solver), U @ Vh))
                rows.append(Row("polar", solver, str(dtype)[6:], d, kappa, worst, None, 10 * eps * kappa, None))
    return rows


def print_table(rows: list[Row]) -> None:
    print(f"{'function':<10}{'dtype':<11}{'d':>4}{'kappa':>8}  {'solver':<14}{'forward':>9}{'gradient':>10}   promised")
    for row in rows:
        line = f"{row.function:<10}{row.dtype:<11}{row.d:>4}{row.kappa:>8.0e}  {row.solver:<14}{row.forward:>9.1e}"
        if row.gradient is None:
            print(f"{line}{'-':>10}   {row.promised_forward:.0e}")
        else:
            print(f"{line}{row.gradient:>10.1e}   {row.promised_forward:.0e}, {row.promised_gradient:.0e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32", "float64"])
    parser.add_argument("--size", type=int, default=64, help="of the single precision matrices")
    parser.add_argument("--mpmath-size", type=int, default=8, help="of the double precision ones")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one draw, three condition numbers")
    parser.add_argument("--polar", action="store_true")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    warnings.simplefilter("ignore", wl.ApproximateRootWarning)
    torch.manual_seed(0)
    draws = 1 if options.quick else options.draws
    rows: list[Row] = []
    for name in options.dtype:
        dtype = DTYPES[name]
        single = dtype in (torch.float32, torch.complex64)
        kappas = KAPPAS[torch.float32 if single else torch.float64]
        rows += roots(
            dtype, options.size if single else options.mpmath_size, kappas[::2] if options.quick else kappas, draws
        )
    if options.polar:
        rows += polar_factors(options.size, draws)
    print_table(rows)
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"torch": torch.__version__, "rows": [row._asdict() for row in rows]}, file, indent=1)


if __name__ == "__main__":
    main()
