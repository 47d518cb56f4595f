"""A recipe of generators is compared as any other: rows × seeds, tables, resume, and one line for what is wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from PIL import Image

import test_cli
from test_cli import call
from test_latents_training import assert_same, few, small
from wellcond.experiments import compare_generators as comparing
from wellcond.experiments.compare_generators import compare_generators
from wellcond.experiments.errors import ConfigError, FolderError, NonFiniteLossError, RunError
from wellcond.experiments.files import read_csv
from wellcond.experiments.latents import train as trainer
from wellcond.experiments.latents.result import LatentsResult, Measures
from wellcond.experiments.latents.training import AdversarialTraining
from wellcond.experiments.recipes import load_recipe
from wellcond.experiments.results.generators import (
    differences_of_generators,
    differences_table_of_generators,
    generators_table,
    grouped,
)

ROWS = {"none": {"treat": "none"}, "NOG": {"treat": "nog"}}


def rows(seeds: int = 2, **options):
    given = {"steps": 2, **options}
    return {row: [small(**given, **own, seed=seed) for seed in range(seeds)] for row, own in ROWS.items()}


@pytest.fixture(autouse=True)
def images(monkeypatch):
    for place in (comparing, trainer):
        monkeypatch.setattr(place, "training_images", lambda config: few())


def compared(out: Path, seeds: int = 2, **options):
    return compare_generators(rows(seeds), out, heading="Two rows", against={"NOG": "none"}, **options)


def test_a_comparison_leaves_tables_and_can_be_extended(tmp_path):
    told = []
    compared(tmp_path / "out", finished=lambda row, result: told.append((row, result.config.seed)))
    assert told == [("none", 0), ("none", 1), ("NOG", 0), ("NOG", 1)]
    before = (tmp_path / "out/runs/nog-seed1/result.json").stat().st_mtime_ns
    told.clear()
    tables = compared(tmp_path / "out", 3, resume=True, finished=lambda row, result: told.append(row))
    assert sorted(told) == ["NOG"] * 3 + ["none"] * 3
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
        compare_generators(rows(lr=0.1), tmp_path / "out", heading="", against={}, resume=True)
    compared(tmp_path / "two", 2)
    with pytest.raises(FolderError, match="without all of its runs: 2 of them"):
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
    assert recipe.against() == dict.fromkeys(("OL", "NOG", "OLR", "NOG + OLR", "OW"), "none")


def test_the_command_compares_and_refuses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = "\n".join(f"{k} = {json.dumps(v)}" for k, v in small(steps=2).to_dict().items() if v is not None)
    options = "\n".join(line for line in options.splitlines() if not line.startswith(("seed", "treat")))
    rows = "".join(f'[[rows]]\nname = "{row}"\noptions = {{ treat = "{own["treat"]}" }}\n' for row, own in ROWS.items())
    Path("mine.toml").write_text(
        f'title = "Mine"\nabout = "Two rows."\ntask = "generator"\nseeds = 2\n[options]\n{options}\n{rows}'
    )
    first = call("compare", "--recipe", "mine.toml", "--seeds", "1")
    assert first.exit_code == 0, first.output
    assert "[2/2] NOG, seed 0" in first.stdout and "report.md" in first.stdout
    more = call("compare", "--recipe", "mine.toml", "--out", "mine", "--resume")
    assert more.exit_code == 0, more.output
    assert len(read_csv(Path("mine/results.csv"))) == 4
    for words, message in (
        (["--norm", "zca"], "unknown option of a generator 'norm'"),
        (["--treat", "ow"], "treat is set by row 'none'"),
        (["--reuse", "another"], "--reuse copies runs of classifiers"),
    ):
        refused = call("compare", "--recipe", "mine.toml", "--out", "other", *words)
        assert refused.exit_code == 2
        assert message in test_cli.one_line(refused)
    Path("bad.toml").write_text('title = "x"\nabout = "y"\ntask = "generators"\n[[rows]]\nname = "a"\n')
    refused = call("compare", "--recipe", "bad.toml")
    assert "unknown task of recipe 'bad' 'generators'; did you mean 'generator'?" in test_cli.one_line(refused)
    Path("like.toml").write_text('title = "x"\nabout = "y"\ntask = "generator"\nlike = "table4"\n')
    assert "like 'table4' of task 'classifier'" in test_cli.one_line(call("compare", "--recipe", "like.toml"))


@pytest.mark.slow
def test_runs_in_processes_are_those_of_one(tmp_path, monkeypatch):
    monkeypatch.undo()  # other processes load the images themselves
    (tmp_path / "pictures").mkdir()
    for i, image in enumerate(few().images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"pictures/{i}.png")
    those = rows(1, data=str(tmp_path / "pictures"), image_size=None)
    for jobs in (1, 2):
        compare_generators(those, tmp_path / str(jobs), heading="", against={}, jobs=jobs)
    for run in ("none-seed0", "nog-seed0"):
        assert_same(*(tmp_path / str(jobs) / "runs" / run for jobs in (1, 2)))
