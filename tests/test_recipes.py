"""Recipes: the paper's rows with the paper's figures, at any scale; what is wrong in one is said in a line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import test_cli
from test_cli import call
from test_statistics import RUN
from wellcond.experiments.errors import ConfigError
from wellcond.experiments.files import read_csv, write_csv
from wellcond.experiments.recipes import GENERATOR, known_recipes, load_recipe, recipe_text
from wellcond.experiments.run.command_line import comparison_command
from wellcond.experiments.run.config import BEFORE, RunConfig
from wellcond.experiments.run.result import LayerCondition, load_result
from wellcond.experiments.show.curves import BOTH
from wellcond.experiments.show.curves import PAPERS as PAPERS_PANEL
from wellcond.experiments.show.figures import condition_figure, save_figure

CONDITION = LayerCondition("norm1", 9.0, 3.0, 16, 16, 3.5, 0, 1)


def one_line(*arguments: object) -> str:
    """What a refused command says; its exit status is 2."""
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    return test_cli.one_line(result)


# Of the paper, mean ± deviation and minimum on CIFAR-100 (Tables 1 to 3).
PAPERS = {
    "table1": {"SVD": (19.99, 0.16, 19.80), "SVD + SN": (19.94, 0.33, 19.60), "SVD + OW": (20.06, 0.17, 19.94)},
    "table2": {"SVD + NOG": (19.43, 0.24, 19.15), "SVD + NOG + OL": (20.14, 0.39, 19.54)},
    "table3": {"SVD + OLR": (19.50, 0.39, 18.95), "SVD + OW + OLR": (20.61, 0.22, 20.43)},
    "table4": {"SVD + NOG + OW + OLR": (19.05, 0.31, 18.77), "Newton–Schulz iteration": (19.45, 0.33, 19.01)},
}


@pytest.mark.parametrize("name", known_recipes())
def test_every_recipe_makes_runs_at_every_scale(name: str):
    recipe = load_recipe(name)
    for scale in ("full", *recipe.scales):
        configs = recipe.configs(scale)
        assert {len(runs) for runs in configs.values()} == {recipe.seeds}
        assert [run.seed for run in next(iter(configs.values()))] == list(range(recipe.seeds))
    assert recipe.heading(next(iter(recipe.configs().values()))) == recipe.title
    if recipe.task == GENERATOR:
        assert "steps 20" in recipe.heading(next(iter(recipe.configs("tiny").values())))
        return
    small = recipe.heading(next(iter(recipe.configs("small").values())))
    assert small.startswith(recipe.title) and "resnet8" in small and "epochs 30" in small


def test_the_rows_are_those_of_the_paper():
    for name, rows in PAPERS.items():
        papers = load_recipe(name).paper("folder/CIFAR-100")
        for row, (error, std, least) in rows.items():
            assert (papers[row].error, papers[row].std, papers[row].min) == (error, std, least)
    assert [row.name for row in load_recipe("table2").rows] == [
        "SVD",
        "SVD + NOG",
        "SVD + NOG + SN",
        "SVD + NOG + OL",
        "SVD + NOG + OW",
        "Newton–Schulz iteration",
    ]
    assert load_recipe("table4").paper("cifar10")["SVD"].error == 4.35
    assert load_recipe("table4").paper("flowers") == {}


def test_table_4_is_run_as_the_released_code_runs_it():
    configs = load_recipe("table4").configs(seeds=1)
    for name, (config,) in configs.items():
        assert (config.model, config.eps, config.running, config.norm_weight) == (
            "resnet50",
            1e-2,
            "whitening",
            "uniform",
        )
        assert (config.schedule, config.epochs, config.lr, config.batch_size) == ("100,200,300/350", 350, 0.1, 128)
        newton_schulz = name == "Newton–Schulz iteration"
        assert (config.norm, config.solver) == (("iter", None) if newton_schulz else ("zca", "svd"))
    assert configs["SVD + NOG + OW + OLR"][0].label == "zca by svd+nog+ow(soc)+olr"


def test_a_question_of_ours_compares_each_row_with_the_one_of_its_gradient():
    recipe = load_recipe("exact")
    assert len(recipe.rows) == 18
    assert recipe.against()["exact + NOG"] == "exact" and recipe.against()["SVD + NOG"] == "SVD"
    assert "exact" not in recipe.against()
    assert {config.solver for (config,) in recipe.configs(seeds=1).values()} == {"svd", "eigh", None}


def test_chosen_rows_bring_those_that_they_are_compared_with():
    chosen = load_recipe("exact").with_rows(["exact + OW"])
    assert [row.name for row in chosen.rows] == ["exact", "exact + OW"]
    with pytest.raises(ConfigError, match=r"unknown row of recipe 'exact' 'exakt \+ OW'; did you mean 'exact \+ OW'"):
        load_recipe("exact").with_rows(["exakt + OW"])


OWN = """
title = "mine"
about = "a rate of my own"
like = "table4"
keep = ["SVD"]
seeds = 2
[options]
lr = 0.05
[[rows]]
name = "slower"
options = { lr = 0.01 }
"""


def test_a_recipe_of_one_s_own_changes_another(tmp_path: Path):
    (tmp_path / "base.toml").write_text(OWN)
    (tmp_path / "mine.toml").write_text('title = "t"\nabout = "a"\nlike = "base.toml"\n')
    recipe = load_recipe(str(tmp_path / "mine.toml"))
    assert {name: runs[0].lr for name, runs in recipe.configs("tiny").items()} == {"SVD": 0.05, "slower": 0.01}
    assert recipe.scales.keys() == {"small", "tiny"}


BAD = {
    "no TOML": ("title = ", "is not TOML"),
    "unknown key": ('titel = "x"', "unknown key in recipe 'bad' 'titel'; did you mean 'title'"),
    "wrong type": ('title = "t"\nabout = "a"\nseeds = "three"', "seeds must be a whole number, got 'three'"),
    "no title": ('about = "a"', "has no title"),
    "no rows": ('title = "t"\nabout = "a"', "has no rows"),
    "unknown option": (OWN.replace("[[rows]]", "[scales.x]\nepochz = 1\n[[rows]]"), "did you mean 'epochs'"),
    "option of a wrong type": (OWN.replace("lr = 0.01", 'lr = "fast"'), "lr must be a number, got 'fast'"),
    "wrong value": (OWN.replace("lr = 0.01", 'precision = "9"'), "row 'slower': unknown precision '9'"),
    "row twice": (OWN + '[[rows]]\nname = "SVD"\n', "two rows 'SVD'"),
    "two equal rows": (OWN.replace("lr = 0.01", "lr = 0.05"), "rows 'SVD' and 'slower' are the same run"),
    "no row to keep": (OWN.replace('keep = ["SVD"]', 'keep = ["SVE"]'), "did you mean 'SVD'"),
    "compared with none": (OWN + 'against = "svd"\n', "did you mean 'SVD'"),
    "like none": (OWN.replace('"table4"', '"tabel4"'), "did you mean 'table4'"),
    "like itself": (OWN.replace('"table4"', '"bad.toml"'), "is like itself"),
    "seeds": (OWN.replace("seeds = 2", "seeds = 0"), "seeds must be at least 1"),
}


@pytest.mark.parametrize(("text", "said"), BAD.values(), ids=BAD)
def test_what_is_wrong_in_a_recipe_is_said_in_a_line(text: str, said: str, tmp_path: Path):
    (tmp_path / "bad.toml").write_text(text)
    error = one_line("compare", "--recipe", tmp_path / "bad.toml", "--scale", "tiny", "--out", tmp_path / "out")
    assert said in error
    assert not (tmp_path / "out").exists()


def test_the_command_line_refuses_what_cannot_be(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "did you mean 'table4'" in one_line("compare", "--recipe", "tabel4")
    assert "cannot read the recipe 'none.toml'" in one_line("compare", "--recipe", "none.toml")
    assert "did you mean 'small'" in one_line("compare", "--recipe", "table4", "--scale", "smal")
    assert "seeds must be at least 1" in one_line("compare", "--recipe", "table4", "--seeds", "0")
    assert "--scale needs --recipe" in one_line("compare", "--scale", "small")
    assert "for all its rows" in one_line("compare", "--recipe", "table4", "--treat", "nog,ow")
    assert list(tmp_path.iterdir()) == []


def test_recipes_are_listed_and_shown_to_be_copied(tmp_path: Path):
    listed = call("recipes").stdout
    assert all(name in listed for name in known_recipes())
    shown = call("recipes", "show", "table4").stdout
    assert shown == recipe_text("table4")
    (tmp_path / "mine.toml").write_text(shown)
    assert load_recipe(str(tmp_path / "mine.toml")).rows == load_recipe("table4").rows
    assert "did you mean 'fig1'" in one_line("recipes", "show", "fgi1")


def test_a_recipe_runs_says_its_rows_and_grows(tmp_path: Path):
    """A table at the tiny scale; then with a seed more, of which only the new runs are trained."""
    out = tmp_path / "table"
    options = ["--recipe", "table4", "--scale", "tiny", "--rows", "SVD + NOG", "--epochs", "1", "--out", out]
    first = " ".join(call("compare", *options, "--seeds", "1").stdout.split())
    assert "SVD + NOG" in first and "at another scale" in first and "differences" not in first
    before = (out / "runs" / "svd-nog-seed0" / "result.json").stat().st_mtime_ns
    second = call("compare", *options, "--seeds", "2", "--resume").stdout
    assert (out / "runs" / "svd-nog-seed0" / "result.json").stat().st_mtime_ns == before
    assert "differences" in second
    rows = read_csv(out / "results.csv")
    assert [row["label"] for row in rows] == ["SVD", "SVD + NOG"]
    errors = [[load_result(out / "runs" / f"{name}-seed{seed}") for seed in (0, 1)] for name in ("svd", "svd-nog")]
    paired = [its.test_error - other.test_error for other, its in zip(*errors, strict=True)]
    (found,) = json.loads((out / "results.json").read_text())["differences"]
    assert found["mean"] == pytest.approx(sum(paired) / 2, abs=1e-12) and found["against"] == "SVD"
    assert call("compare", "--out", out, "--resume").stdout.count("SVD + NOG, seed") == 2
    assert "holds recipe 'table4': with --resume give either --recipe table4" in one_line(
        "compare", "--out", out, "--resume", "--norm", "zca", "--treat", "nog"
    )
    page = call("report", out, "--out", tmp_path / "report").stdout
    assert "report.html" in page
    assert "SVD + NOG: " in (tmp_path / "report" / "report.html").read_text()
    told = (tmp_path / "report" / "report.md").read_text()
    asked = "wellcond compare --recipe table4 --scale tiny --rows 'SVD + NOG' --epochs 1 --seeds 2 --threads 1"
    assert asked in told and "| method | against |" in told and "![Condition number" in told
    assert f"<pre>{asked}</pre>".replace("'", "&#39;") in (tmp_path / "report" / "report.html").read_text()


def test_rows_may_differ_in_any_option(tmp_path: Path):
    """Such as the learning rate, which is in no label: each has its folder."""
    (tmp_path / "mine.toml").write_text(OWN)
    out = tmp_path / "out"
    options = ["--scale", "tiny", "--seeds", "1", "--epochs", "1"]
    assert call("compare", "--recipe", tmp_path / "mine.toml", *options, "--out", out).exit_code == 0
    held = json.loads((out / "config.json").read_text())["config"]
    assert held["experiment"]["folders"] == ["svd-seed0", "slower-seed0"]
    assert [RunConfig.from_dict(run).lr for run in held["runs"]] == [0.05, 0.01]
    assert load_result(out / "runs" / "slower-seed0").config.lr == 0.01
    rows = read_csv(out / "results.csv")
    assert [row["label"] for row in rows] == ["SVD", "slower"]
    # The rate is what the row is about: it cannot be another for all rows.
    refused = one_line("compare", "--recipe", tmp_path / "mine.toml", "--lr", "0.5", "--out", tmp_path / "other")
    assert "lr is set by row 'slower' of recipe 'mine'" in refused
    # A row that is renamed keeps its folder, for the comparison and its report.
    (tmp_path / "mine.toml").write_text(OWN.replace("slower", "slow"))
    again = call("compare", "--recipe", tmp_path / "mine.toml", *options, "--out", out, "--resume")
    assert again.exit_code == 0 and "slow, seed 0" in again.stdout
    result = call("report", out, "--out", tmp_path / "report")
    assert result.stderr == "" and "slow" in (tmp_path / "report" / "report.html").read_text()


def test_a_recipe_grows_by_seeds_alone_and_shows_runs_that_were_made_longer(tmp_path: Path):
    out = tmp_path / "out"
    options = ["--scale", "tiny", "--epochs", "1", "--rows", "SVD"]
    assert call("compare", "--recipe", "table4", *options, "--seeds", "1", "--out", out).exit_code == 0
    grown = call("compare", "--out", out, "--resume", "--seeds", "2")
    assert grown.exit_code == 0 and "SVD, seed 1" in grown.stdout, grown.output
    assert "--recipe table4 and all of its options" in one_line("compare", "--out", out, "--resume", "--lr", "1")
    assert call("train", "--out", out / "runs" / "svd-seed0", "--resume", "--epochs", "2").exit_code == 0
    assert call("report", out, "--out", tmp_path / "report").exit_code == 0
    page = (tmp_path / "report" / "report.html").read_text()
    assert "SVD, 2 epochs" in page and "<h1>Table 4" in page
    assert "--rows SVD --epochs 1 --seeds 2 --threads 1" in page


def test_the_command_of_a_comparison_has_the_seeds_and_threads_of_its_runs():
    """Also where those that it began with were saved, as they were before."""
    began = "wellcond compare --recipe table4 --threads 2 --rows 'SVD + NOG' --seeds 2"
    grown = [replace(RUN.config, seed=seed, threads=1) for seed in range(5)]
    made = "wellcond compare --recipe table4 --rows 'SVD + NOG' --seeds 5"
    assert comparison_command(began, grown) == f"{made} --threads 1"
    assert comparison_command(began, [*grown, replace(RUN.config, threads=None)]) == made
    assert comparison_command(None, grown) is None


def test_figures_of_reduced_recipes_have_their_whole_title(tmp_path: Path):
    title = "Table 4: " + ", ".join(f"option_{i} {i}" for i in range(40))
    runs = {"SVD": [replace(RUN, folder=str(tmp_path), conditions=(CONDITION,))]}
    columns = ("step", "layer", "kappa", "kappa_eps")
    write_csv(tmp_path / "condition.csv", columns, [dict(zip(columns, (0, "norm1", 9, 3), strict=True))])
    for stacked in (False, True):
        for shown in (BOTH, PAPERS_PANEL):
            figure = condition_figure(runs, title, stacked=stacked, columns=shown)
            save_figure(figure, tmp_path / "figure")
            box = figure._suptitle.get_window_extent()
            assert box.x0 >= 0 and box.x1 <= figure.bbox.width


def test_options_that_nothing_takes_are_refused(tmp_path: Path):
    out = ["--out", tmp_path / "out"]
    assert "--eps is an option of norms 'zca' and 'iter'" in one_line("train", "--norm", "batch", "--eps", "1", *out)
    assert "--ow-map is an option of treatment 'ow'" in one_line("train", "--treat", "nog", "--ow-map", "soc", *out)
    assert "--norm-weight" in one_line("compare", "--norm", "batch", "--head", "gcp", "--norm-weight", "uniform", *out)
    assert not (tmp_path / "out").exists()


def test_a_run_of_before_these_options_goes_on(tmp_path: Path):
    """Its `config.json` lacks them; with fewer epochs than it is asked for, too."""
    run = tmp_path / "run"
    assert (
        call(
            "train", *test_cli.SMALL, "--schedule", "150,250/350", "--memory-format", "contiguous", "--out", run
        ).exit_code
        == 0
    )
    held = json.loads((run / "config.json").read_text())
    held["config"] = {name: value for name, value in held["config"].items() if name not in BEFORE}
    (run / "config.json").write_text(json.dumps(held))
    (run / "result.json").unlink()
    assert call("train", "--out", run, "--resume").exit_code == 0
    assert call("train", "--out", run, "--resume", "--epochs", "4").exit_code == 0
