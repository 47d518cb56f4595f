"""Ratios of benchmarks against an earlier file: noise is measured, what exceeds it is listed, and nothing else."""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import sys
from pathlib import Path

import pytest

from wellcond.bench.ratios import Change, add_ratios_option, changes, noise, only_in, read_values, write_ratios

FOLDER = Path(__file__).parent.parent / "benchmarks"


def test_noise_is_the_range_over_the_median():
    assert noise([1.0, 1.1, 1.2]) == pytest.approx(0.2 / 1.1)
    assert noise([3.0, 3.0, 3.0]) == 0.0


def test_slower_is_more_than_both_noises_together():
    before = {"a": {"x": [1.0, 1.1, 0.9], "y": [2.0, 2.0], "z": [1.0, 1.0]}}
    after = {"a": {"x": [1.3, 1.35, 1.4], "y": [2.02, 2.02], "z": [0.5, 0.5]}}
    by_name = {change.name: change for change in changes(before, after)}
    x = by_name["x"]
    assert (x.before, x.after) == (1.0, 1.35) and x.growth == pytest.approx(0.35)
    assert x.noise == pytest.approx(0.2 / 1.0 + 0.1 / 1.35)  # 0.274
    assert x.is_slower and not x.is_faster
    assert by_name["y"].is_slower  # a count has no noise: any growth is one
    assert by_name["z"].is_faster and not by_name["z"].is_slower
    assert [change.name for change in changes(before, after)] == ["x", "y", "z"]  # what grew most comes first


def test_a_change_and_its_reverse_are_judged_alike():
    for factor in (0.6, 0.9, 1.0, 1.2, 2.0):
        there, back = Change("s", "n", 1.0, factor, 0.3), Change("s", "n", factor, 1.0, 0.3)
        assert there.is_slower == back.is_faster and there.is_faster == back.is_slower


def test_noise_alone_is_hardly_ever_called_slower_and_a_doubling_always():
    """Three runs before and three after, of times that are 1 and an exponential delay of 10 % on the mean, as load adds
    it. Medians whose difference exceeds the sum of both ranges are rare; 400 draws, a fixed seed."""
    draw = random.Random(7)

    def runs(cost):
        return [cost * (1 + draw.expovariate(10)) for _ in range(3)]

    same = sum(changes({"s": {"n": runs(1)}}, {"s": {"n": runs(1)}})[0].is_slower for _ in range(400))
    doubled = sum(changes({"s": {"n": runs(1)}}, {"s": {"n": runs(2)}})[0].is_slower for _ in range(400))
    assert same <= 0.05 * 400
    assert doubled >= 0.95 * 400


def test_what_only_one_file_has():
    assert only_in({"a": {"x": [1.0], "y": [1.0]}, "b": {"x": [1.0]}}, {"a": {"x": [1.0]}}) == [("a", "y"), ("b", "x")]


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_a_ratio_is_positive_and_finite(bad, tmp_path):
    with pytest.raises(ValueError, match="the ratio 'speed' is"):
        write_ratios(tmp_path / "r.json", {"speed": bad})
    assert not (tmp_path / "r.json").exists()


def test_scripts_write_what_is_asked_for(tmp_path):
    parser = argparse.ArgumentParser()
    add_ratios_option(parser)
    assert parser.parse_args([]).ratios is None
    write_ratios(None, {"a": 1.0})
    path = parser.parse_args(["--ratios", str(tmp_path / "r.json")]).ratios
    write_ratios(path, {"64×64, of eigh": 0.5})
    assert json.loads(path.read_text(encoding="utf-8")) == {"64×64, of eigh": 0.5}


# -- benchmarks/run_all.py, on scripts that take no time ------------------------------------------------------------


SCRIPT = """
import json, pathlib, sys
count = pathlib.Path(__file__).with_suffix(".count")
run = int(count.read_text()) if count.exists() else 0
count.write_text(str(run + 1))
{body}
pathlib.Path(sys.argv[sys.argv.index("--ratios") + 1]).write_text(json.dumps(ratios))
"""


@pytest.fixture
def run_all(tmp_path, monkeypatch, capsys):
    """Runs the script on made ones; its exit status and what it printed."""
    spec = importlib.util.spec_from_file_location("run_all", FOLDER / "run_all.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def running(*arguments, **bodies):
        for name, body in bodies.items():
            (tmp_path / f"{name}.py").write_text(SCRIPT.format(body=body))
        monkeypatch.setattr(module, "HERE", tmp_path)
        monkeypatch.setattr(module, "SCRIPTS", tuple(bodies))
        monkeypatch.setattr(module, "ARGUMENTS", {})
        monkeypatch.setattr(sys, "argv", ["run_all.py", *map(str, arguments)])
        try:
            module.main()
        except SystemExit as ended:
            return ended.code, capsys.readouterr()
        return 0, capsys.readouterr()

    return running


def test_every_script_runs_as_often_as_asked_and_leaves_medians_and_noise(run_all, tmp_path):
    out = tmp_path / "out.json"
    status, _ = run_all("--out", out, "--runs", 3, "--quick", a="ratios = {'x': [1.0, 1.5, 1.2][run]}")
    assert status == 0
    everything, values = read_values(out)
    assert values == {"a": {"x": [1.0, 1.5, 1.2]}}
    assert everything["scripts"]["a"]["ratios"]["x"]["ratio"] == 1.2
    assert everything["scripts"]["a"]["ratios"]["x"]["noise"] == pytest.approx(0.5 / 1.2)
    assert everything["quick"] is True and everything["environment"]["threads"] == "1"


def test_it_goes_on_after_a_stop_and_after_a_script_that_fails(run_all, tmp_path):
    out = tmp_path / "out.json"
    status, printed = run_all("--out", out, "--runs", 2, bad="raise SystemExit('no\\nluck')", b="ratios = {'x': 1.0}")
    assert status == 1 and "bad: luck" in printed.out
    everything, values = read_values(out)
    assert values == {"bad": {}, "b": {"x": [1.0, 1.0]}}
    assert everything["scripts"]["bad"]["failures"] == ["luck", "luck"]
    stopped = json.loads(out.read_text())
    stopped["scripts"]["b"] = {"runs": 1, "failures": [], "ratios": {"x": {"runs": [1.0], "ratio": 1.0, "noise": 0.0}}}
    out.write_text(json.dumps(stopped))
    run_all("--out", out, "--runs", 2, "--resume", b="ratios = {'x': 3.0}")
    assert read_values(out)[1]["b"]["x"] == [1.0, 3.0]


def test_the_list_of_what_is_slower(run_all, tmp_path):
    def file(name, **ratios):
        path = tmp_path / name
        scripts = {"s": {"runs": 2, "failures": [], "ratios": {key: {"runs": v} for key, v in ratios.items()}}}
        path.write_text(json.dumps({"format": 1, "quick": False, "environment": {"torch": name}, "scripts": scripts}))
        return path

    before = file("before", slow=[1.0, 1.02], noisy=[1.0, 1.5], fast=[2.0, 2.0], gone=[1.0, 1.0])
    after = file("after", slow=[1.3, 1.32], noisy=[1.3, 1.6], fast=[1.0, 1.0], new=[1.0, 1.0])
    status, printed = run_all("--compare", before, after)
    assert status == 1
    assert "1 of 3 ratios are slower" in printed.out and "1 of 3 ratios are faster" in printed.out
    assert "| s | slow | 1.01 | 1.31 | +30% | 4% |" in printed.out
    assert "noisy" not in printed.out
    assert "no longer measured: s: gone" in printed.out and "new: s: new" in printed.out
    assert "note: torch was before and is after" in printed.out
    assert run_all("--compare", before, before)[0] == 0


def test_what_cannot_be_compared_is_refused(run_all, tmp_path):
    other = tmp_path / "other.json"
    other.write_text("{}")
    status, printed = run_all("--compare", other, other)
    assert status == 2 and "was not written by" in printed.err
    status, printed = run_all("--out", tmp_path / "new.json", "--against", tmp_path / "none.json")
    assert status == 2 and "none.json" in printed.err  # before anything is measured
    status, printed = run_all("--out", tmp_path / "new.json", "--runs", 1)
    assert status == 2 and "at least 2" in printed.err
    status, printed = run_all("--out", other)
    assert status == 2 and "exists" in printed.err
