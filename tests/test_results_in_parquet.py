"""Results as Parquet: what pandas and polars read is what the runs left, and the runs can be had back from it alone."""

from __future__ import annotations

import logging
import math
import shutil
from dataclasses import replace

import pandas as pd
import pyarrow.parquet as pq
import pytest

import wellcond
from small_runs import full_disk_after, small
from test_cli import call, one_line
from wellcond.experiments.compare import compare
from wellcond.experiments.errors import FolderError, RunError
from wellcond.experiments.files import read_csv, write_json
from wellcond.experiments.folders import read_config
from wellcond.experiments.report import report
from wellcond.experiments.results.experiment import Experiment
from wellcond.experiments.results.parquet import ResultTables, read_comparison, read_results
from wellcond.experiments.results.summary import SHORT, configs_in
from wellcond.experiments.run.config import RunConfig
from wellcond.experiments.run.result import load_result
from wellcond.experiments.run.training import Classifier

GRID = [small(epochs=2, norm="batch"), *(small(epochs=2, head="gcp", seed=seed) for seed in range(2))]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Of runs with one observed layer and with two."""
    out = tmp_path_factory.mktemp("parquet") / "out"
    compare(GRID, out)
    return out


@pytest.fixture
def alone(done, tmp_path):
    """A folder with the mark of the comparison and its tables, and nothing of its runs."""
    out = tmp_path / "alone"
    out.mkdir()
    for name in ("config.json", "results.parquet", "condition.parquet"):
        shutil.copy(done / name, out / name)
    return out


def no_training(monkeypatch):
    monkeypatch.setattr(Classifier, "training_step", lambda *_: pytest.fail("trained again"))


def test_every_result_comes_back_with_every_digit(done, tmp_path):
    folders = [done / "runs" / config.folder_name for config in GRID]
    held = [load_result(folder) for folder in folders]
    assert read_results(done) == read_results(done / "results.parquet") == held
    odd = replace(
        held[0],
        folder=str(tmp_path / "runs" / "odd"),
        test_loss=math.inf,
        conditions=(replace(held[0].conditions[0], kappa=math.inf, effective_rank=1 / 3),),
        environment={"torch": "x"},
        config=replace(held[0].config, limit=None, lr=0.1 + 0.2, data="päth/ß"),
    )
    (tmp_path / "runs" / "odd").mkdir(parents=True)
    ResultTables(tmp_path, SHORT).write([odd, replace(held[1], folder=str(tmp_path / "runs" / "other"))])
    assert read_results(tmp_path)[0] == odd


def test_a_row_has_the_configuration_the_machine_and_the_numbers_of_a_run(done):
    """Each against the run's own file, by name and unit."""
    table = pd.read_parquet(done / "results.parquet")
    assert len(table) == len(GRID)
    for row, config in zip(table.to_dict("records"), GRID, strict=True):
        result = load_result(done / "runs" / config.folder_name)
        assert row["label"] == config.label and row["folder"] == f"runs/{config.folder_name}"
        for name, value in config.to_dict().items():
            assert row[name] == value or (value is None and pd.isna(row[name]))
        assert row["test_error_percent"] == 100 * result.test_error
        assert row["best_val_error_percent"] == 100 * (1 - result.best_val_accuracy)
        assert row["training_seconds"] == result.seconds
        assert row["kappa"] == result.conditions[0].kappa and row["layer"] == result.conditions[0].layer
        assert [layer["kappa"] for layer in row["layers"]] == [condition.kappa for condition in result.conditions]
        assert row["environment_wellcond"] == wellcond.__version__
        assert row["environment_threads"] == 1 and row["environment_cores"] >= 1 and row["environment_cpu"]
    units = {field.name: field.metadata[b"unit"] for field in pq.read_schema(done / "results.parquet")}
    assert units["test_error_percent"] == b"percent" and units["test_error_fraction"] == b"fraction"
    assert units["training_seconds"] == b"s" and units["kappa"] == b"1"


def test_the_records_are_those_of_the_runs(done):
    table = pd.read_parquet(done / "condition.parquet")
    for config in GRID:
        rows = read_csv(done / "runs" / config.folder_name / "condition.csv")
        found = table[table.folder == f"runs/{config.folder_name}"]
        assert (found.label == config.label).all() and (found.seed == config.seed).all()
        for name in ("step", "kappa", "kappa_eps", "effective_rank", "numerical_rank", "eig_min", "failures"):
            assert found[name].tolist() == [float(row[name]) for row in rows]
        assert found.layer.tolist() == [row["layer"] for row in rows]
    assert str(table.dtypes["step"]) == str(table.dtypes["numerical_rank"]) == "int64"


def test_polars_reads_both(done):
    pl = pytest.importorskip("polars")
    runs, records = (pl.read_parquet(done / f"{name}.parquet") for name in ("results", "condition"))
    assert runs["label"].to_list() == [config.label for config in GRID]
    assert runs["layers"].list.len().to_list() == [1, 2, 2]
    most = records.group_by("folder").agg(pl.col("kappa").max()).join(runs.select("folder", "seed"), on="folder")
    assert len(most) == len(GRID)


def test_an_interrupted_comparison_has_in_its_tables_what_has_finished(tmp_path, monkeypatch):
    real = Classifier.training_step

    def training_step(self, batch, batch_index):
        if self.config.norm == "zca":
            raise KeyboardInterrupt
        return real(self, batch, batch_index)

    monkeypatch.setattr(Classifier, "training_step", training_step)
    with pytest.raises(KeyboardInterrupt):
        compare(GRID, tmp_path)
    assert [result.config.label for result in read_results(tmp_path)] == ["batch"]
    assert set(pd.read_parquet(tmp_path / "condition.parquet").label) == {"batch"}


def test_what_the_table_has_is_not_trained_again(done, alone, monkeypatch):
    """Nothing but the tables and the mark is left: table and figure are the same, and the tables stay whole."""
    no_training(monkeypatch)
    told = []
    compare(GRID, alone, resume=True, finished=lambda index, result: told.append(index))
    assert told == [0, 1, 2]
    assert (alone / "results.csv").read_bytes() == (done / "results.csv").read_bytes()
    assert (alone / "condition.svg").read_bytes() == (done / "condition.svg").read_bytes()
    for name in ("results", "condition"):
        one, other = (pd.read_parquet(folder / f"{name}.parquet") for folder in (done, alone))
        assert one.astype(str).equals(other.astype(str))
    assert not (alone / "runs").exists()


def test_a_report_needs_the_tables_only(done, alone, tmp_path):
    _, notes = report([alone / "results.parquet"], tmp_path / "report")
    report([done], tmp_path / "whole")
    assert notes == []
    one, other = ((tmp_path / name / "report.html").read_text() for name in ("report", "whole"))
    tables = [text[text.index("<table") : text.index("</table>")] for text in (one, other)]
    assert tables[0] == tables[1]  # of the configurations
    texts = [(tmp_path / name / "report.md").read_text().split("![")[0] for name in ("report", "whole")]
    assert texts[0] == texts[1]  # title, rows and differences
    held = read_comparison(alone / "results.parquet")
    assert held is not None
    experiment = Experiment.from_dict(held["experiment"], configs_in(held))
    marked = read_config(done, "comparison")
    assert experiment == Experiment.from_dict(marked["experiment"], configs_in(marked))
    assert experiment.against  # the baseline of a row, which the columns do not have
    svgs = [(tmp_path / name / "condition.svg").read_bytes() for name in ("report", "whole")]
    assert svgs[0] == svgs[1]
    report([alone], tmp_path / "of the folder")


def test_a_damaged_table_is_set_aside_and_made_anew(done, tmp_path, caplog, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(done, out)
    (out / "runs" / GRID[0].folder_name / "result.json").unlink()  # else the table is not asked
    whole = (out / "results.parquet").read_bytes()
    (out / "results.parquet").write_bytes(whole[: len(whole) // 2])
    with caplog.at_level(logging.WARNING, logger="wellcond"):
        compare(GRID, out, resume=True)
    assert "is set aside as 'results.parquet.damaged'" in caplog.text
    assert (out / "results.parquet.damaged").read_bytes() == whole[: len(whole) // 2]
    assert [result.config for result in read_results(out)] == GRID
    refused = call("report", tmp_path / "out" / "results.parquet.damaged", "--out", tmp_path / "report")
    assert refused.exit_code == 2
    other = tmp_path / "other.parquet"
    pd.DataFrame({"a": [1]}).to_parquet(other)
    refused = call("report", other, "--out", tmp_path / "report")
    assert refused.exit_code == 2
    assert "is not a table of results that can be read: it has no" in one_line(refused)


def test_a_full_disk_leaves_the_tables_as_they_were(done, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(done, out)
    before = {name: (out / f"{name}.parquet").read_bytes() for name in ("results", "condition")}
    with monkeypatch.context() as patch:
        full_disk_after(1000, patch)
        with pytest.raises(OSError, match="No space left"):
            ResultTables(out, SHORT).write(read_results(out))
    assert {name: (out / f"{name}.parquet").read_bytes() for name in before} == before
    assert not list(out.glob(".*.part"))


def test_results_of_another_version_are_refused_where_more_would_be_trained(done, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(done, out)
    monkeypatch.setattr(wellcond, "__version__", "9.0")
    compare(GRID, out, resume=True)  # nothing is missing
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(FolderError, match=r"holds results of wellcond .*, and this is 9.0: go on with that version"):
        compare([*GRID, small(epochs=2, head="gcp", seed=2)], out, resume=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_comparison_that_this_version_does_not_understand_is_one_line(tmp_path):
    values = {**small().to_dict(), "colour": "red"}
    write_json(tmp_path / "config.json", {"kind": "comparison", "config": {"version": "9.0", "runs": [values]}})
    for command in ("compare", "--resume", "--out", tmp_path), ("report", tmp_path, "--out", tmp_path / "report"):
        refused = call(*command)
        assert refused.exit_code == 2
        assert "not a comparison of wellcond 9.0 that wellcond" in one_line(refused) and "colour" in refused.stderr


def test_a_file_without_an_option_is_of_a_version_that_did_not_have_it(done, tmp_path):
    table = pq.read_table(done / "results.parquet").drop_columns(["memory_format"])
    pq.write_table(table, tmp_path / "results.parquet")
    assert {result.config.memory_format for result in read_results(tmp_path)} == {"contiguous"}
    pq.write_table(table.drop_columns(["lr"]), tmp_path / "results.parquet")
    with pytest.raises(RunError, match="fields \\['lr'\\] do not match"):
        read_results(tmp_path)
    assert RunConfig.from_dict(GRID[0].to_dict()) == GRID[0]
