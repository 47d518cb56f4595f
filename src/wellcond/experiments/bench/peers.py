"""Other packages that offer the same functions. Each is optional: taken where it can be imported, named where not."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from wellcond.experiments.bench.cases import LAYER_EPS, Case

Function = Callable[[Tensor], Tensor]

# What a peer is looked for under, by the name in the tables.
MODULES = {
    "spd-learn": "spd_learn.functional",
    "pyriemann": "pyriemann.geometry.base",
    "kornia": "kornia.enhance",
    "torch.optim.Muon": "torch.optim._muon",
    "torch.linalg.matrix_sqrth": "torch.linalg",
    "torch.linalg.polar": "torch.linalg",
}


def peer_functions(case: Case, names: Collection[str] | None = None) -> list[tuple[str, Function]]:
    """The peers at hand (of these names) that do this task."""
    return [
        (name, f)
        for name in MODULES
        if (names is None or name in names) and not isinstance(found := _import(name), str)
        for f in _offered(name, found, case.task)
    ]


def missing_peers() -> dict[str, str]:
    """The peers that are not at hand, and why."""
    return {name: found for name in MODULES if isinstance(found := _import(name), str)}


def _import(name: str) -> Any:
    """The module, or a line that says why it cannot be used."""
    try:
        module = importlib.import_module(MODULES[name])
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
