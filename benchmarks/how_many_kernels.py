"""How many kernels does a function, a layer or a treated step launch?

Every small operation is a kernel launch on a GPU and some Python on a CPU, whatever the size of the input. Their number
is counted here without a GPU: the ATen operations that compute or write something, in the forward pass, the backward
pass and both. Views, metadata and empty tensors are not counted; a decomposition or a matrix product is one, however
many kernels the vendor's library makes of it.

Counted is what an accelerator runs. Inputs are on ``meta``, where no branch that is only for the CPU is taken; what
reads a value (and so makes the host wait) is counted on the CPU without the checks of values, and marked. One more
column has what runs on the CPU, where values are checked.

    python benchmarks/how_many_kernels.py                         # every case, as a Markdown table
    python benchmarks/how_many_kernels.py sqrtm --list            # cases of that name, operation by operation
    python benchmarks/how_many_kernels.py --json after.json --before before.json

A new case is one entry of ``CASES``: a name, and what makes a function and its inputs on a device.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import wellcond.linalg as wl
from wellcond import nn as spectral
from wellcond.bench.ratios import add_ratios_option, write_ratios
from wellcond.orthogonality import treat

Made = tuple[Callable[..., Any], tuple[Tensor, ...]]

# Operations that compute nothing, beside views, which say so in their signatures, and what gives no tensor.
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "resize_", "set_"}
FREE |= {"_unsafe_view", "_reshape_alias", "record_stream"}
READS = {"_local_scalar_dense", "equal", "is_nonzero"}


class Operations(TorchDispatchMode):
    """The operations that do work in this block, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        works = name in READS or any(isinstance(part, Tensor) for part in tree_leaves(result))
        if works and not (func.is_view or name in FREE or "::" in name):
            self.names.append(name)
        return result


@dataclass(frozen=True)
class Case:
    """Something to count.

    Attributes:
        make: the function to count and its inputs, on a device; those that require a gradient are differentiated.
        without: makes what is subtracted, as the untreated step from a treated one.
        device: on which an accelerator's way is counted: ``"cpu"`` where a value is read.
    """

    make: Callable[[str], Made]
    without: Callable[[str], Made] | None = None
    device: str = "meta"


@dataclass(frozen=True)
class Counted:
    """Names of operations, forward and backward."""

    forward: list[str]
    backward: list[str]

    @property
    def both(self) -> int:
        return len(self.forward) + len(self.backward)


@contextmanager
def as_on_an_accelerator(device: str) -> Iterator[None]:
    """``meta`` counts as a device, not as the tracing for which layers have ordinary operations; no value is read."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch("wellcond.nn._fused_passes.plain.is_shape_only", return_value=False))
        if device == "cpu":
            stack.enter_context(wl.value_checks(False))
            stack.enter_context(mock.patch("wellcond._shared.products.SLOW_MAXIMUM_NORM", ()))
        yield


def count(made: Made) -> Counted:
    """The operations of a second run; what the first alone does (tables, warnings, states) is left out."""
    function, inputs = made
    leaves = [x for x in inputs if x.requires_grad]
    forward, backward = Operations(), Operations()
    for _ in range(2):
        forward.names.clear()
        backward.names.clear()
        with forward:
            result = function(*inputs)
        outputs = [result] if isinstance(result, Tensor) else list(result or ())
        outputs = [out for out in outputs if isinstance(out, Tensor) and out.requires_grad]
        grads = [torch.empty_like(out).fill_(1.0) for out in outputs]
        if outputs and leaves:
            with backward:
                torch.autograd.grad(outputs, leaves, grads, allow_unused=True)
    return Counted(forward.names, backward.names)


def count_case(case: Case, *, accelerator: bool = True) -> Counted:
    """What a case runs on an accelerator, or on the CPU with its checks, less what it is compared with."""
    device = case.device if accelerator else "cpu"
    with as_on_an_accelerator(device) if accelerator else nullcontext():
        counted = count(case.make(device))
        if case.without is None:
            return counted
        plain = count(case.without(device))
    return Counted(_less(counted.forward, plain.forward), _less(counted.backward, plain.backward))


def _less(names: list[str], others: list[str]) -> list[str]:
    return list((Counter(names) - Counter(others)).elements())


def tensor(*shape: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=generator)
    return x.to(device)


def of_matrix(function: Callable[..., Any], d: int = 64, batch: int = 8, **options: Any) -> Callable[[str], Made]:
    """A function of positive definite matrices."""

    def make(device: str) -> Made:
        X = tensor(batch, d, 2 * d, device=device)
        return partial(function, **options), ((X @ X.mT / (2 * d)).requires_grad_(),)

    return make


def of_features(function: Callable[..., Any], *shape: int, **options: Any) -> Callable[[str], Made]:
    """A function of features or of any tensor of this shape."""

    def make(device: str) -> Made:
        return partial(function, **options), (tensor(*shape, device=device).requires_grad_(),)

    return make


def of_layer(build: Callable[[], nn.Module], *shape: int, train: bool = True) -> Callable[[str], Made]:
    """A layer on activations of this shape; its parameters get gradients too."""

    def make(device: str) -> Made:
        layer = build().train(train).to(device)
        x = tensor(*shape, device=device).requires_grad_()
        parameters = tuple(layer.parameters())
        return lambda x, *_: layer(x), (x, *parameters)

    return make


def of_step(treatments: str | None, options: dict[str, dict[str, Any]] | None = None) -> Callable[[str], Made]:
    """One step of the layer before a spectral layer: its weight in use, backward, and SGD with momentum.

    The weight is 64 × 3 × 3 × 3; all of a step counts as forward.
    """

    def make(device: str) -> Made:
        layer = nn.Conv2d(3, 64, 3).to(device)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, foreach=False)
        chosen = {name: (options or {}).get(name, {}) for name in (treatments or "").split("+") if name}
        treatment = treat(layer, optimizer, treatments, layers=[layer], options=chosen) if treatments else None
        gradient = tensor(64, 3, 3, 3, device=device)

        def step() -> None:
            optimizer.zero_grad()
            product = (layer.weight * gradient).sum()
            (product + treatment.loss() if treatment and "ol" in chosen else product).backward()
            optimizer.step()

        return step, ()

    return make


ROOTS = {
    "eigh": wl.Eigh(),
    "newton_schulz": wl.NewtonSchulz(5, tolerance=None),
    "minimax": wl.Minimax(tolerance=None),
    "minimax_or_eigh": wl.MinimaxOrEigh(),
    "pade": wl.Pade(tolerance=None),
    "taylor": wl.Taylor(tolerance=None),
    "svd": wl.Svd(),
}
READ_VALUES = {"minimax_or_eigh"}
TREATMENTS = ("sn", "ol", "ow", "nog", "olr", "nog+ow+olr")
IMAGES = (16, 64, 14, 14)

CASES: dict[str, Case] = {}
for _name, _solver in ROOTS.items():
    _device = "cpu" if _name in READ_VALUES else "meta"
    for _function in wl.sqrtm, wl.invsqrtm, wl.sqrtm_invsqrtm:
        CASES[f"{_function.__name__}, {_name}"] = Case(of_matrix(_function, solver=_solver), device=_device)
CASES |= {
    "powm 0.3": Case(of_matrix(wl.powm, exponent=0.3)),
    "logm": Case(of_matrix(wl.logm)),
    "expm": Case(of_matrix(wl.expm)),
    "lyapunov": Case(of_matrix(lambda P: wl.lyapunov(P, P))),
    "polar, svd": Case(of_features(wl.polar, 8, 64, 32, solver="svd")),
    "polar, minimax": Case(of_features(lambda G: wl.polar(G.detach(), solver="minimax"), 8, 64, 32)),
    "polar, muon": Case(of_features(lambda G: wl.polar(G.detach(), solver="muon"), 8, 64, 32)),
    "covariance": Case(of_features(wl.covariance, 8, 64, 256)),
    "covariance_sqrtm, 64 × 256": Case(of_features(wl.covariance_sqrtm, 8, 64, 256)),
    "covariance_sqrtm, 64 × 49": Case(of_features(wl.covariance_sqrtm, 8, 64, 49)),
    "covariance_powm 0.3": Case(of_features(wl.covariance_powm, 8, 64, 256, exponent=0.3)),
    "covariance_logm": Case(of_features(wl.covariance_logm, 8, 64, 256, eps=1e-3)),
    "whiten, zca": Case(of_features(wl.whiten, 8, 64, 256, eps=1e-5)),
    "whiten, cholesky": Case(of_features(wl.whiten, 8, 64, 256, eps=1e-5, method="cholesky")),
    "whiten, zca of the factor": Case(of_features(wl.whiten, 8, 64, 16, eps=1e-5, via="factor")),
    "condition_number": Case(of_features(lambda X: wl.condition_number(X.detach()), 8, 64, 256), device="cpu"),
    "BatchNorm2d": Case(of_layer(lambda: nn.BatchNorm2d(64), *IMAGES)),
    "DecorrelatedBatchNorm2d": Case(of_layer(lambda: spectral.DecorrelatedBatchNorm2d(64), *IMAGES)),
    "DecorrelatedBatchNorm2d, 4 groups": Case(of_layer(lambda: spectral.DecorrelatedBatchNorm2d(64, 4), *IMAGES)),
    "DecorrelatedBatchNorm2d, eval": Case(of_layer(lambda: spectral.DecorrelatedBatchNorm2d(64), *IMAGES, train=False)),
    "IterNorm2d": Case(of_layer(lambda: spectral.IterNorm2d(64), *IMAGES)),
    "GlobalCovariancePool2d": Case(of_layer(lambda: spectral.GlobalCovariancePool2d(64), *IMAGES)),
    "GlobalCovariancePool2d, log": Case(
        of_layer(lambda: spectral.GlobalCovariancePool2d(64, function="log", eps=1e-3), *IMAGES)
    ),
    "GlobalCovariancePool2d, newton_schulz": Case(
        of_layer(lambda: spectral.GlobalCovariancePool2d(64, solver=ROOTS["newton_schulz"]), *IMAGES)
    ),
    "TokenCovariancePool": Case(of_layer(lambda: spectral.TokenCovariancePool(64), 16, 196, 64)),
    "SpectralLayer, sqrt": Case(of_layer(lambda: spectral.SpectralLayer("sqrt"), 8, 64, 256)),
    "SkewOrthogonalConv2d": Case(of_layer(lambda: spectral.SkewOrthogonalConv2d(64, 64), *IMAGES)),
    "WhiteningColoring": Case(
        lambda device: (
            spectral.WhiteningColoring(1e-5),
            (tensor(*IMAGES, device=device).requires_grad_(), tensor(*IMAGES, device=device)),
        )
    ),
}
for _name in TREATMENTS:
    # The orthogonal loss asks about autocast, which "meta" has not.
    CASES[f"treated step adds, {_name}"] = Case(of_step(_name), of_step(None), "cpu" if _name == "ol" else "meta")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="cases whose name contains one of these (default: all)")
    parser.add_argument("--list", action="store_true", help="the operations one after the other")
    parser.add_argument("--quick", action="store_true", help="as the other scripts have it; this one always is")
    parser.add_argument("--json", type=Path, help="write the counts to this file")
    parser.add_argument("--before", type=Path, help="counts of another version, as --json writes them")
    add_ratios_option(parser)
    options = parser.parse_args()
    before = json.loads(options.before.read_text()) if options.before else {}
    found = {name: case for name, case in CASES.items() if not options.names or any(n in name for n in options.names)}
    columns = ["forward", "backward", "both", "both, CPU"] + ["both before", "CPU before"] * bool(before)
    print(f"| work | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}", flush=True)
    counts = {}
    for name, case in found.items():
        counted, on_cpu = count_case(case), count_case(case, accelerator=False)
        numbers = [len(counted.forward), len(counted.backward), counted.both, on_cpu.both]
        counts[name] = dict(zip(columns, numbers, strict=False))
        if before:
            numbers += [before.get(name, {}).get(column, "") for column in ("both", "both, CPU")]
        print(f"| {name}{'' if case.device == 'meta' else ' *'} | {' | '.join(map(str, numbers))} |", flush=True)
        if options.list:
            print("  forward:", *counted.forward, "\n  backward:", *counted.backward)
    print("\nThe last of them on the CPU with its checks of values. *: an accelerator's way, counted on the CPU.")
    unit = count_case(CASES["BatchNorm2d"]).both
    write_ratios(options.ratios, {f"{name}, of BatchNorm2d": n["both"] / unit for name, n in counts.items()})
    if options.json:
        options.json.write_text(json.dumps(counts, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
