"""A recipe of generators is compared as any other: rows × seeds, tables, resume, and one line for what is wrong."""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import test_cli
from small_generators import assert_same, few, small
from test_cli import call
from wellcond.experiments.compare_generators import compare_generators
from wellcond.experiments.errors import ConfigError, DataError, FolderError, NonFiniteLossError, RunError
from wellcond.experiments.files import read_csv
from wellcond.experiments.latents.result import LatentsResult, Measures
from wellcond.experiments.latents.train import train_generator
from wellcond.experiments.latents.training import AdversarialTraining
from wellcond.experiments.recipes import load_recipe
from wellcond.experiments.results.experiment import Experiment
from wellcond.experiments.results.generators import (
    differences_of_generators,
    differences_table_of_generators,
    generators_table,
    grouped,
)


def interrupted(self):
    raise KeyboardInterrupt


ROWS = {"none": {"treat": "none"}, "NOG": {"treat": "nog"}}


def rows(seeds: int = 2, own=ROWS, **options):
    given = {"data": "pictures", "image_size": None, "steps": 2, **options}
    return {row: [small(**{**given, **its}, seed=seed) for seed in range(seeds)] for row, its in own.items()}


@pytest.fixture(autouse=True)
def pictures(tmp_path, monkeypatch):
    """Ten images in a folder, of which every run loads what its configuration says."""
    monkeypatch.chdir(tmp_path)
    Path("pictures").mkdir()
    for i, image in enumerate(few().images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(f"pictures/{i}.png")


def compared(out: Path, seeds: int = 2, those=None, command=None, **options):
    those = those or rows(seeds)
    names = {replace(config, seed=0, threads=None): row for row, runs in those.items() for config in runs}
    against = {"NOG": "none"} if "NOG" in those else {}
    experiment = Experiment("Two rows", names, against, {}, "mine", command=command)
    configs = [config for runs in those.values() for config in runs]
    return compare_generators(configs, out, experiment=experiment, **options)


def snapshot(folder: Path):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def no_training(monkeypatch):
    monkeypatch.setattr(AdversarialTraining, "step", lambda _: pytest.fail("trained again"))


def test_a_comparison_leaves_tables_and_can_be_extended(tmp_path):
    told = []
    compared(tmp_path / "out", finished=lambda index, result: told.append((index, result.config.treat)))
    assert told == [(0, "none"), (1, "none"), (2, "nog"), (3, "nog")]
    before = (tmp_path / "out/runs/nog-seed1/result.json").stat().st_mtime_ns
    told.clear()
    tables = compared(tmp_path / "out", 3, resume=True, finished=lambda index, result: told.append(index))
    assert sorted(told) == list(range(6))
    assert (tmp_path / "out/runs/nog-seed1/result.json").stat().st_mtime_ns == before
    lines = read_csv(tmp_path / "out/results.csv")
    assert [(line["row"], line["seed"]) for line in lines] == [(row, str(s)) for row in ROWS for s in range(3)]
    assert float(lines[0]["kappa_directions"]) >= 1
    saved = json.loads((tmp_path / "out/results.json").read_text())
    assert [one["row"] for one in saved["differences"]["kappa_directions"]] == ["NOG"]
    text = (tmp_path / "out/report.md").read_text()
    assert "(runs/nog-seed0/traversal.png)" in text and "| none | 3 |" in text
    assert [len(table.rows) for table in tables] == [2, 2]  # κ(U) and κ(J): no factors are known of these images


def test_it_goes_on_after_a_run_that_failed(tmp_path, monkeypatch):
    done = AdversarialTraining.step

    def step(self):
        if self.config.treat == "none" and self.config.seed == 1:
            raise NonFiniteLossError("training diverged at step 0")
        return done(self)

    with monkeypatch.context() as patch:
        patch.setattr(AdversarialTraining, "step", step)
        with pytest.raises(RunError, match="none-seed1: training diverged at step 0; what has finished is kept"):
            compared(tmp_path / "out")
    assert len(read_csv(tmp_path / "out/results.csv")) == 3
    compared(tmp_path / "out", resume=True)
    assert len(read_csv(tmp_path / "out/results.csv")) == 4


def test_a_folder_of_something_else_is_kept(tmp_path):
    compared(tmp_path / "out", 1)
    with pytest.raises(FolderError, match="another comparison of generators"):
        compared(tmp_path / "out")
    with pytest.raises(FolderError, match=r"lr is 0\.001 there, 0\.1 was asked"):
        compared(tmp_path / "out", those=rows(lr=0.1), resume=True)
    compared(tmp_path / "two", 2)
    with pytest.raises(
        FolderError, match=r"it holds eigengan, eigengan\+nog with 2 seeds on pictures, and 2 of these runs are"
    ):
        compared(tmp_path / "two", 1, resume=True)
    with pytest.raises(ConfigError, match="jobs must be at least 1, got 0"):
        compared(tmp_path / "three", jobs=0)
    assert not (tmp_path / "three").exists()


def result(row: str, seed: int, mig: float, kappa: float, jacobian: float = math.inf) -> LatentsResult:
    measures = Measures(1.0, 2.0, mig, 0.5, 0.5, 0.9, 0.9)
    return LatentsResult(small(**ROWS[row], seed=seed), "", 2, 3.0, 1.5, kappa, jacobian, None, measures, {})


def test_the_tables_have_means_and_paired_differences():
    migs = {"none": (0.1, 0.2, 0.4, 0.3), "NOG": (0.2, 0.31, 0.5, 0.41)}
    results = [result(row, s, mig, 10.0**s) for row, values in migs.items() for s, mig in enumerate(values)]
    groups = grouped(results, lambda config: "none" if config.treat == "none" else "NOG")
    table = generators_table(groups)
    heads = [column.head for column in table.columns]
    assert [row[heads.index("log10 κ(J)")] for row in table.rows] == ["inf (4 of 4)"] * 2
    assert "observer" not in heads  # it is the same of all
    assert [row[heads.index("MIG")] for row in table.rows] == ["0.25 ± 0.13", "0.355 ± 0.13"]
    assert [row[heads.index("log10 κ(U)")] for row in table.rows] == ["1.5 ± 1.3"] * 2
    found = differences_of_generators(groups, {"NOG": "none"})
    (mig,) = found["mig"]
    assert (mig.seeds, mig.mean) == (4, pytest.approx(0.105))
    lines = differences_table_of_generators(found).rows
    assert list(lines[[row[1] for row in lines].index("MIG")][:3]) == ["NOG − none", "MIG", "+0.105"]
    assert next(row[-1] for row in lines if row[1] == "MIG") == "better"
    assert next(row[-1] for row in lines if row[1] == "D") == "within the noise"


def test_infinite_condition_numbers_are_counted_in_the_tables():
    """They are no error of arithmetic (warnings are errors in tests), and no reason to judge by the other seeds."""
    inf = math.inf
    kappas = {"none": (1e9, inf, inf, 1e3), "NOG": (1e8, 1e4, 1e4, 1e2)}
    results = [result(row, s, 0.1, 1.0, kappa) for row, values in kappas.items() for s, kappa in enumerate(values)]
    groups = grouped(results, lambda config: "none" if config.treat == "none" else "NOG")
    table = generators_table(groups)
    place = [column.head for column in table.columns].index("log10 κ(J)")
    assert [row[place] for row in table.rows] == ["inf (2 of 4)", "4.5 ± 2.5"]
    assert [type(row[place]).__name__ for row in table.rows] == ["str", "Strong"]
    found = differences_of_generators(groups, {"NOG": "none"})
    (jacobian,) = found["kappa_jacobian"]
    assert (jacobian.seeds, jacobian.infinite, jacobian.mean) == (2, 2, pytest.approx(-1.0))
    differing = differences_table_of_generators(found)
    line = next(row for row in differing.rows if row[1] == "log10 κ(J)")
    assert line == ["NOG − none", "log10 κ(J)", "-1", "infinite in 2 of 4", "", "not decidable"]
    assert "better conditioned" in differing.caption


def test_the_recipe_has_the_rows_of_the_claim():
    recipe = load_recipe("latents")
    assert recipe.seeds >= 3
    configs = recipe.configs()
    treats = [runs[0].treat for runs in configs.values()]
    assert treats == ["none", "ol", "nog", "olr", "nog+olr", "ow"]
    assert {(c.data, c.model, c.n_basis, c.r1, c.r1_every, c.ol_weight) for (c, *_) in configs.values()} == {
        ("sprites", "eigengan", 6, 10.0, 16, 100.0)
    }
    (large, *_) = load_recipe("latents128").configs(data="faces")["none"]
    assert (large.image_size, large.base_channels, large.batch_size, large.lr, large.noise) == (128, 16, 64, 1e-4, 512)
    assert recipe.against() == {"OL": "none", **dict.fromkeys(("NOG", "OLR", "NOG + OLR", "OW"), "OL")}


def test_rows_of_other_images_are_refused_and_so_is_a_batch_that_there_is_not(tmp_path):
    other = rows(1, {"none": {}, "NOG": {"treat": "nog", "limit": 4}})
    for jobs in (None, 2):
        with pytest.raises(ConfigError, match="need the same images, and limit is None, 4"):
            compared(tmp_path / "out", those=other, jobs=jobs)
    with pytest.raises(DataError, match="10 images, fewer than a batch of 20"):
        compared(tmp_path / "out", those=rows(1, {"none": {}, "NOG": {"treat": "nog", "batch_size": 20}}))
    with pytest.raises(DataError, match="10 images, fewer than a batch of 20"):
        train_generator(small(batch_size=20), tmp_path / "out", data=few())
    with pytest.raises(ConfigError, match="the grid is empty"):
        compared(tmp_path / "out", those={"none": []})
    with pytest.raises(ConfigError, match=r"rows 'a\+b' and 'a b' would share the folder 'a-b-seed0'"):
        compared(tmp_path / "out", those=rows(1, {"a+b": {}, "a b": {"treat": "nog"}}))
    assert not (tmp_path / "out").exists()


def test_a_comparison_is_deleted_only_for_one_that_can_be_trained(tmp_path):
    out = tmp_path / "out"
    compared(out, 1)
    before = snapshot(out)
    with pytest.raises(ConfigError, match="nig"):
        compared(out, those=rows(1, {"none": {"treat": "nig"}}), overwrite=True)
    assert snapshot(out) == before
    (out / "runs/none-seed0/result.json").write_text("{")  # damaged, or of an older version
    compared(out, 1, overwrite=True)
    assert len(read_csv(out / "results.csv")) == 2


def test_what_this_version_cannot_read_is_said(tmp_path):
    compared(tmp_path / "out", 1)
    path = tmp_path / "out/config.json"
    marked = json.loads(path.read_text())
    for run in marked["config"]["runs"]:
        del run["r1_every"]
    marked["config"]["version"] = "0.0.1"
    path.write_text(json.dumps(marked))
    with pytest.raises(
        FolderError, match=r"not a comparison of wellcond 0\.0\.1 that .* use the version that began it"
    ):
        compared(tmp_path / "out", 1, resume=True)


def test_a_row_that_is_renamed_keeps_its_folder(tmp_path, monkeypatch):
    compared(tmp_path / "out", 1)
    no_training(monkeypatch)
    compared(tmp_path / "out", those=rows(1, {"none": {}, "nearest": {"treat": "nog"}}), resume=True)
    assert [line["row"] for line in read_csv(tmp_path / "out/results.csv")] == ["none", "nearest"]
    assert sorted(path.name for path in (tmp_path / "out/runs").iterdir()) == ["nog-seed0", "none-seed0"]


def test_a_comparison_of_before_goes_on(tmp_path, monkeypatch):
    """Its heading and command are beside the runs, and the rows and folders were not saved."""
    out = tmp_path / "out"
    compared(out, 1)
    path = out / "config.json"
    marked = json.loads(path.read_text())
    del marked["config"]["experiment"]
    marked["config"] |= {"command": "wellcond compare --recipe mine.toml --seeds 1", "heading": "Two rows"}
    path.write_text(json.dumps(marked))
    said = f"go on with it by wellcond compare --recipe mine.toml --seeds 1 --threads 1 --out {out} --resume"
    assert said in test_cli.one_line(call("compare", "--out", out, "--resume"))
    before = snapshot(out / "runs")
    compared(out, 2, resume=True)
    after = snapshot(out / "runs")
    assert {path: after[path] for path in before} == before
    no_training(monkeypatch)
    compared(out, 2, resume=True)


def test_the_command_compares_and_refuses(monkeypatch):
    given = rows(1)["none"][0].to_dict()
    options = "\n".join(f"{k} = {json.dumps(v)}" for k, v in given.items() if v is not None)
    options = "\n".join(line for line in options.splitlines() if not line.startswith(("seed", "treat")))
    lines = "".join(
        f'[[rows]]\nname = "{row}"\noptions = {{ treat = "{own["treat"]}" }}\n' for row, own in ROWS.items()
    )
    Path("mine.toml").write_text(
        f'title = "Mine"\nabout = "Two rows."\ntask = "generator"\nseeds = 2\n[options]\n{options}\n{lines}'
    )
    first = call("compare", "--recipe", "mine.toml", "--seeds", "1")
    assert first.exit_code == 0, first.output
    assert "[2/2] NOG, seed 0" in first.stdout and "report.md" in first.stdout
    more = call("compare", "--recipe", "mine.toml", "--out", "mine", "--resume")
    assert more.exit_code == 0, more.output
    assert len(read_csv(Path("mine/results.csv"))) == 4
    command = "wellcond compare --recipe mine.toml --seeds 2 --threads 1"
    assert command in Path("mine/report.md").read_text()
    without = call("compare", "--out", "mine", "--resume")
    assert without.exit_code == 2
    said = test_cli.one_line(without).split("go on with it by ")[1]
    assert said == f"{command} --out mine --resume"
    assert call(*shlex.split(said)[1:]).exit_code == 0
    with monkeypatch.context() as patch:
        patch.setattr(AdversarialTraining, "step", interrupted)
        stopped = call("compare", "--recipe", "mine.toml", "--out", "other", "--jobs", "1")
    assert test_cli.one_line(stopped).endswith(f"{command} --out other --resume --jobs 1")
    for words, message in (
        (["--norm", "zca"], "unknown option of a generator 'norm'"),
        (["--treat", "ow"], "treat is set by row 'none'"),
        (["--reuse", "another"], "--reuse copies runs of classifiers"),
    ):
        refused = call("compare", "--recipe", "mine.toml", "--out", "third", *words)
        assert refused.exit_code == 2
        assert message in test_cli.one_line(refused)
    Path("bad.toml").write_text('title = "x"\nabout = "y"\ntask = "generators"\n[[rows]]\nname = "a"\n')
    refused = call("compare", "--recipe", "bad.toml")
    assert "unknown task of recipe 'bad' 'generators'; did you mean 'generator'?" in test_cli.one_line(refused)
    Path("like.toml").write_text('title = "x"\nabout = "y"\ntask = "generator"\nlike = "table4"\n')
    assert "like 'table4' of task 'classifier'" in test_cli.one_line(call("compare", "--recipe", "like.toml"))


@pytest.mark.slow
def test_runs_in_processes_are_those_of_one(tmp_path):
    for jobs in (1, 2):
        compared(tmp_path / str(jobs), 1, jobs=jobs)
    for run in ("none-seed0", "nog-seed0"):
        assert_same(*(tmp_path / str(jobs) / "runs" / run for jobs in (1, 2)))
