"""``wellcond bench``: it runs to the end, its errors and bytes are what they say, and it says clearly what is wrong."""

from __future__ import annotations

import json
import sys

import pytest
import torch

import test_cli
import wellcond.linalg as wl
from helpers import eps_of, geometric, mp_derivative, mp_function, with_spectrum
from wellcond.bench import contestants as who
from wellcond.bench import report
from wellcond.bench.cases import TASKS, Case, cases, make_input, parse_shapes
from wellcond.bench.contestants import AUTO, REFERENCE, Contestant, contestants
from wellcond.bench.gauges import count_operations, peak_bytes, saved_bytes, seconds_of, take_turns
from wellcond.bench.measure import measure_case
from wellcond.bench.references import (
    exact_function,
    exact_root,
    ground_truth_errors,
    relative_error,
    root_by_eigh,
)

CPU = torch.device("cpu")
SMALL = ["--shapes", "2x4x4,2x4x3x3", "--seconds", "0"]


def call(*arguments):
    return test_cli.call("bench", *arguments)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The command on two tiny shapes, once for all tests that look at what it left."""
    out = tmp_path_factory.mktemp("bench") / "out"
    result = call(*SMALL, "--out", out)
    assert result.exit_code == 0, result.output
    return out, result, json.loads((out / "bench.json").read_text())


def test_it_runs_to_the_end_and_leaves_its_files(small):
    out, result, _ = small
    assert sorted(path.name for path in out.iterdir()) == [
        "bench.json",
        "config.json",
        "speed.png",
        "speed.svg",
        "tables.md",
    ]
    assert (out / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert "decorrelated batch norm" in (out / "speed.svg").read_text()
    assert f"[{len(TASKS)}/{len(TASKS)}]" in result.stdout
    for name in (REFERENCE, f"{AUTO}, pade", "iSQRT-COV, 5 steps"):
        assert name in result.stdout
        assert name in (out / "tables.md").read_text()


def test_the_file_holds_everything(small):
    _, _, found = small
    assert set(found) == {"environment", "config", "missing_peers", "truth_against_mpmath", "results"}
    assert found["environment"]["torch"] == torch.__version__
    assert found["environment"]["threads"] == str(torch.get_num_threads())
    assert [result["task"] for result in found["results"]] == list(TASKS)
    for result in found["results"]:
        rows = {row["name"]: row for row in result["rows"]}
        solvers = {f"{AUTO}, {name}" for name in wl.SOLVERS} if result["task"] != "polar" else set()
        assert {REFERENCE, "autograd through svd", "iSQRT-COV, 5 steps", AUTO} | solvers <= set(rows)
        for row in rows.values():
            if row["failure"]:
                continue
            assert 0 < row["forward"]["minimum"] <= row["forward"]["median"]
            assert row["both"]["timings"] >= 3
            assert row["saved"] >= 0 and row["peak"] > 0
        ratio = rows[REFERENCE]["both"]["minimum"] / rows[AUTO]["both"]["minimum"]
        assert rows[AUTO]["faster_both"] == pytest.approx(ratio)
        # The reference's error is bounded by rounding: κ = 1e4, and autograd divides by the gaps of eigenvalues.
        assert rows[AUTO]["error"] < 10 * eps_of(torch.float32) * 1e4
        limits = result["limits"]
        if result["task"] != "polar":
            least = min(limits[name]["minimum"] for name in limits if name.startswith("eigh"))
            bound = least + limits["five products alone"]["minimum"]
            assert result["overhead_over_limit"] == pytest.approx(rows[AUTO]["both"]["minimum"] / bound - 1)


def test_an_occupied_folder_is_refused_and_overwritten_on_request(small):
    out, _, before = small
    refused = call(*SMALL, "--out", out)
    assert refused.exit_code == 2
    assert "holds another benchmark; delete it by --overwrite, or choose another --out" in test_cli.one_line(refused)
    assert json.loads((out / "bench.json").read_text()) == before
    (out / "mine.txt").write_text("kept")
    again = call("--shapes", "1x3x3", "--task", "sqrt", "--seconds", "0", "--out", out, "--overwrite")
    assert again.exit_code == 0, again.output
    assert [r["shape"] for r in json.loads((out / "bench.json").read_text())["results"]] == [[1, 3, 3]]
    assert (out / "mine.txt").read_text() == "kept"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--shapes", "128x64"], "shape '128x64' is neither batch x d x d"),
        (["--shapes", "2x4x5"], "shape '2x4x5' is neither"),
        (["--shapes", "0x4x4"], "all positive"),
        (["--shapes", "2x4x4,big"], "shape 'big' is not of the form 128x64x64"),
        (["--task", "sqrtt"], "unknown task 'sqrtt'; did you mean 'sqrt'?"),
        (["--task", "pooling_layer", "--shapes", "2x4x4"], "none of the shapes is for pooling_layer"),
        (["--dtype", "float16"], "unknown dtype 'float16'; did you mean 'float64'? (known: float32, float64)"),
        (["--device", "gpu"], "unknown device 'gpu'; give cpu or cuda"),
        (["--device", "cuda:99"], "PyTorch finds"),
        (["--device", "meta"], "device 'meta' is not supported"),
        (["--seconds", "-1"], "seconds must not be negative"),
        (["--threads", "0"], "threads must be at least 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_wrong_option_is_one_line_and_writes_nothing(options, says, tmp_path):
    result = call("--seconds", "0", *options, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert says in test_cli.one_line(result)
    assert not (tmp_path / "out").exists()


def test_missing_peers_are_named(monkeypatch):
    for module in ("spd_learn", "kornia"):
        monkeypatch.setitem(sys.modules, module, None)
        for loaded in [name for name in sys.modules if name.startswith(f"{module}.")]:
            monkeypatch.delitem(sys.modules, loaded)
    missing = who.missing_peers()
    assert missing["spd-learn"].startswith("not installed (no module 'spd_learn")
    assert missing["kornia"].startswith("not installed (no module 'kornia")
    assert "torch.optim.Muon" not in missing or not hasattr(torch.optim, "Muon")
    lines = report.remarks([], missing, {})
    assert f"spd-learn: {missing['spd-learn']}" in lines


def test_a_peer_at_hand_takes_part(monkeypatch):
    """A stand-in for a package that need not be installed: what it offers is called, and its error measured."""

    class Module:
        matrix_sqrth = staticmethod(lambda P: 1.5 * root_by_eigh(P, 0.5))

    real = who._import
    monkeypatch.setattr(who, "_import", lambda name: Module if name.endswith("matrix_sqrth") else real(name))
    row = measure_case(Case("sqrt", (2, 3, 3)), torch.float64, CPU, seconds=0.0)["torch.linalg.matrix_sqrth"]
    assert row.error == pytest.approx(0.5)
    assert row.gradient_error == pytest.approx(0.5)


def test_one_that_fails_does_not_stop_the_others(monkeypatch):
    def no_forward(X):
        raise RuntimeError("it broke\nin two lines")

    def no_gradient(X):
        return root_by_eigh(X.detach(), 0.5)

    plain = [Contestant(REFERENCE, lambda P: root_by_eigh(P, 0.5)), Contestant(AUTO, wl.sqrtm, ours=True)]
    broken = [Contestant("broken", no_forward), Contestant("flat", no_gradient)]
    monkeypatch.setattr("wellcond.bench.measure.contestants", lambda *_: [*broken, *plain])
    result = measure_case(Case("sqrt", (2, 3, 3)), torch.float64, CPU, seconds=0.0)
    assert result["broken"].failure == "RuntimeError: it broke" and result["broken"].forward is None
    assert result["flat"].failure.startswith("no gradient: ") and result["flat"].forward is not None
    assert result["flat"].both is None and result["flat"].error < 1e-12
    assert result[AUTO].both is not None
    assert "broken on sqrt 2×3×3: RuntimeError: it broke" in report.remarks([result], {}, {})
    assert report.ratio_table([result]).rows[:2] == [["broken", "—"], ["flat", "—"]]


# ------------------------------------------------------------------------------------------- is the measure right


@pytest.mark.parametrize("power", [0.5, -0.5])
def test_the_truth_is_that_of_fifty_digits(power):
    """κ = 1e4 in double precision: eps κ for the inverse root, and κ^{1/2} more for its gradient."""
    P = with_spectrum(geometric(5, 1e4))[None].requires_grad_()
    G = torch.randn(1, 5, 5, dtype=torch.float64)
    out = exact_root(P, power)
    (grad,) = torch.autograd.grad(out, P, G)
    truth = mp_function(P[0].detach(), lambda x: x**power)
    assert relative_error(out, truth[None]) < 10 * eps_of(torch.float64) * 1e4
    truth = mp_derivative(P[0].detach(), G[0], lambda x: x**power)
    assert relative_error(grad, truth[None]) < 10 * eps_of(torch.float64) * 1e6


def test_the_truth_is_checked_in_the_output(small):
    _, result, found = small
    assert found["truth_against_mpmath"] == ground_truth_errors()
    # κ = 1e4, double precision, times ten.
    assert found["truth_against_mpmath"]["float64"] < 10 * eps_of(torch.float64) * 1e2
    assert "float64 against mpmath at 50 digits" in result.stdout


def test_the_relative_error_is_the_worst_of_the_batch():
    truth = torch.tensor([[[3.0, 0.0], [0.0, 4.0]], [[1.0, 0.0], [0.0, 0.0]]], dtype=torch.float64)
    got = truth.clone()
    got[0, 0, 1], got[1, 1, 1] = 1.0, 0.5
    assert relative_error(got, truth) == pytest.approx(0.5)  # 1/5 and 0.5/1
    assert relative_error(torch.full_like(truth, torch.nan), truth) == float("inf")


@pytest.mark.parametrize("task", TASKS)
def test_every_exact_contestant_computes_the_function(task):
    """In double precision the ways through eigh and svd and our exact solvers agree with the truth; the input has
    κ = 1e4 and gaps of eigenvalues of 1e-4 at least, through which the plain gradients divide."""
    case = Case(task, (2, 4, 4) if task in ("sqrt", "invsqrt", "polar") else (3, 4, 5, 5))
    result = measure_case(case, torch.float64, CPU, seconds=0.0)
    exact = [REFERENCE, "autograd through svd", AUTO]
    exact += [f"{AUTO}, {name}" for name in ("eigh", "svd", "minimax_or_eigh") if task != "polar"]
    for name in exact:
        assert result[name].failure == ""
        assert result[name].error < 1e-9
        assert result[name].gradient_error < 1e-6
    if task != "polar":
        # Five steps are no root at κ = 1e4, which the table has to show (mathematics: 17 % and more).
        assert result["iSQRT-COV, 5 steps"].error > 0.01 or task == "whitening_layer"


def test_pooling_agrees_with_the_published_layer_where_that_converges():
    """Well conditioned features: the iteration converges, and its triangle has the order of ours."""
    case = Case("pooling_layer", (2, 3, 20, 20))
    X = torch.randn(case.shape, dtype=torch.float64)
    outs = {c.name: c.f(X) for c in contestants(case, torch.float64, CPU)}
    truth = exact_function(case)(X)
    assert relative_error(outs[AUTO], truth) < 1e-12
    assert relative_error(outs["iSQRT-COV, 5 steps"], truth) < 1e-2


def test_saved_bytes_counts_each_storage_once_and_the_input_not():
    X = torch.randn(2, 8, 8)
    one = X.numel() * X.element_size()
    assert saved_bytes(lambda X: X * 2, X) == 0
    assert saved_bytes(lambda X: X * X, X) == 0  # the input, twice
    assert saved_bytes(torch.exp, X) == one  # its own output
    assert saved_bytes(lambda X: (Y := torch.exp(X)) * Y.mT, X) == one  # a view of the same
    assert saved_bytes(lambda X: torch.exp(torch.exp(X)), X) == 2 * one
    layer = torch.nn.Linear(8, 8)
    assert saved_bytes(layer, X) == 0  # the input and the weight


def test_peak_bytes_sees_what_is_allocated_and_freed():
    size = 1 << 20

    def call(count):
        parts = [torch.empty(size, dtype=torch.uint8) for _ in range(count)]
        del parts
        return torch.empty(size // 2, dtype=torch.uint8)

    for count in (1, 3):
        # Allocators align, by 64 bytes a block.
        assert count * size <= peak_bytes(lambda count=count: call(count), CPU) < count * size + 4096


def test_operations_are_those_of_the_products():
    """2 m k n each; the gradient of A B is two products more."""
    A, B = torch.randn(3, 4, 5, requires_grad=True), torch.randn(3, 5, 6, requires_grad=True)
    assert count_operations(lambda: A @ B) == 3 * 2 * 4 * 5 * 6
    assert count_operations(lambda: torch.autograd.grad((A @ B).sum(), (A, B))) == 3 * 3 * 2 * 4 * 5 * 6


def test_timing_repeats_fast_calls_and_takes_turns():
    counts = {"a": 0, "b": 0}

    def count(name):
        counts[name] += 1

    times = take_turns({name: lambda name=name: count(name) for name in counts}, CPU, seconds=0.0, rounds=(4, 9))
    assert [time.timings for time in times.values()] == [4, 4]
    assert counts["a"] == counts["b"] == 1 + 4 * 50  # far below the shortest timing: repeated as often as allowed
    assert all(0 < time.minimum <= time.median for time in times.values())
    assert take_turns({"a": lambda: None}, CPU, seconds=60.0, rounds=(1, 2))["a"].timings == 2
    assert seconds_of(lambda: None, CPU, 3) > 0


# --------------------------------------------------------------------------------------------------------- cases


def test_inputs_are_what_they_say():
    P = make_input(Case("sqrt", (3, 8, 8)), torch.float64, CPU)
    assert torch.equal(P, P.mT)
    assert torch.linalg.cond(P).tolist() == pytest.approx([1e4] * 3, rel=1e-8)
    G = make_input(Case("polar", (3, 8, 8)), torch.float64, CPU)
    assert torch.linalg.cond(G).tolist() == pytest.approx([1e2] * 3, rel=1e-8)
    assert make_input(Case("pooling_layer", (2, 4, 3, 5)), torch.float32, CPU).shape == (2, 4, 3, 5)


def test_cases_pair_tasks_with_the_shapes_they_take():
    shapes = parse_shapes("2x4x4, 3×5×2×2,2x4x4")
    assert shapes == ((2, 4, 4), (3, 5, 2, 2))
    found = cases(["sqrt", "whitening_layer"], shapes)
    assert [(case.task, case.shape) for case in found] == [("sqrt", (2, 4, 4)), ("whitening_layer", (3, 5, 2, 2))]
    assert found[1].samples == 12
    assert Case("pooling_layer", (3, 5, 2, 2)).samples == 4


def test_every_solver_is_a_contestant_and_none_warns(recwarn):
    for contestant in contestants(Case("sqrt", (2, 6, 6)), torch.float32, CPU):
        if contestant.ours:
            contestant.f(make_input(Case("sqrt", (2, 6, 6)), torch.float32, CPU))
    assert [str(w.message) for w in recwarn if issubclass(w.category, wl.ApproximateRootWarning)] == []
    names = [c.name for c in contestants(Case("sqrt", (1, 2, 2)), torch.float32, CPU)]
    assert [f"{AUTO}, {name}" for name in wl.SOLVERS] == [name for name in names if name.startswith(f"{AUTO}, ")]
