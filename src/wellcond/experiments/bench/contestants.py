"""Who runs: our solvers, plain autograd, the published iteration, and the peers that are installed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from wellcond.experiments.bench.cases import LAYER_EPS, Case
from wellcond.experiments.bench.peers import peer_functions
from wellcond.experiments.bench.references import (
    ISQRT_STEPS,
    CovariancePool,
    WhiteningBatchNorm2d,
    covariance_of,
    polar_by_root,
    polar_by_svd,
    root_by_eigh,
    root_by_isqrt,
    root_by_svd,
)
from wellcond.linalg import SOLVERS, Solver, covariance_sqrtm, invsqrtm, polar, sqrtm
from wellcond.nn import DecorrelatedBatchNorm2d, GlobalCovariancePool2d

REFERENCE = "autograd through eigh"
AUTO = "wellcond"
ISQRT = f"iSQRT-COV, {ISQRT_STEPS} steps"

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Contestant:
    """One way to do a task.

    Attributes:
        name: in the tables.
        f: the function; a module where it has parameters.
        ours: whether it is this library's.
        products_only: whether all its work is matrix products, so that its FLOP/s mean something.
        comparable: whether it computes the function of the task, so that its error means something.
    """

    name: str
    f: Function
    ours: bool = False
    products_only: bool = False
    comparable: bool = True


def contestants(
    case: Case, dtype: torch.dtype, device: torch.device, names: Collection[str] | None = None
) -> list[Contestant]:
    """Everybody for a case (or those of these names), the reference first, then ours."""
    found = [c for c in (*_references(case), *_ours(case)) if names is None or c.name in names]
    found += [Contestant(name, f) for name, f in peer_functions(case, names)]
    for contestant in found:
        if isinstance(contestant.f, nn.Module):
            contestant.f.to(device, dtype).train()
    return found


def _references(case: Case) -> Iterator[Contestant]:
    ways = ((REFERENCE, root_by_eigh), ("autograd through svd", root_by_svd), (ISQRT, root_by_isqrt))
    for name, root in ways:
        sqrt, invsqrt = partial(root, power=0.5), partial(root, power=-0.5)
        products_only = root is root_by_isqrt
        if case.task == "whitening_layer":
            f = WhiteningBatchNorm2d(case.channels, invsqrt, LAYER_EPS)
        elif case.task == "polar":
            f = polar_by_svd if root is root_by_svd else partial(polar_by_root, root=invsqrt)
        else:
            f = {
                "sqrt": sqrt,
                "invsqrt": invsqrt,
                "covariance_sqrt": lambda X, sqrt=sqrt: sqrt(covariance_of(X.flatten(2))),
                "pooling_layer": CovariancePool(sqrt),
            }[case.task]
        yield Contestant(name, f, products_only=products_only)
    if case.task == "whitening_layer":
        yield Contestant("torch.nn.BatchNorm2d", nn.BatchNorm2d(case.channels), comparable=False)


def _ours(case: Case) -> Iterator[Contestant]:
    yield Contestant(AUTO, _our_function(case, "auto"), ours=True)
    if case.task == "polar":
        for name in ("minimax", "muon"):  # values only: their rows say that they have no gradient
            yield Contestant(f"{AUTO}, {name}", partial(polar, solver=name), ours=True, products_only=True)
        return
    for name, make in SOLVERS.items():
        solver = make()
        solver.tolerance = None  # the error is in the table; no warning beside it
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
