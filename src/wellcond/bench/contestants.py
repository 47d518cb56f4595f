"""The contestants: our solvers, plain autograd, the published iteration, and other packages with the same functions.

Other packages are optional: missing ones are listed with the reason.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from wellcond.bench.cases import LAYER_EPS, Case
from wellcond.bench.references import ISQRT_STEPS, polar_by_svd, root_by_eigh, root_by_isqrt, root_by_svd, with_root
from wellcond.linalg import SOLVERS, Solver, covariance_sqrtm, invsqrtm, polar, sqrtm
from wellcond.nn import DecorrelatedBatchNorm2d, GlobalCovariancePool2d

REFERENCE = "autograd through eigh"
SVD = "autograd through svd"
AUTO = "wellcond"
ISQRT = f"iSQRT-COV, {ISQRT_STEPS} steps"

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Contestant:
    """One way to do a task."""

    name: str
    f: Function  # a module if it has parameters
    ours: bool = False  # whether it is part of this library
    products_only: bool = False  # only matrix products, so that FLOP/s are meaningful
    comparable: bool = True  # computes the task's function, so that an error is defined


def contestants(
    case: Case, dtype: torch.dtype, device: torch.device, names: Collection[str] | None = None
) -> list[Contestant]:
    """All contestants of a case (or the named ones): references first, then ours, then peers."""
    found = [c for c in (*_references(case), *_ours(case), *_peers(case)) if names is None or c.name in names]
    for contestant in found:
        if isinstance(contestant.f, nn.Module):
            contestant.f.to(device, dtype).train()
    return found


def _references(case: Case) -> Iterator[Contestant]:
    for name, root in ((REFERENCE, root_by_eigh), (SVD, root_by_svd), (ISQRT, root_by_isqrt)):
        f = polar_by_svd if case.task == "polar" and root is root_by_svd else with_root(case, root)
        yield Contestant(name, f, products_only=root is root_by_isqrt)
    if case.task == "whitening_layer":
        yield Contestant("torch.nn.BatchNorm2d", nn.BatchNorm2d(case.channels), comparable=False)


def _ours(case: Case) -> Iterator[Contestant]:
    yield Contestant(AUTO, _our_function(case, "auto"), ours=True)
    if case.task == "polar":
        for name in ("minimax", "muon"):  # without gradients
            yield Contestant(f"{AUTO}, {name}", partial(polar, solver=name), ours=True, products_only=True)
        return
    for name, make in SOLVERS.items():
        solver = make()
        solver.tolerance = None  # no warnings: the error is in the table
        products_only = solver.traceable and name != "pade"
        yield Contestant(f"{AUTO}, {name}", _our_function(case, solver), ours=True, products_only=products_only)


def _our_function(case: Case, solver: str | Solver) -> Function:
    if case.task == "whitening_layer":
        return DecorrelatedBatchNorm2d(case.channels, eps=LAYER_EPS, solver=solver)
    if case.task == "pooling_layer":
        return GlobalCovariancePool2d(case.channels, solver=solver)
    if case.task == "polar":
        return polar
    if case.task == "covariance_sqrt":
        return lambda X: covariance_sqrtm(X.flatten(2), solver=solver)
    return partial(sqrtm if case.task == "sqrt" else invsqrtm, solver=solver)


def _kornia_layer(zca_whiten: Callable[..., Tensor], x: Tensor) -> Tensor:
    """Kornia's whitening of samples × channels as a norm layer for feature maps, without running statistics."""
    samples = x.movedim(1, -1).flatten(0, -2)
    white = zca_whiten(samples, 0, unbiased=False, eps=LAYER_EPS)
    return white.view(x.shape[0], *x.shape[2:], x.shape[1]).movedim(-1, 1)


def _muon_iteration(iteration: Callable[..., Tensor], G: Tensor) -> Tensor:
    """Five steps with the optimizer's coefficients in bfloat16, one matrix at a time as in the optimizer."""
    steps = [iteration(g, (3.4445, -4.7750, 2.0315), 5, 1e-7) for g in G.reshape(-1, *G.shape[-2:])]
    return torch.stack(steps).to(G.dtype).reshape(G.shape)


PEERS: dict[str, tuple[str, dict[str, Callable[[Any], Function]]]] = {
    "spd-learn": (
        "spd_learn.functional",
        {
            "sqrt": lambda m: m.matrix_sqrt.apply,
            "invsqrt": lambda m: m.matrix_inv_sqrt.apply,
            "polar": lambda m: m.orthogonal_polar_factor,
        },
    ),
    "pyriemann": ("pyriemann.geometry.base", {"sqrt": lambda m: m.sqrtm, "invsqrt": lambda m: m.invsqrtm}),
    "kornia": ("kornia.enhance", {"whitening_layer": lambda m: partial(_kornia_layer, m.zca_whiten)}),
    "torch.optim.Muon": (
        "torch.optim._muon",
        {"polar": lambda m: partial(_muon_iteration, m._zeropower_via_newtonschulz)},
    ),
    "torch.linalg.matrix_sqrth": ("torch.linalg", {"sqrt": lambda m: m.matrix_sqrth}),
    "torch.linalg.polar": ("torch.linalg", {"polar": lambda m: lambda G: m.polar(G)[0]}),
}
"""For each peer, the module to import and a function for each supported task."""


def missing_peers() -> dict[str, str]:
    """The unavailable peers, and why."""
    return {name: found for name in PEERS if isinstance(found := _import(name), str)}


def _peers(case: Case) -> Iterator[Contestant]:
    for name, (_, functions) in PEERS.items():
        if case.task in functions and not isinstance(module := _import(name), str):
            try:
                f = functions[case.task](module)
            except AttributeError:  # an older version lacks it
                continue
            yield Contestant(name, f)


def _import(name: str) -> Any:
    """The module, or the reason why it cannot be used."""
    try:
        module = importlib.import_module(PEERS[name][0])
    except ModuleNotFoundError as error:
        return f"not installed (no module '{error.name}')"
    except Exception as error:  # a broken peer must not stop the benchmark
        return f"cannot be imported ({type(error).__name__}: {error})"
    if name.startswith("torch.linalg.") and not hasattr(module, name.rpartition(".")[2]):
        return f"not in torch {torch.__version__}"
    return module
