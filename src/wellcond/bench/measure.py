"""One case measured: every contestant's time, memory and error on the same input, and the limits beside them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wellcond.bench.cases import Case, make_input
from wellcond.bench.contestants import AUTO, REFERENCE, Contestant, contestants
from wellcond.bench.gauges import Time, count_operations, peak_bytes, saved_bytes, take_turns
from wellcond.bench.references import exact_function, relative_error, symmetric_part, value_and_gradient
from wellcond.linalg.lapack import in_threads

Call = Callable[[], Any]

EIGH, EIGH_IN_THREADS, PRODUCTS = "eigh alone", "eigh alone, in threads", "five products alone"
LARGE_PRODUCT = "a large product"
PRODUCT_COUNT = 5


@dataclass
class Measured:
    """A contestant on a case; what could not be measured is None, and `failure` says why."""

    name: str
    ours: bool
    forward: Time | None = None  # the function alone, without a graph
    both: Time | None = None  # with the gradient of input and parameters
    saved: int | None = None  # bytes, see `wellcond.bench.gauges`
    peak: int | None = None
    error: float | None = None  # the largest relative error of a matrix (an image for layers) against the truth
    gradient_error: float | None = None
    operations: int | None = None  # floating-point, forward and backward, where they are products alone
    failure: str = ""

    @property
    def operations_per_second(self) -> float | None:
        """FLOP/s of forward and backward, of those that only multiply."""
        return self.operations / self.both.minimum if self.operations and self.both else None


@dataclass
class CaseResult:
    """All contestants on one case; `peak` is the FLOP/s of a large product in between."""

    case: Case
    input_bytes: int
    rows: list[Measured]
    limits: dict[str, Time]
    peak: float

    def __getitem__(self, name: str) -> Measured:
        return next(row for row in self.rows if row.name == name)

    def faster(self, row: Measured, what: str = "both") -> float | None:
        """How many times as fast as autograd through eigh."""
        mine, reference = getattr(row, what), getattr(self[REFERENCE], what)
        return reference.minimum / mine.minimum if mine and reference else None

    @property
    def overhead(self) -> float | None:
        """The time of `wellcond` over that of (eigh + five products), less 1."""
        both = self[AUTO].both
        if not both or EIGH not in self.limits:
            return None
        eigh = min(self.limits[name].minimum for name in (EIGH, EIGH_IN_THREADS) if name in self.limits)
        return both.minimum / (eigh + self.limits[PRODUCTS].minimum) - 1

    def to_dict(self) -> dict[str, Any]:
        """For the JSON file: everything measured, and the ratios made of it."""
        rows = [
            {
                **asdict(row),
                "faster_forward": self.faster(row, "forward"),
                "faster_both": self.faster(row),
                "flops_per_second": row.operations_per_second,
            }
            for row in self.rows
        ]
        return {
            "task": self.case.task,
            "shape": list(self.case.shape),
            "input_bytes": self.input_bytes,
            "limits": {name: asdict(time) for name, time in self.limits.items()},
            "overhead_over_limit": self.overhead,
            "peak_flops_per_second": self.peak,
            "rows": rows,
        }


def measure_case(
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
    *,
    seconds: float,
    names: Collection[str] | None = None,
) -> CaseResult:
    """Measure all contestants (or those of these names) on a case in about this many seconds of timing.

    A contestant that fails says why in its row; the others go on.
    """
    X = make_input(case, dtype, device)
    exact, X64 = exact_function(case), X.cpu().double()
    direction = torch.randn(exact(X64).shape, generator=torch.Generator().manual_seed(21), dtype=torch.float64)
    # The same rounded direction for the truth: what is compared is the function, not the rounding of its input.
    truth = value_and_gradient(exact, X64, direction.to(dtype).double())
    direction = direction.to(device, dtype)
    calls: dict[str, Call] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a peer warns of is not our reader's affair
        rows = [
            _try(case, contestant, X, direction, truth, calls) for contestant in contestants(case, dtype, device, names)
        ]
        limits = limit_calls(case, X)
        for call in limits.values():
            call()
        times = take_turns({**calls, **limits}, device, seconds=seconds)
    for row in rows:
        row.forward, row.both = (times.get(f"{row.name}/{what}") for what in ("forward", "both"))
    peak = count_operations(limits[LARGE_PRODUCT]) / times[LARGE_PRODUCT].minimum
    return CaseResult(case, X.numel() * X.element_size(), rows, {name: times[name] for name in limits}, peak)


def limit_calls(case: Case, X: Tensor) -> dict[str, Call]:
    """What bounds a case from below, to be timed with the contestants.

    Always a product large enough to run at the machine's peak. On matrices also their
    decomposition, and five d × d products (one forward, four backward). On features the decomposition of the smaller
    Gram matrix, in double precision as it is done, and five products of d × d by d × n.
    """
    size = 8192 if X.device.type == "cuda" else 1024
    large = torch.randn(size, size, dtype=X.dtype, device=X.device)
    found: dict[str, Call] = {LARGE_PRODUCT: lambda: large @ large}
    if case.task == "polar":
        return found
    if X.ndim == 3:
        P, left, right = X, X, X
    else:
        columns = X.transpose(0, 1).flatten(1)[None] if case.task == "whitening_layer" else X.flatten(2)
        left, right = columns @ columns.mT, columns
        wide = columns if case.task == "whitening_layer" else columns.double()
        small = case.task != "whitening_layer" and case.samples < case.channels
        P = wide.mT @ wide if small else wide @ wide.mT
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
    """Run it once each way, which finds its errors and its memory, and enter in `calls` what can be timed."""
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
    except Exception as error:  # whatever it is, the others go on
        row.failure = _said(error)
        return row
    if contestant.comparable:
        row.error = relative_error(out, truth[0])
    calls[f"{row.name}/forward"] = forward
    del out
    try:
        gradient = both()[0]
    except Exception as error:
        row.failure = f"no gradient: {_said(error)}"
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


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].partition(': ')[0] if lines else 'no message'}"
