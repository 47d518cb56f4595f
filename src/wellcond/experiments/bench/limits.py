"""What cannot be avoided: the decomposition alone, the matrix products alone, and the speed of a large product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from wellcond.experiments.bench.cases import Case
from wellcond.linalg.lapack import in_threads

Call = Callable[[], object]

EIGH, EIGH_IN_THREADS, PRODUCTS = "eigh alone", "eigh alone, in threads", "five products alone"
LARGE_PRODUCT = "a large product"
PRODUCT_COUNT = 5


def limit_calls(case: Case, X: Tensor) -> dict[str, Call]:
    """What bounds a case from below, to be timed with the contestants.

    Always a product large enough to run at the machine's peak (:func:`large_product`). On matrices also their
    decomposition, and five d × d products (one forward, four backward). On features the decomposition of the smaller
    Gram matrix, in double precision as it is done, and five products of d × d by d × n.
    """
    found: dict[str, Call] = {LARGE_PRODUCT: large_product(X.dtype, X.device)}
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


def large_product(dtype: torch.dtype, device: torch.device) -> Call:
    """A product large enough to run at the peak."""
    A = torch.randn(_large(device), _large(device), dtype=dtype, device=device)
    return lambda: A @ A


def large_product_operations(device: torch.device) -> int:
    """Its floating-point operations."""
    return 2 * _large(device) ** 3


def _large(device: torch.device) -> int:
    return 8192 if device.type == "cuda" else 1024


def count_operations(call: Call) -> int:
    """Floating-point operations of the matrix products in one call."""
    with _Operations() as counter:
        call()
    return counter.total


class _Operations(TorchDispatchMode):
    """Adds up what torch's own registry says of each operation; its counter cannot see ``autograd.grad``."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out
