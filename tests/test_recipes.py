"""Recipes: the paper's rows with the paper's figures, at any scale; what is wrong in one is said in a line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import test_cli
from test_cli import call
from wellcond.experiments.errors import ConfigError
from wellcond.experiments.files import read_csv
from wellcond.experiments.recipes import known_recipes, load_recipe, recipe_text
from wellcond.experiments.run.config import RunConfig
from wellcond.experiments.run.result import load_result


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
    assert "--scale is of a recipe" in one_line("compare", "--scale", "small")
    assert "one for all its rows" in one_line("compare", "--recipe", "table4", "--treat", "nog,ow")
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
    first = call("compare", *options, "--seeds", "1").stdout
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
    assert "holds recipe 'table4', and a grid without a recipe was asked" in one_line(
        "compare", "--out", out, "--resume", "--norm", "zca", "--treat", "nog"
    )
    page = call("report", out, "--out", tmp_path / "report").stdout
    assert "report.html" in page
    assert "SVD + NOG: " in (tmp_path / "report" / "report.html").read_text()


def test_rows_may_differ_in_any_option(tmp_path: Path):
    """Such as the learning rate, which is in no label: each has its folder."""
    (tmp_path / "mine.toml").write_text(OWN)
    out = tmp_path / "out"
    call(
        "compare", "--recipe", tmp_path / "mine.toml", "--scale", "tiny", "--seeds", "1", "--epochs", "1", "--out", out
    )
    held = json.loads((out / "config.json").read_text())["config"]
    assert held["experiment"]["folders"] == ["svd-seed0", "slower-seed0"]
    assert [RunConfig.from_dict(run).lr for run in held["runs"]] == [0.05, 0.01]
    assert load_result(out / "runs" / "slower-seed0").config.lr == 0.01
