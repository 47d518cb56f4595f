"""``benchmarks/on_a_gpu.py`` runs whole on the CPU at tiny shapes, and what it derives from its rows is right."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from wellcond.bench.gauges import Time, host_waits

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "on_a_gpu.py"
CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("on_a_gpu", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def results(script, tmp_path):
    """Begun results of tiny shapes, with made peaks."""
    found = script.Results(tmp_path)
    peaks = {"float32": 1e12, "tf32": 2e12, "bfloat16": 4e12}
    found.data |= {"machine": {"device": "cpu", "peak_flops_per_second": peaks}, "tiny": True}
    found.save()
    return found


def rows_of(script, results, name, seconds=600.0):
    script.run_section(name, results, CPU, seconds)
    saved = script.Results(results.path.parent)  # from the file
    return saved.data["sections"][name]["rows"], saved.data["sections"][name]


def test_norms_beside_batch_norm(script, results):
    rows, section = rows_of(script, results, "norms")
    assert section["state"] == "done" and not [row for row in rows if "failure" in row]
    by = {(row["precision"], row["layer"]): row for row in rows}
    assert len(by) == 9 + 9 + 6
    for how in script.PRECISIONS:
        reference = by[how, "batch norm"]
        for layer in ("batch norm", "decorrelated", "IterNorm", "covariance head"):
            row = by[how, layer]
            assert row["of batch norm"] == pytest.approx(row["ms"] / reference["ms"])
            assert row["forward ms"] > 0 and row["peak memory / input"] > 0
    assert torch.backends.cudnn.allow_tf32 is True and torch.get_float32_matmul_precision() == "highest"


def test_solvers_their_errors_and_their_share_of_the_peak(script, results):
    rows, section = rows_of(script, results, "solvers")
    assert section["state"] == "done" and not [row for row in rows if "failure" in row]
    for row in rows:
        if row["solver"] in ("eigh", "svd", "auto", script.REFERENCE):
            # κ = 1e4: the root loses √κ of the digits of float32, its inverse κ.
            assert row["error"] < 1e-5 if row["function"] == "sqrt" else row["error"] < 1e-2
        if row["solver"] == script.ISQRT:
            assert row["error"] > 1e-3  # five steps are no root there
        if "FLOP/s" in row:
            peak = results.data["machine"]["peak_flops_per_second"][row["precision"]]
            assert row["share of the peak"] == pytest.approx(row["FLOP/s"] / peak)
    of = {row["solver"]: row for row in rows if (row["size"], row["batch"], row["precision"]) == (4, 3, "float32")}
    assert of["eigh"]["times as fast as autograd"] == pytest.approx(of[script.REFERENCE]["ms"] / of["eigh"]["ms"])
    # The published iteration multiplies 3 times a step, and twice as often backward: 5 · 3 · 3 products of 2 · 4³ · 3,
    # less what the first and last steps need not.
    operations = of[script.ISQRT]["FLOP/s"] * of[script.ISQRT]["ms"] / 1e3
    assert 0.6 * 45 * 384 <= operations <= 45 * 384
    assert {row["takes"] for row in rows if row["solver"] == "auto"} == {"eigh"}
    assert "### Crossovers" in results.page.read_text()


def test_steps_treated_and_not(script, results):
    rows, section = rows_of(script, results, "steps")
    assert section["state"] == "done" and not [row for row in rows if "failure" in row]
    by = {(row["precision"], row["network"], row["treatments"]): row for row in rows}
    assert len(by) == len(rows) == (8 + 5) + 8 + 8
    treated, plain = (by["float32", "decorrelated first norm", names] for names in ("nog+ow+olr", "none"))
    assert treated["of the untreated"] == pytest.approx(treated["ms"] / plain["ms"])
    assert plain["of the untreated"] is None and plain["peak memory, MiB"] > 0


def test_graphs_and_waits_say_what_they_are_missing_without_cuda(script, results):
    rows, section = rows_of(script, results, "graphs")
    assert section["state"] == "done"
    assert {row["failure"] for row in rows} == {"no graphs on cpu"}  # the steps themselves ran
    rows, section = rows_of(script, results, "waits")
    assert section["state"] == "done"
    assert all(row["host waits"] is None and "failure" not in row for row in rows)
    assert {"DecorrelatedBatchNorm2d", "sqrtm, eigh", "step, batch norm"} <= {row["what"] for row in rows}


def test_a_section_that_ran_out_of_time_goes_on_where_it_was(script, results, monkeypatch):
    measured = []
    monkeypatch.setattr(script, "host_waits", lambda call, device: measured.append(call) or 3)
    monkeypatch.setattr(script, "steps_of", lambda how: [("batch norm", "")])
    _, section = rows_of(script, results, "waits", seconds=-1.0)
    assert section["state"] == "out of time" and section["rows"] == []
    assert "waits sqrtm, eigh" in section["no time for"]
    rows, _ = rows_of(script, results, "waits")
    count = len(measured)
    assert count == len(rows) > 5 and all(row["host waits"] == 3 for row in rows)
    rows, section = rows_of(script, results, "waits")
    assert len(measured) == count == len(rows) and section["no time for"] == []
    assert "| sqrtm, eigh | 3 |" in results.page.read_text()


def test_times_of_slow_and_failing_calls(script, monkeypatch):
    def broken():
        raise RuntimeError("no kernel\nfor this")

    work = script.Work(CPU, True, time.monotonic() + 60, lambda rows: None)
    found = work.times({"fast": lambda: None, "slow": lambda: time.sleep(0.02), "broken": broken})
    assert list(found) == ["fast", "slow", "broken"]
    assert found["broken"] == "RuntimeError: no kernel"
    assert found["slow"].timings == 2 and found["slow"].minimum >= 0.02
    monkeypatch.setattr(script, "SLOW", 0.01)
    assert work.times({"slow": lambda: time.sleep(0.02)})["slow"].timings == 1
    assert script.over(Time(3.0, 3.0, 1), Time(2.0, 2.0, 1)) == 1.5
    assert script.over("failed", Time(2.0, 2.0, 1)) is None


def test_crossovers_by_hand(script):
    def cell(batch, eigh, products, auto, takes, size=64):
        base = {"function": "sqrt", "precision": "float32", "size": size, "batch": batch}
        rows = {"eigh": eigh, "minimax_or_eigh": products, "auto": auto}
        return [{**base, "solver": s, "ms": t} | ({"takes": takes} if s == "auto" else {}) for s, t in rows.items()]

    rows = [
        *cell(1, 1.0, 2.0, 1.0, "eigh"),
        *cell(8, 4.0, 3.0, 4.1, "eigh"),  # auto loses 4/3 here, not 4.1/3: the rest is noise
        *cell(64, 32.0, 4.0, 4.0, "minimax_or_eigh"),
        *cell(1, 1.0, 0.5, 1.0, "eigh", size=32),
        *cell(8, 1.0, 2.0, 1.0, "eigh", size=32),
        {"function": "sqrt", "precision": "tf32", "size": 16, "batch": 1, "solver": "eigh", "ms": 1.0},
    ]
    small, large = script.crossovers(rows)
    assert (large["size"], large["batches"]) == (64, "1 8 64")
    assert large["eigh / products"] == "0.5 1.3 8"
    assert large["products are faster from batch"] == 8 and large["auto takes them from batch"] == 64
    assert large["auto / best, worst"] == pytest.approx(4 / 3) and large["at batch"] == 8
    # Faster at batch 1 alone: there is no batch from which on they are.
    assert small["products are faster from batch"] is None and small["auto takes them from batch"] is None
    assert small["auto / best, worst"] == pytest.approx(2.0) and small["at batch"] == 1


def test_a_table_of_uneven_rows(script):
    text = script.table([{"a": 1.23456, "b": "x|y"}, {"c": None, "a": 2}])
    assert text.splitlines() == ["| a | b | c |", "| --- | --- | --- |", "| 1.23 | x\\|y | — |", "| 2 | — | — |"]
    assert script.table([]) == ""


def test_the_command_survives_a_section_that_hangs_and_one_that_crashes(script, tmp_path, monkeypatch, capsys):
    """Its processes are replaced; what they wrote before they ended stays."""
    limits = {}

    def process(command, timeout):
        name = command[command.index("--section") + 1]
        limits[name] = float(command[command.index("--seconds") + 1]), timeout
        found = script.Results(tmp_path)
        found.section(name)["rows"].append({"what": name, "function": "none"})
        found.section(name)["state"] = "begun" if name != "steps" else "done"
        found.save()
        if name == "norms":
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, 139 if name == "solvers" else 0)

    monkeypatch.setattr(script.subprocess, "run", process)
    argv = ["on_a_gpu.py", "--out", str(tmp_path), "--device", "cpu", "--tiny", "--only", "norms", "solvers", "steps"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 1
    saved = json.loads((tmp_path / "on_a_gpu.json").read_text())
    states = {name: section["state"] for name, section in saved["sections"].items()}
    assert states == {"norms": "stopped at its time limit", "solvers": "ended with status 139", "steps": "done"}
    assert all(section["rows"] == [{"what": name, "function": "none"}] for name, section in saved["sections"].items())
    # The last one may have all that is left, less the start of its process.
    assert limits["steps"][0] == pytest.approx(8.3 * 60 - script.OVERHEAD, abs=30)
    assert sum(seconds for seconds, _ in list(limits.values())[:1]) < 0.5 * 8.3 * 60
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 2 and "--resume" in capsys.readouterr().err


def test_one_section_as_a_process(tmp_path):
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path), "--device", "cpu", "--tiny", "--only", "graphs"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "graphs: done, 10 rows" in done.stdout
    assert "float32: " in (tmp_path / "on_a_gpu.md").read_text()


def test_host_waits_are_counted_by_what_cuda_warns_of(monkeypatch):
    """CUDA's own mode is replaced by one that is on between the two calls that set it."""
    mode = [0]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: mode[0])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda value: mode.__setitem__(0, value))

    def call():
        for _ in range(3):
            if mode[0] == "warn":
                warnings.warn("called a synchronizing CUDA operation (Triggered internally at x)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    assert host_waits(call, torch.device("cuda")) == 3
    assert mode[0] == 0
    with pytest.raises(RuntimeError):
        host_waits(lambda: (_ for _ in ()).throw(RuntimeError), torch.device("cuda"))
    assert mode[0] == 0  # also after an error
    assert host_waits(call, CPU) is None
