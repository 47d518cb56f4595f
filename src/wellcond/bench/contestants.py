"""Who takes part: our solvers, plain autograd, the published iteration, and other packages with the same functions.

Each of those is optional: taken where it can be imported, named where not.
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

# What a peer is looked for under, by its name in the tables.
PEERS = {
    "spd-learn": "spd_learn.functional",
    "pyriemann": "pyriemann.geometry.base",
    "kornia": "kornia.enhance",
    "torch.optim.Muon": "torch.optim._muon",
    "torch.linalg.matrix_sqrth": "torch.linalg",
    "torch.linalg.polar": "torch.linalg",
}


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
    """All contestants of a case (or those of these names), the reference first, then ours."""
    found = [c for c in (*_references(case), *_ours(case)) if names is None or c.name in names]
    for name in PEERS:
        if (names is None or name in names) and not isinstance(module := _import(name), str):
            found += [Contestant(name, f) for f in _offered(name, module, case.task)]
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


def missing_peers() -> dict[str, str]:
    """The peers that are not at hand, and why."""
    return {name: found for name in PEERS if isinstance(found := _import(name), str)}


def _import(name: str) -> Any:
    """The module, or a line that says why it cannot be used."""
    try:
        module = importlib.import_module(PEERS[name])
    except ModuleNotFoundError as error:
        return f"not installed (no module '{error.name}')"
    except Exception as error:  # a peer that breaks at import is its own affair
        return f"cannot be imported ({type(error).__name__}: {error})"
    if name.startswith("torch.linalg.") and not hasattr(module, name.rpartition(".")[2]):
        return f"not in torch {torch.__version__}"
    return module


def _offered(name: str, module: Any, task: str) -> Iterator[Function]:
    if name == "spd-learn":
        if task in ("sqrt", "invsqrt"):
            yield (module.matrix_sqrt if task == "sqrt" else module.matrix_inv_sqrt).apply
        elif task == "polar" and hasattr(module, "orthogonal_polar_factor"):
            yield module.orthogonal_polar_factor
    elif name == "pyriemann" and task in ("sqrt", "invsqrt"):
        yield module.sqrtm if task == "sqrt" else module.invsqrtm
    elif name == "kornia" and task == "whitening_layer":
        yield partial(_kornia_layer, module.zca_whiten)
    elif name == "torch.optim.Muon" and task == "polar":
        yield partial(_muon_iteration, module._zeropower_via_newtonschulz)
    elif name == "torch.linalg.matrix_sqrth" and task == "sqrt":
        yield module.matrix_sqrth
    elif name == "torch.linalg.polar" and task == "polar":
        yield lambda G: module.polar(G)[0]


def _kornia_layer(zca_whiten: Callable[..., Tensor], x: Tensor) -> Tensor:
    """Its whitening of samples × channels as the norm layer of a map; no statistics are kept."""
    samples = x.movedim(1, -1).flatten(0, -2)
    white = zca_whiten(samples, 0, unbiased=False, eps=LAYER_EPS)
    return white.view(x.shape[0], *x.shape[2:], x.shape[1]).movedim(-1, 1)


def _muon_iteration(iteration: Callable[..., Tensor], G: Tensor) -> Tensor:
    """Five steps with the optimizer's own coefficients, one matrix after another as it does; in bfloat16."""
    steps = [iteration(g, (3.4445, -4.7750, 2.0315), 5, 1e-7) for g in G.reshape(-1, *G.shape[-2:])]
    return torch.stack(steps).to(G.dtype).reshape(G.shape)
