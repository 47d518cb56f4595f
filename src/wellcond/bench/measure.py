"""Measuring one case: time, memory and error of every contestant on the same input, and lower bounds on the time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from wellcond.bench.cases import Case, make_input
from wellcond.bench.contestants import Contestant, contestants
from wellcond.bench.gauges import count_operations, peak_bytes, saved_bytes, take_turns
from wellcond.bench.references import exact_function, relative_error, symmetric_part, value_and_gradient
from wellcond.bench.results import EIGH, EIGH_IN_THREADS, PRODUCTS, CaseResult, Measured
from wellcond.linalg.lapack import in_threads

Call = Callable[[], Any]

LARGE_PRODUCT = "a large product"
PRODUCT_COUNT = 5


def measure_case(
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
    *,
    seconds: float,
    names: Collection[str] | None = None,
) -> CaseResult:
    """Measure all contestants (or the named ones) on a case, with about this many seconds of timing.

    If a contestant fails, its row states why; the others continue.
    """
    X = make_input(case, dtype, device)
    exact, X64 = exact_function(case), X.cpu().double()
    direction = torch.randn(exact(X64).shape, generator=torch.Generator().manual_seed(21), dtype=torch.float64)
    # The truth uses the same rounded direction, so that rounding of the input is not part of the error.
    truth = value_and_gradient(exact, X64, direction.to(dtype).double())
    direction = direction.to(device, dtype)
    calls: dict[str, Call] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other packages
        rows = [_try(case, one, X, direction, truth, calls) for one in contestants(case, dtype, device, names)]
        limits = limit_calls(case, X)
        for call in limits.values():
            call()
        times = take_turns({**calls, **limits}, device, seconds=seconds)
    for row in rows:
        row.forward, row.both = (times.get(f"{row.name}/{what}") for what in ("forward", "both"))
    peak = count_operations(limits[LARGE_PRODUCT]) / times[LARGE_PRODUCT].minimum
    return CaseResult(case, X.numel() * X.element_size(), rows, {name: times[name] for name in limits}, peak)


def limit_calls(case: Case, X: Tensor) -> dict[str, Call]:
    """Calls that bound the time of a case from below, timed together with the contestants.

    A product large enough to reach the machine's peak and, except for the polar factor, an eigendecomposition and five
    products (one forward, four backward): of the d × d matrices, or for features the decomposition of the smaller Gram
    matrix, in float64 as in the implementation, and products of d × d by d × n.
    """
    size = 8192 if X.device.type == "cuda" else 1024
    large = torch.randn(size, size, dtype=X.dtype, device=X.device)
    found: dict[str, Call] = {LARGE_PRODUCT: lambda: large @ large}
    if case.task == "polar":
        return found
    if X.ndim == 3:
        P, left, right = X, X, X
    else:
        if case.task == "whitening_layer":
            columns = gram_of = X.transpose(0, 1).flatten(1)[None]
        else:
            columns = X.flatten(2)
            gram_of = columns.double()
            if case.samples < case.channels:
                gram_of = gram_of.mT
        left, right = columns @ columns.mT, columns
        P = gram_of @ gram_of.mT
        P = P / P.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]

    def products() -> None:
        for _ in range(PRODUCT_COUNT):
            torch.matmul(left, right)

    found |= {EIGH: lambda: torch.linalg.eigh(P), PRODUCTS: products}
    if X.device.type == "cpu":
        found[EIGH_IN_THREADS] = lambda: in_threads(torch.linalg.eigh, P)
    return found


def _try(
    case: Case,
    contestant: Contestant,
    X: Tensor,
    direction: Tensor,
    truth: tuple[Tensor, Tensor],
    calls: dict[str, Call],
) -> Measured:
    """Run a contestant once forward and backward for its errors and memory; add the calls to be timed to `calls`."""
    row, f = Measured(contestant.name, contestant.ours), contestant.f
    leaf = X.detach().requires_grad_()
    wanted = (leaf, *f.parameters()) if isinstance(f, nn.Module) else (leaf,)

    @torch.no_grad()
    def forward() -> Tensor:
        return f(X)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(f(leaf), wanted, direction)

    try:
        out = forward()
    except Exception as error:  # the others continue
        row.failure = _message(error)
        return row
    if contestant.comparable:
        row.error = relative_error(out, truth[0])
    calls[f"{row.name}/forward"] = forward
    del out
    try:
        gradient = both()[0]
    except Exception as error:
        row.failure = f"no gradient: {_message(error)}"
        return row
    if contestant.comparable:
        row.gradient_error = relative_error(symmetric_part(gradient, case), truth[1])
    calls[f"{row.name}/both"] = both
    del gradient
    row.saved = saved_bytes(f, X)
    row.peak = peak_bytes(both, X.device)
    if contestant.products_only:
        row.operations = count_operations(both)
    return row


def _message(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].partition(': ')[0] if lines else 'no message'}"
