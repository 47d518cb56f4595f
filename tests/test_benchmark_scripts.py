"""The scripts in ``benchmarks/`` still run, on tiny shapes: what they print is a table and a verdict."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

from wellcond.bench.cases import Case

FOLDER = Path(__file__).parent.parent / "benchmarks"
SCRIPTS = [
    FOLDER / f"{name}.py"
    for name in (
        "are_small_inputs_slow",
        "are_we_faster_than_autograd",
        "how_do_peers_compare",
        "how_does_it_compile",
        "how_much_does_every_norm_cost",
        "on_a_gpu",
        "remake_the_page",
        "run_all",
        "svd_gradients",
        "streaming",
        "when_do_threads_pay",
        "where_does_auto_cross_over",
        "which_interval_covers",
    )
]


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a script by its name with ``--quick`` and attributes of the module replaced; what it printed."""

    def running(name, *arguments, **replaced):
        (path,) = [path for path in SCRIPTS if path.stem == name]
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)  # for processes that get a function of it, and import it
        monkeypatch.syspath_prepend(path.parent)
        spec.loader.exec_module(module)
        for attribute, value in replaced.items():
            monkeypatch.setattr(module, attribute, value)
        monkeypatch.setattr(sys, "argv", [path.name, "--quick", *arguments])
        module.main()
        return capsys.readouterr().out

    return running


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_each_asks_a_question_and_says_how_it_is_run(path):
    text = path.read_text()
    first, *_ = text.splitlines()
    assert first.startswith('"""') and first.endswith("?")
    assert re.search(rf"^    python benchmarks/{path.stem}\.py", text, re.MULTILINE)


def test_faster_than_autograd(run, tmp_path):
    path = tmp_path / "ratios.json"
    options = ("--device", "cpu", "--ratios", str(path))
    printed = run("are_we_faster_than_autograd", *options, QUICK_SHAPES=((2, 4, 4), (2, 4, 3, 3)))
    ratios = json.loads(path.read_text())
    speeds = re.findall(r"^\| (\w+) \| ([\d×]+) \| ([\d.]+) \|", printed, re.MULTILINE)
    assert len(speeds) == 5
    for task, size, speed in speeds:  # what is twice as fast takes half the time, to the two digits shown
        assert 1 / ratios[f"{task} {size}, of eigh"] == pytest.approx(float(speed), rel=0.06)
    assert "| sqrt | 2×4×4 |" in printed and "| whitening_layer | 2×4×3×3 |" in printed
    verdicts = re.findall(r"^- .*: (-?[\d.]+) at worst \(.*\), wanted ([\d.]+): (met|missed)$", printed, re.MULTILINE)
    assert [float(wanted) for _, wanted, _ in verdicts] == [1.0, 1.7, 0.15]
    for found, wanted, verdict in verdicts:
        better = float(found) <= float(wanted) if wanted == "0.15" else float(found) >= float(wanted)
        assert verdict == ("met" if better else "missed")
    assert "iSQRT-COV, 5 steps: not measured on these shapes" in printed


def test_where_auto_crosses_over(run, tmp_path):
    path = tmp_path / "ratios.json"
    options = ("--device", "cpu", "--ratios", str(path))
    printed = run("where_does_auto_cross_over", *options, MATRIX_SHAPES=((1, 3, 3), (4, 5, 5)))
    assert all(ratio >= 1 for ratio in json.loads(path.read_text()).values())
    rows = re.findall(r"^\| (16|64|256) \| ([\d.]+) \| ([\d.]+|—) \|$", printed, re.MULTILINE)
    assert [size for size, *_ in rows] == ["16", "64", "256"] and all(float(ratio) > 0 for _, ratio, _ in rows)
    assert "| 4×5×5 | eigh |" in printed
    assert re.search(r"auto is within [\d.]+ of the best", printed)


def test_when_threads_pay(run):
    printed = run("when_do_threads_pay")
    assert "| 256 |" in printed and "times as fast in threads" in printed


def test_how_peers_compare(run):
    printed = run("how_do_peers_compare", "--device", "cpu", QUICK_CASES=(Case("polar", (2, 3, 3)),))
    assert "polar 2×3×3" in printed
    assert re.search(r"\| torch parametrizations \| [\d.]+ \| \d\.\de-\d\d \|", printed)


def test_gradients_of_the_svd(run):
    printed = run("svd_gradients", KAPPAS=(1e2,), GAPS=(None, 1e-2, 0.0))
    printed, features = printed.split("sqrt of covariances of")
    tables = printed.split("in float64")
    rows = [dict(re.findall(r"^\| ([\w:]+) \| (.*) \|$", table, re.MULTILINE)) for table in tables]
    cells = [{name: re.findall(r"(\S+) / \S+", row) for name, row in table.items()} for table in rows]
    single, double = ({name: [float(v) for v in row] for name, row in table.items() if row} for table in cells)
    assert set(single) == set(double) >= {"eigh", "svd:analytic", "svd:taylor", "svd:newton_schulz", "newton_schulz"}
    assert single["svd:analytic"][0] < 1e-4 < single["svd:analytic"][2]  # a tie up to rounding
    assert max(single["eigh"]) < 1e-4 and max(double["eigh"]) == 0
    assert double["svd:taylor"][0] < double["svd:taylor"][1]
    assert double["svd:newton_schulz"] == pytest.approx(double["newton_schulz"], rel=1e-2)  # to the digits shown
    found = dict(re.findall(r"^\| ([\w: ]+?) \| (\S+) \|", features, re.MULTILINE))
    assert float(found["factor form"]) < 1e-6 < float(found["svd:pade"]) < 0.1 < float(found["svd:truncated"])


def test_streaming(run):
    printed = run("streaming", "--workers", "1")
    assert re.search(r"^images a second: decoding alone \d+, the loader \d+$", printed, re.MULTILINE)
    ratio, verdict = re.search(r"^ratio ([\d.]+) .*: (met|missed)$", printed, re.MULTILINE).groups()
    assert verdict == ("met" if float(ratio) >= 0.9 else "missed") or ratio == "0.90"


def test_small_inputs(run, tmp_path):
    path = tmp_path / "ratios.json"
    printed = run("are_small_inputs_slow", "--ratios", str(path), "--seconds", "0", SHAPES=[(4, 4, 3, 3)])
    of_plain, iterated = re.search(
        r"^\| \(4, 4, 3, 3\) \| .* \| ([\d.]+) \| .* \| ([\d.]+) \|$", printed, re.M
    ).groups()
    assert list(json.loads(path.read_text()).values()) == pytest.approx([float(of_plain), float(iterated)], abs=0.005)


@pytest.mark.filterwarnings("ignore:.*values per channel")
def test_every_norm(run, tmp_path):
    path = tmp_path / "ratios.json"
    small = ("--device", "cpu", "--width", "4", "--batch", "4", "--size", "8", "--threads", "1", "--ratios", str(path))
    printed = run("how_much_does_every_norm_cost", *small)
    rows = re.findall(r"^\| (.+?) \| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]*) \| (.*) \|$", printed, re.MULTILINE)
    # The stem, two in each of three blocks, and those of the two shortcuts that change the shape.
    assert [(name, int(count)) for name, count, *_ in rows] == [
        ("batch norm", 0),
        ("groups of 16", 9),
        ("groups of 64", 9),
        ("IterNorm, groups of 16", 9),
        ("IterNorm, groups of 64", 9),
    ]
    ratios = json.loads(path.read_text())
    assert len(ratios) == 4
    for name, _, ms, ratio, bound, verdict in rows[1:]:
        assert float(ms) / float(rows[0][2]) == pytest.approx(ratios[f"{name}, of batch norm"], rel=0.1)
        assert float(ratio) == pytest.approx(ratios[f"{name}, of batch norm"], abs=0.006)
        wanted = re.match(r"≤ ([\d.]+): (met|missed)", verdict)
        assert (wanted is None) == (bound == "") == name.startswith("IterNorm")
        assert not bound or float(bound) >= 1
        if wanted:
            assert wanted[2] == ("met" if ratios[f"{name}, of batch norm"] <= float(wanted[1]) else "missed")


def test_how_it_compiles(run, tmp_path, fresh_compiler):
    path = tmp_path / "ratios.json"
    printed = run("how_does_it_compile", "BatchNorm2d, 2 groups", "--device", "cpu", "--ratios", str(path))
    (row,) = re.findall(r"^\| DecorrelatedBatchNorm2d, 2 groups \| (\d) \| ≤ 1 \| (\d) of 3 \|", printed, re.MULTILINE)
    assert row == ("1", "1")
    assert json.loads(path.read_text()) == {"DecorrelatedBatchNorm2d, 2 groups, graphs": 2}


def test_how_often_intervals_hold_the_mean_is_a_share_for_each_number_of_pairs(run):
    rows = [line.strip("| ").split(" | ") for line in run("which_interval_covers").splitlines()[2:]]
    assert [row[0] for row in rows] == ["3", "5", "10"]
    t, bootstrap = ([float(row[column].rstrip("%")) for row in rows] for column in (1, 2))
    assert all(75 <= share <= 100 for share in t)  # four standard errors of the twenty tables below 95
    assert all(0 < share <= 100 for share in bootstrap)
