"""The number of operations of every function, held to what it is: it may only fall. ``benchmarks/how_many_kernels.py``
counts them on the way that an accelerator takes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import wellcond.linalg as wl

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "how_many_kernels.py"
# Forward and backward together, as counted; a case that needs fewer gets its new number here.
BOUNDS = {
    "sqrtm, eigh": 19,
    "invsqrtm, eigh": 21,
    "sqrtm_invsqrtm, eigh": 27,
    "sqrtm, newton_schulz": 58,
    "invsqrtm, newton_schulz": 59,
    "sqrtm_invsqrtm, newton_schulz": 93,
    "sqrtm, minimax": 99,
    "invsqrtm, minimax": 110,
    "sqrtm_invsqrtm, minimax": 168,
    "sqrtm, minimax_or_eigh": 109,
    "invsqrtm, minimax_or_eigh": 119,
    "sqrtm_invsqrtm, minimax_or_eigh": 174,
    "sqrtm, pade": 70,
    "invsqrtm, pade": 75,
    "sqrtm_invsqrtm, pade": 136,
    "sqrtm, taylor": 67,
    "invsqrtm, taylor": 72,
    "sqrtm_invsqrtm, taylor": 130,
    "sqrtm, svd": 38,
    "invsqrtm, svd": 38,
    "sqrtm_invsqrtm, svd": 51,
    "powm 0.3": 42,
    "logm": 25,
    "expm": 26,
    "lyapunov": 27,
    "polar, svd": 26,
    "polar, minimax": 49,
    "polar, muon": 24,
    "covariance": 16,
    "covariance_sqrtm, 64 × 256": 38,
    "covariance_sqrtm, 64 × 49": 52,
    "covariance_powm 0.3": 61,
    "covariance_logm": 48,
    "whiten, zca": 52,
    "whiten, cholesky": 49,
    "whiten, zca of the factor": 52,
    "condition_number": 42,
}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("how_many_kernels", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["how_many_kernels"] = module  # where its dataclasses look for their types
    spec.loader.exec_module(module)
    yield module
    del sys.modules["how_many_kernels"]


@pytest.mark.parametrize("name", BOUNDS)
def test_no_more_operations_than_counted(name, script):
    counted = script.count_case(script.CASES[name])
    assert 0 < counted.both <= BOUNDS[name], " ".join([*counted.forward, "|", *counted.backward])


def test_every_function_and_solver_is_counted(script):
    functions = ("sqrtm", "invsqrtm", "sqrtm_invsqrtm")
    assert {f"{f}, {solver}" for f in functions for solver in wl.SOLVERS} <= set(script.CASES)
    named = {name.split(",")[0].split(" ")[0] for name in script.CASES}
    differentiable = ("powm", "logm", "expm", "lyapunov", "polar", "whiten")
    assert {*differentiable, *(f"covariance{kind}" for kind in ("", "_sqrtm", "_powm", "_logm"))} <= named


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (lambda x: x.mT.unsqueeze(0).expand(3, -1, -1).detach().squeeze(0), []),
        (lambda x: torch.empty_like(x), []),
        (lambda x: (torch.result_type(x, 1.0), x.view_as(x))[1], []),
        (lambda x: x.reshape(-1), []),
        (lambda x: x.mT.reshape(-1), ["clone"]),
        (lambda x: torch.zeros_like(x), ["zeros_like"]),
        (lambda x: (x @ x + 1.0).sum(), ["mm", "add", "sum"]),
        (lambda x: torch.addmm(x, x, x, beta=2.0), ["addmm"]),
        (lambda x: [x.sum().item()], ["sum", "_local_scalar_dense"]),
        (lambda x: [torch.equal(x, x.mT)], ["equal"]),
        (lambda x: torch.where(x > 0, x, 1.0), ["gt", "scalar_tensor", "where"]),  # the number is written to the device
    ],
)
def test_views_and_empty_tensors_are_no_work(function, names, script):
    assert script.count((function, (torch.ones(2, 2),))).forward == names


def test_forward_and_backward_are_told_apart(script):
    counted = script.count((torch.sin, (torch.ones(2, requires_grad=True),)))
    assert (counted.forward, counted.backward) == (["sin"], ["cos", "mul"])


def test_what_is_compared_with_is_subtracted(script):
    def once(device):
        return torch.exp, (torch.ones(2, device=device),)

    def twice(device):
        return lambda x: x.exp().exp().neg(), (torch.ones(2, device=device),)

    assert script.count_case(script.Case(twice, without=once)).forward == ["exp", "neg"]


def test_it_prints_a_table_beside_that_of_another_version(script, monkeypatch, capsys, tmp_path):
    file = tmp_path / "counts.json"
    for arguments in (["--json", str(file)], ["--before", str(file), "--list"]):
        monkeypatch.setattr(sys, "argv", [SCRIPT.name, "sqrtm, eigh", *arguments])
        script.main()
    first, second = (row for row in capsys.readouterr().out.splitlines() if row.startswith("| sqrtm, eigh |"))
    numbers = first.strip("| ").split(" | ")[1:]
    assert second.strip("| ").split(" | ")[1:] == [*numbers, numbers[2], numbers[3]]
