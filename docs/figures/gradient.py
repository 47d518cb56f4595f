"""How large is the gradient of a covariance's square root, and how far off is each layer's, as κ grows?

16 channels of chosen spectrum and 48 samples in float32; medians over five draws. The truth is computed with 60 digits
by mpmath, through the covariance: another way than ours. The published layers are those of ``wellcond.linalg``: the SVD
layer, five Newton–Schulz steps with their own gradient (iSQRT-COV), and the Padé approximant (MPA).

    python docs/figures/gradient.py
"""

from __future__ import annotations

import argparse
import math
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path

import mpmath
import torch
from drawing import COLOURS, IMAGES, INK, label_ends, panel, save
from matplotlib.figure import Figure
from torch import Tensor

import wellcond.linalg as wl

CHANNELS, SAMPLES = 16, 48
LAYERS: dict[str, Callable[[Tensor], Tensor]] = {
    "factor form": wl.covariance_sqrtm,
    "SVD": lambda X: wl.sqrtm(wl.covariance(X), solver="svd"),
    "Newton–Schulz": lambda X: wl.sqrtm(wl.covariance(X), solver="newton_schulz"),
    "Padé": lambda X: wl.sqrtm(wl.covariance(X), solver="pade"),
}


def features(kappa: float, draw: torch.Generator) -> Tensor:
    """(d, n) in float32, centred, with a covariance of condition number κ and evenly spaced log eigenvalues."""
    U = torch.linalg.qr(torch.randn(CHANNELS, CHANNELS, generator=draw, dtype=torch.float64)).Q
    samples = torch.randn(SAMPLES, CHANNELS, generator=draw, dtype=torch.float64)
    V = torch.linalg.qr(samples - samples.mean(0)).Q
    sigma = torch.logspace(0, -math.log10(kappa) / 2, CHANNELS, dtype=torch.float64)
    return ((U * sigma) @ V.T * math.sqrt(SAMPLES)).float()


def true_gradients(X: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """∂l/∂X and ∂l/∂P of l = ⟨G, P^{1/2}⟩ by the Sylvester equation in the eigenbasis of P, with 60 digits."""
    with mpmath.workdps(60):
        A = mpmath.matrix(X.double().tolist())
        for i in range(CHANNELS):
            mean = mpmath.fsum(A[i, j] for j in range(SAMPLES)) / SAMPLES
            for j in range(SAMPLES):
                A[i, j] = (A[i, j] - mean) / mpmath.sqrt(SAMPLES)
        eigvals, U = mpmath.eigsy(A * A.T)
        inner = U.T * mpmath.matrix(G.double().tolist()) * U
        for i in range(CHANNELS):
            for j in range(CHANNELS):
                inner[i, j] /= mpmath.sqrt(eigvals[i]) + mpmath.sqrt(eigvals[j])
        by_P = U * inner * U.T
        by_X = 2 * by_P * A / mpmath.sqrt(SAMPLES)
    return torch.tensor(by_X.tolist(), dtype=torch.float64), torch.tensor(by_P.tolist(), dtype=torch.float64)


def gradients(kappas: list[float], seeds: int) -> dict[str, list[float]]:
    """Medians over seeds: the norm by P and by A in units of ‖G‖, and the relative error of every layer."""
    curves: dict[str, list[float]] = {}
    for kappa in kappas:
        values: dict[str, list[float]] = {}
        for seed in range(seeds):
            draw = torch.Generator().manual_seed(seed)
            X, G = features(kappa, draw), torch.randn(CHANNELS, CHANNELS, generator=draw)
            G = (G + G.T) / 2
            truth, by_P = true_gradients(X, G)
            values.setdefault("by the covariance", []).append((by_P.norm() / G.norm()).item())
            values.setdefault("by the factor", []).append((truth.norm() * math.sqrt(SAMPLES) / G.norm()).item())
            for name, layer in LAYERS.items():
                x = X.clone().requires_grad_()
                (got,) = torch.autograd.grad((layer(x) * G).sum(), x)
                values.setdefault(name, []).append(((got.double() - truth).norm() / truth.norm()).item())
        for name, drawn in values.items():
            finite = all(map(math.isfinite, drawn))
            curves.setdefault(name, []).append(statistics.median(drawn) if finite else math.nan)
    return curves


def gradient_figure(kappas: list[float], curves: dict[str, list[float]], page: str) -> Figure:
    """Above the size of the gradient, below its error."""
    figure = Figure(figsize=(6.2, 5.6), layout="constrained")
    size, error = figure.subplots(2, 1, sharex=True)
    both = {name: (kappas, curves[name]) for name in ("by the covariance", "by the factor")}
    label_ends(size, both, (COLOURS[page][1], COLOURS[page][0]), 0.6)
    size.axhline(2**0.5, color=INK[page], lw=1, ls=":")
    size.annotate("bound √2", (3e7, 1.6), color=INK[page], va="bottom")
    label_ends(error, {name: (kappas, curves[name]) for name in LAYERS}, COLOURS[page], 0.8)
    panel(size, "Size of the true gradient, in units of the incoming one", page)
    panel(error, "Relative error of each layer's gradient, in float32", page)
    error.set_ylim(1e-9, 30)
    error.set_xscale("log")
    error.set_xlabel("condition number κ of the covariance")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=IMAGES)
    parser.add_argument("--quick", action="store_true", help="few points, for trying the script out")
    options = parser.parse_args()
    warnings.simplefilter("ignore", wl.ApproximateRootWarning)
    kappas = [10.0**e for e in ((1, 6, 12) if options.quick else range(1, 13))]
    curves = gradients(kappas, seeds=1 if options.quick else 5)
    for name, values in curves.items():
        print(f"{name:<18}", " ".join(f"{value:8.1e}" for value in values))
    save("gradient", lambda page: gradient_figure(kappas, curves, page), options.out)


if __name__ == "__main__":
    main()
