"""On the ``meta`` device, where there are no values, every function has the shape and dtype that it has elsewhere.

Whatever reads a value fails there: on an accelerator the host would wait for it.
"""

from __future__ import annotations

import pytest
import torch

import wellcond.linalg as wl
from function_table import FUNCTIONS, SPECTRA

# These read one number, to choose or to refuse.
READS = {"minimax_or_eigh", "adaptive"}
CASES = [(name, solver) for name, function in FUNCTIONS.items() for solver in (None, *function.solvers)]


def tensors(result):
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


@pytest.mark.filterwarnings("ignore::wellcond.linalg.ApproximateRootWarning")  # once in a process, in whichever test
@pytest.mark.parametrize(("name", "solver"), [c for c in CASES if not READS & {c[1], c[0].split("-")[-1]}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_function_runs_without_values(name, solver, dtype):
    function = FUNCTIONS[name]
    options = {} if solver is None else {"solver": solver}
    x = function.make(SPECTRA["distinct"], dtype, (2,)).requires_grad_()
    y = x.detach().to("meta").requires_grad_()
    want = tensors(function.f(x, **options))
    got = tensors(function.f(y, **options))
    assert all(out.is_meta for out in got)
    assert [(out.shape, out.dtype) for out in got] == [(out.shape, out.dtype) for out in want]
    if name == "polar" and solver in ("minimax", "muon"):
        return  # values only
    (gradient,) = torch.autograd.grad([out.float().sum() for out in got], y)
    assert gradient.is_meta and (gradient.shape, gradient.dtype) == (y.shape, y.dtype)


@pytest.mark.parametrize("name", ["sqrtm_ex", "invsqrtm_ex"])
def test_a_status_is_given_without_values(name):
    status = getattr(wl, name)(torch.eye(3, device="meta").expand(2, 3, 3))
    assert status.info.shape == status.residual.shape == (2,) and status.info.is_meta


def test_what_reads_a_value_says_that_there_is_none():
    with pytest.raises((RuntimeError, NotImplementedError)):
        wl.sqrtm(torch.eye(3, device="meta"), solver="minimax_or_eigh")
