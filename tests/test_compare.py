"""A comparison: its table is what its runs found, and what was done once is not done, or lost, again."""

from __future__ import annotations

import json
import re
import shutil
import statistics

import pytest

from small_runs import small
from test_cli import SMALL, call, one_line
from wellcond.experiments.compare import compare
from wellcond.experiments.errors import ConfigError, FolderError
from wellcond.experiments.files import read_csv
from wellcond.experiments.run.training import Classifier

LABELS = ["batch", "zca", "zca+nog"]
GRID = [*SMALL, "--treat", "none,nog", "--seeds", "2"]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished comparison: its folder, and what it printed on either stream."""
    out = tmp_path_factory.mktemp("compare") / "out"
    result = call("compare", *GRID, "--out", out)
    assert result.exit_code == 0, result.output
    return out, result.stdout, result.stderr


def snapshot(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def test_the_table_is_what_the_runs_found(done):
    """Every number recomputed from the single runs' own files."""
    out, printed, _ = done
    rows = read_csv(out / "results.csv")
    assert [row["label"] for row in rows] == LABELS
    for row in rows:
        folders = [out / "runs" / f"{row['label']}-seed{seed}" for seed in (0, 1)]
        errors = [json.loads((folder / "result.json").read_text())["test_error"] for folder in folders]
        mean, std = sum(errors) / 2, abs(errors[0] - errors[1]) / 2**0.5  # n − 1 = 1
        # Two summation orders of two numbers, and one product: a few eps64.
        assert float(row["test_error_percent_mean"]) == pytest.approx(100 * mean, rel=1e-14)
        assert float(row["test_error_percent_std"]) == pytest.approx(100 * std, rel=1e-9, abs=1e-13)
        assert float(row["test_error_percent_min"]) == 100 * min(errors)
        assert (row["data"], row["model"], row["epochs"]) == ("digits", "resnet8", "1")
        assert float(row["test_error_mean"]) == pytest.approx(mean, rel=1e-12)
        assert float(row["test_error_std"]) == pytest.approx(std, rel=1e-9, abs=1e-15)
        assert float(row["test_error_min"]) == min(errors)
        kappas = [[float(r["kappa"]) for r in read_csv(folder / "condition.csv")] for folder in folders]
        assert float(row["kappa"]) == statistics.median(statistics.median(k) for k in kappas)
        line = next(line for line in printed.splitlines() if line.split()[:1] == [row["label"]])
        assert f"{100 * mean:.2f} ± {100 * std:.2f}" in line
        assert f"{float(row['kappa']):.3g}" in line
        assert "8/8" in line
    held = json.loads((out / "results.json").read_text())
    assert len(held["runs"]) == 6
    assert [row["label"] for row in held["rows"]] == LABELS
    assert {run["environment"]["torch"] for run in held["runs"]}


def test_the_printed_table_fits_eighty_columns(done):
    _, printed, _ = done
    table = printed[printed.index("resnet8 on digits") :]
    assert "…" not in table
    assert max(len(line.rstrip()) for line in table.splitlines() if "/tmp" not in line) <= 80


def test_both_figures_are_written(done):
    out, *_ = done
    assert (out / "condition.png").read_bytes().startswith(b"\x89PNG")
    assert "zca+nog" in (out / "condition.svg").read_text()


def test_seeds_are_really_different_runs(done):
    out, *_ = done
    kappas = {(out / "runs" / f"zca-seed{seed}" / "condition.csv").read_text() for seed in (0, 1)}
    assert len(kappas) == 2


def test_an_occupied_folder_is_refused(done):
    out, *_ = done
    before = snapshot(out)
    refused = call("compare", *GRID, "--out", out)
    assert refused.exit_code == 2
    assert re.match(r"error: .*holds another comparison; go on with it by --resume, .*--overwrite", one_line(refused))
    other = call("compare", *SMALL, "--treat", "ow", "--out", out, "--resume")
    assert other.exit_code == 2
    assert "it holds batch, zca, zca+nog with 2 seeds" in one_line(other)
    wrong = call("compare", *SMALL, "--treat", "wo", "--out", out, "--overwrite")
    assert "did you mean 'ow'" in one_line(wrong)  # known before anything is deleted
    large = call("compare", *GRID, "--batch-size", "999", "--out", out, "--overwrite")
    assert "does not fit into" in one_line(large)
    assert snapshot(out) == before


def test_a_comparison_grows_and_its_old_runs_stay(done, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(done[0], out)
    before = snapshot(out / "runs")
    for options, says in {
        ("--seeds", "1"): "it holds batch, zca, zca+nog with 2 seeds",
        ("--norm", "zca"): "it holds batch, zca, zca+nog with 2 seeds",
        ("--seeds", "3", "--epochs", "2"): "epochs is 1 there, 2 was asked",
    }.items():
        refused = call("compare", *options, "--out", out, "--resume")
        assert refused.exit_code == 2
        assert says in one_line(refused)
    trained = []
    real = Classifier.training_step

    def training_step(self, batch, batch_index):
        trained.append(self.config.folder_name)
        return real(self, batch, batch_index)

    monkeypatch.setattr(Classifier, "training_step", training_step)
    assert call("compare", "--seeds", "3", "--out", out, "--resume").exit_code == 0  # all else as it is held
    assert list(dict.fromkeys(trained)) == ["batch-seed2", "zca-seed2", "zca+nog-seed2"]
    trained.clear()
    grown = call("compare", "--treat", "none,nog,olr", "--out", out, "--resume")
    assert grown.exit_code == 0, grown.output
    assert list(dict.fromkeys(trained)) == ["zca+olr-seed0", "zca+olr-seed1", "zca+olr-seed2"]
    after = snapshot(out / "runs")
    assert {path: after[path] for path in before} == before
    rows = read_csv(out / "results.csv")
    assert [(row["label"], row["seeds"]) for row in rows] == [(name, "3") for name in (*LABELS, "zca+olr")]


def test_a_treatment_that_acts_nowhere_is_refused_and_one_that_does_not_act_everywhere_is_said(done, tmp_path):
    for treats in ("nog", "none,nog+ow"):
        refused = call("compare", *SMALL, "--norm", "batch", "--treat", treats, "--out", tmp_path / "out")
        assert refused.exit_code == 2
        assert re.match(r"error: treatment 'nog.*' acts before a spectral layer, but norm 'batch'", one_line(refused))
    assert not (tmp_path / "out").exists()
    assert "batch: trained without a treatment, as there is no spectral layer to treat" in done[2]


def test_an_interrupted_comparison_goes_on_with_what_is_missing(tmp_path, monkeypatch):
    """Stopped in the second of two runs: the first is read back, not trained; the table is that of both."""
    configs = [small(epochs=1, norm="batch"), small(epochs=1)]
    trained = []
    real = Classifier.training_step

    def training_step(self, batch, batch_index):
        if stop and self.config.label == "zca" and self.global_step == 2:
            raise KeyboardInterrupt
        trained.append(self.config.label)
        return real(self, batch, batch_index)

    monkeypatch.setattr(Classifier, "training_step", training_step)
    stop = True
    with pytest.raises(KeyboardInterrupt):
        compare(configs, tmp_path / "part")
    assert trained == ["batch"] * 4 + ["zca"] * 2
    stop, trained[:] = False, []
    done = []
    resumed = compare(configs, tmp_path / "part", resume=True, finished=lambda i, r: done.append(r.config.label))
    assert trained == ["zca"] * 4
    assert done == ["batch", "zca"]
    whole = compare(configs, tmp_path / "whole")
    for one, other in zip(resumed, whole, strict=True):
        assert (one.label, one.test_error_mean, one.kappa) == (other.label, other.test_error_mean, other.kappa)


def test_a_comparison_goes_on_when_one_of_its_runs_was_made_longer(done, tmp_path):
    """Its table is still of runs of one length, and its figure has the steps of that length only."""
    out = tmp_path / "out"
    shutil.copytree(done[0], out)
    longer = out / "runs" / "zca-seed0"
    assert call("train", "--out", longer, "--resume", "--epochs", "2").exit_code == 0
    assert json.loads((longer / "result.json").read_text())["config"]["epochs"] == 2
    before = read_csv(out / "results.csv")
    again = call("compare", "--out", out, "--resume")
    assert again.exit_code == 0, again.output
    assert read_csv(out / "results.csv") == before
    assert (out / "condition.svg").read_text() == (done[0] / "condition.svg").read_text()
    assert json.loads((longer / "result.json").read_text())["config"]["epochs"] == 2  # it stays


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch):
    def training_step(self, batch, batch_index):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "training_step", training_step)
        stopped = call("compare", *SMALL, "--treat", "none", "--seeds", "1", "--out", tmp_path / "out")
    assert stopped.exit_code == 130
    assert f"go on with: wellcond compare --out {tmp_path / 'out'} --resume" in one_line(stopped)
    resumed = call("compare", "--out", tmp_path / "out", "--resume")  # what to do is held there
    assert resumed.exit_code == 0, resumed.output
    assert [row["label"] for row in read_csv(tmp_path / "out" / "results.csv")] == ["batch", "zca"]


def test_the_command_that_goes_on_has_what_was_asked(tmp_path, monkeypatch):
    def interrupted(*_, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("wellcond.experiments.compare.compare", interrupted)
    asked = ["--jobs", "2", "--executor", "ray", "--reuse", "a b", "--reuse", "c"]
    stopped = call("compare", *SMALL, *asked, "--out", tmp_path)
    assert one_line(stopped).endswith(f"--out {tmp_path} --resume --jobs 2 --executor ray --reuse 'a b' --reuse c")


def test_a_grid_with_a_solver_grows_by_seeds(tmp_path):
    """Batch norm, which comes first, takes none."""
    out = tmp_path / "out"
    assert call("compare", *SMALL, "--solver", "svd", "--treat", "none", "--seeds", "1", "--out", out).exit_code == 0
    grown = call("compare", "--resume", "--seeds", "2", "--out", out)
    assert grown.exit_code == 0, grown.output
    assert [row["seeds"] for row in read_csv(out / "results.csv")] == ["2", "2"]
    assert {path.name for path in (out / "runs").iterdir()} >= {"batch-seed1", "zca-by-svd-seed1"}


def test_what_cannot_be_resumed_is_said_of_the_runs_that_are_there(tmp_path):
    held = [small(norm="batch"), small(solver="svd")]
    saved = {"kind": "comparison", "config": {"runs": [config.to_dict() for config in held]}}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    for asked, says in {
        small(solver="svd"): "it holds batch, zca by svd with 1 seeds on digits, and 1 of these runs are not asked for",
        small(solver="eigh"): "solver is 'svd' there, 'eigh' was asked",
        small(solver="svd", lr=1.0): "lr is 0.05 there, 1.0 was asked",
    }.items():
        with pytest.raises(FolderError, match=re.escape(says)):
            compare([asked], tmp_path, resume=True)


def test_overwriting_deletes_only_what_a_comparison_made(tmp_path):
    out = tmp_path / "out"
    configs = [small(epochs=1, norm="batch"), small(epochs=1)]
    compare(configs[1:], out)
    (out / "notes.txt").write_text("mine")
    (out / "runs" / "notes.txt").write_text("mine too")
    compare(configs[:1], out, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "runs" / "notes.txt").read_text() == "mine too"
    assert not (out / "runs" / "zca-seed0" / "result.json").exists()
    assert [row["label"] for row in read_csv(out / "results.csv")] == ["batch"]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "thesis.tex").write_text("years of work")
    with pytest.raises(FolderError, match="holds files that no comparison made"):
        compare(configs, elsewhere, overwrite=True)


def test_two_spectral_layers_have_a_line_each(tmp_path):
    result = call(
        "compare", *SMALL, "--head", "gcp", "--norm", "zca", "--treat", "none", "--seeds", 1, "--out", tmp_path
    )
    assert result.exit_code == 0, result.output
    rows = read_csv(tmp_path / "results.csv")
    assert [row["label"] for row in rows] == ["zca/gcp"] * 2
    assert rows[0]["layer"] != rows[1]["layer"]
    assert all(row["layer"].removeprefix("model.") in result.stdout for row in rows)


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ([], "the grid is empty"),
        ([small(), small()], "twice"),
        ([small(), small(limit=90, seed=1)], "need the same images, and limit is 130, 90"),
    ],
    ids=["none", "twice", "two data sets"],
)
def test_a_grid_that_makes_no_sense_is_refused(configs, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        compare(configs, tmp_path / "out")
    assert not (tmp_path / "out").exists()
