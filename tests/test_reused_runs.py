"""A comparison that reuses finished runs of another trains the rest; its files are those of one that trained all."""

import json
import shutil
from dataclasses import replace
from functools import partial

import pandas as pd
import pytest
from typer.testing import CliRunner

from small_runs import small
from wellcond.cli import app
from wellcond.experiments.compare import compare
from wellcond.experiments.errors import FolderError
from wellcond.experiments.results.parquet import read_results
from wellcond.experiments.run.result import load_result
from wellcond.experiments.run.training import Classifier

SHARED = small(epochs=1, head="gcp")
OTHER = small(epochs=1, norm="batch", head="gcp", treat="nog")


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    out = tmp_path_factory.mktemp("first") / "first"
    compare([SHARED], out)
    return out


def no_training(monkeypatch):
    monkeypatch.setattr(Classifier, "training_step", lambda *_: pytest.fail("trained again"))


def of(out, config):
    return load_result(out / "runs" / config.folder_name)


def test_a_shared_run_is_copied_and_the_others_are_trained(first, tmp_path):
    out = tmp_path / "second"
    compare([SHARED, OTHER], out, reuse=[first])
    kept, copied = of(first, SHARED), of(out, SHARED)
    assert kept is not None
    assert copied is not None
    assert copied.seconds == kept.seconds  # measured once
    assert copied.conditions == kept.conditions
    assert of(out, OTHER) is not None
    assert not (out / "runs" / SHARED.folder_name / "checkpoints").exists()
    assert (out / "runs" / OTHER.folder_name / "checkpoints").exists()
    table = pd.read_parquet(out / "results.parquet")
    assert sorted(table.folder) == sorted(f"runs/{config.folder_name}" for config in (SHARED, OTHER))
    steps = pd.read_parquet(out / "condition.parquet")
    assert set(steps.folder) == set(table.folder)


def test_the_tables_are_enough(first, tmp_path, monkeypatch):
    """The folders of the runs are gone: result and condition numbers come from the two tables."""
    no_training(monkeypatch)
    tables = tmp_path / "tables"
    tables.mkdir()
    for name in ("config.json", "results.parquet", "condition.parquet"):
        shutil.copy(first / name, tables / name)
    out = tmp_path / "second"
    compare([SHARED], out, reuse=[tables])
    assert [r.conditions for r in read_results(out)] == [r.conditions for r in read_results(first)]
    one, other = (pd.read_parquet(folder / "condition.parquet") for folder in (first, out))
    assert one.astype(str).equals(other.astype(str))
    compare([SHARED], out, resume=True)  # it is as good as one that was trained here


def test_resumed_it_takes_what_is_missing(first, tmp_path, monkeypatch):
    out = tmp_path / "second"
    compare([OTHER], out)
    no_training(monkeypatch)
    compare([OTHER, SHARED], out, resume=True, reuse=[first])
    assert of(out, SHARED) is not None
    compare([OTHER, SHARED], out, resume=True, reuse=[first])  # all that it could give is here already


def test_a_copy_that_was_killed_is_trained_like_a_run_that_was_begun(first, tmp_path, monkeypatch):
    files = [path.name for path in (first / "runs" / SHARED.folder_name).iterdir() if path.is_file()]
    copied_files = len({*files} - {"config.json", "result.json"})
    assert copied_files > 2
    for kept in range(copied_files):
        out, copied = tmp_path / str(kept), []

        def copy(source, target, copied=copied, kept=kept, **options):
            if len(copied) == kept:
                raise KeyboardInterrupt
            copied.append(shutil.copyfile(source, target))
            return target

        with monkeypatch.context() as patched:
            patched.setattr(shutil, "copytree", partial(shutil.copytree, copy_function=copy))
            with pytest.raises(KeyboardInterrupt):
                compare([SHARED], out, reuse=[first])
        assert of(out, SHARED) is None
    (out / "runs" / SHARED.folder_name / "events.out.tfevents.0.of-the-other").touch()
    compare([SHARED], out, resume=True)  # with the most of its files
    assert of(out, SHARED) is not None
    assert of(out, SHARED).conditions == of(first, SHARED).conditions
    events = {path.name for path in (out / "runs" / SHARED.folder_name).glob("events.*")}
    assert len(events) == 1  # not beside those of the other
    assert not events & {*files, "events.out.tfevents.0.of-the-other"}


def test_what_cannot_be_reused_is_refused_before_anything_is_written(first, tmp_path):
    out = tmp_path / "second"
    with pytest.raises(FolderError, match="holds no comparison"):
        compare([SHARED], out, reuse=[tmp_path / "nowhere"])
    with pytest.raises(FolderError, match="holds no finished run of a configuration"):
        compare([OTHER], out, reuse=[first])
    with pytest.raises(FolderError, match="they differ in threads: give the same --threads"):
        compare([replace(SHARED, threads=3)], out, reuse=[first])
    old = tmp_path / "old"
    shutil.copytree(first, old)
    marked = json.loads((old / "config.json").read_text())
    marked["config"]["version"] = "0.0.1"
    (old / "config.json").write_text(json.dumps(marked))
    with pytest.raises(FolderError, match=r"0\.0\.1"):
        compare([SHARED], out, reuse=[old])
    assert not out.exists()
    result = CliRunner().invoke(app, ["compare", "--reuse", str(tmp_path / "nowhere"), "--out", str(out)])
    assert result.exit_code == 2
    assert len(result.output.strip().splitlines()) == 1
    assert not out.exists()


def test_a_run_that_was_extended_since_gives_its_earlier_result(first, tmp_path, monkeypatch):
    from wellcond.experiments.run.train import run

    grown = tmp_path / "grown"
    shutil.copytree(first, grown)
    run(replace(read_results(first)[0].config, epochs=2), grown / "runs" / SHARED.folder_name, resume=True)
    no_training(monkeypatch)
    out = tmp_path / "second"
    compare([SHARED], out, reuse=[grown])
    found, kept = of(out, SHARED), of(first, SHARED)
    assert found is not None
    assert kept is not None
    assert (found.steps, found.test_error, found.conditions) == (kept.steps, kept.test_error, kept.conditions)
    assert pd.read_parquet(out / "condition.parquet").step.max() < kept.steps


def snapshot(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def test_a_comparison_is_not_reused_for_itself(first, tmp_path):
    """Its runs would be deleted before they are copied, also where they are reached by a link."""
    mine = tmp_path / "mine"
    shutil.copytree(first, mine)
    before = snapshot(mine)
    (tmp_path / "link").symlink_to(mine)
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(mine / "config.json", other)
    (other / "runs").symlink_to(mine / "runs")
    third = tmp_path / "third" / "runs"
    third.mkdir(parents=True)
    shutil.copy(mine / "config.json", third.parent)
    (third / SHARED.folder_name).symlink_to(mine / "runs" / SHARED.folder_name)
    pairs = ((mine, mine), (tmp_path / "link", mine), (mine, tmp_path / "link"), (mine, other), (mine, third.parent))
    for reused, out in pairs:
        with pytest.raises(FolderError, match="is the output folder, and cannot be reused for itself"):
            compare([SHARED], out, reuse=[reused], overwrite=True)
    assert snapshot(mine) == before


def test_a_run_without_its_condition_numbers_is_not_reused(first, tmp_path):
    mine = tmp_path / "mine"
    shutil.copytree(first, mine)
    (mine / "runs" / SHARED.folder_name / "condition.csv").unlink()
    compare([SHARED], tmp_path / "from the table", reuse=[mine])
    assert snapshot(tmp_path / "from the table" / "runs").keys() >= {
        tmp_path / "from the table" / "runs" / SHARED.folder_name / "condition.csv"
    }
    (mine / "condition.parquet").unlink()
    with pytest.raises(FolderError, match=r"the condition numbers of .* are gone"):
        compare([SHARED], tmp_path / "second", reuse=[mine])
    assert not (tmp_path / "second").exists()


def test_a_damaged_table_of_another_comparison_is_left_as_it_is(first, tmp_path, caplog):
    mine = tmp_path / "mine"
    shutil.copytree(first, mine)
    shutil.rmtree(mine / "runs")
    (mine / "results.parquet").write_bytes(b"PAR1")
    before = snapshot(mine)
    with pytest.raises(FolderError, match="holds no finished run"):
        compare([SHARED], tmp_path / "second", reuse=[mine])
    assert snapshot(mine) == before
    assert "only runs whose folders are there are taken" in caplog.text
