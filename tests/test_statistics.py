"""Differences between the rows of a table: what is said to be seen is there, and what is noise is said to be noise."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from wellcond.experiments.results.difference_tables import conditioning_table, differences_table
from wellcond.experiments.results.statistics import LEVEL, Difference, differences, seeds_needed, signed
from wellcond.experiments.run.config import run_config
from wellcond.experiments.run.result import LayerCondition, RunResult
from wellcond.experiments.show.render import for_terminal

RUN = RunResult(
    config=run_config(data="digits"),
    folder="run",
    test_error=0.1,
    test_accuracy=0.9,
    test_loss=0.3,
    best_val_accuracy=0.9,
    best_epoch=1,
    steps=100,
    seconds=1.0,
    seconds_per_step=0.01,
    conditions=(),
    environment={},
)

CONDITION = LayerCondition("norm", 1e6, 1e3, 24.0, 24, 2.0, 0, 10)


def runs(errors, seeds=None):
    seeds = range(len(errors)) if seeds is None else seeds
    return [replace(RUN, config=replace(RUN.config, seed=s), test_error=e) for s, e in zip(seeds, errors, strict=True)]


def test_the_difference_is_that_of_pairs_of_one_seed():
    """Unpaired, the spread over seeds (0.1) would hide a difference of 0.01."""
    rng = np.random.default_rng(0)
    base = rng.normal(0.3, 0.1, 8)
    gain = rng.normal(0.01, 0.001, 8)
    groups = {"base": runs(base), "other": runs(base - gain)[::-1]}
    (found,) = differences(groups, {"other": "base"})
    assert found.seeds == 8 and found.is_seen
    assert found.mean == pytest.approx(-gain.mean()) and found.std == pytest.approx(gain.std(ddof=1))
    assert found.low < -gain.mean() < found.high < 0
    assert found.p == pytest.approx(stats.ttest_rel(base - gain, base).pvalue)


def test_only_common_seeds_are_compared():
    groups = {"base": runs([0.1, 0.2, 0.3], [0, 1, 2]), "other": runs([0.25, 0.5], [1, 5]), "far": runs([0.1], [9])}
    (found,) = differences(groups, {"other": "base", "far": "base", "absent": "base"})
    assert (found.row, found.seeds, found.mean) == ("other", 1, pytest.approx(0.05))
    assert math.isnan(found.p) and not found.is_seen
    assert "one seed tells nothing" in found.sentence()


def test_of_many_rows_that_do_not_differ_few_are_said_to():
    """The false discovery rate: without any true difference, in at most LEVEL of the tables any is seen."""
    rng = np.random.default_rng(1)
    wrong = 0
    for _ in range(60):
        groups = {name: runs(rng.normal(0.3, 0.01, 6)) for name in ("base", *"abcdefgh")}
        wrong += any(one.is_seen for one in differences(groups, dict.fromkeys("abcdefgh", "base")))
    # Binomial(60, 0.05) exceeds 8 with probability 0.004; the rows share a baseline, which makes it rarer still.
    assert wrong <= 8


@pytest.mark.parametrize(("std", "difference"), [(0.3, 0.5), (0.3, 0.25), (1.0, -2.0)])
def test_so_many_seeds_see_the_difference(std, difference):
    """By simulation: 80 % of the tests at that number, fewer at one seed less."""
    n = seeds_needed(std, difference)
    rng = np.random.default_rng(2)

    def seen(count):
        values = rng.normal(difference, std, (20_000, count))
        return (stats.ttest_1samp(values, 0.0, axis=1).pvalue < LEVEL).mean()

    assert seen(n) > 0.79  # ± 0.003
    assert n == 2 or seen(n - 1) < 0.81


def test_no_number_of_seeds_is_made_up():
    assert seeds_needed(math.nan, 0.5) is None and seeds_needed(0.0, 0.5) is None
    assert seeds_needed(1.0, 0.0) is None and seeds_needed(1.0, 1e-6) is None


@pytest.mark.parametrize("errors", [[0.1, 0.1], [0.3, 0.3, 0.3], [0.2, 0.2]])
def test_of_equal_differences_nothing_is_known(errors, recwarn):
    """Errors are counts of images, so that differences are equal now and then; that is no sign of a spread of zero."""
    (found,) = differences({"base": runs([0.2] * len(errors)), "other": runs(errors)}, {"other": "base"})
    assert not found.is_seen and math.isnan(found.p) and math.isnan(found.low) and not recwarn.list


def test_the_table_says_what_is_noise_and_fits_the_terminal():
    seen = Difference("SVD + NOG + OW + OLR", "SVD", 10, -0.0094, 0.004, -0.012, -0.007, 0.001)
    noise = Difference("SVD + SN", "SVD", 10, -0.0005, 0.004, -0.003, 0.002, 0.7)
    table = differences_table([seen, noise], {"SVD + NOG + OW + OLR": -0.94, "SVD + SN": -0.05})
    assert [type(row[2]).__name__ for row in table.rows] == ["Strong", "str"]
    assert table.rows[1][-2:] == [str(seeds_needed(0.004, -0.0005)), "not decidable"]
    assert table.rows[0][-1] == "seen"
    console = Console(width=80, file=io.StringIO())
    console.print(for_terminal(table))
    shown = console.file.getvalue()
    for text in ("SVD + NOG + OW + OLR", "−0.94", "−1.20 to −0.70", "0.001", "−0.30 to +0.20"):
        assert text in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert "within the noise" in noise.sentence(-0.05) and "seeds" in noise.sentence(-0.05)
    assert noise._replace(mean=0.00004).sentence() == "SVD + SN: as high as SVD, which is within the noise"
    assert signed(-0.001) == "−0.10"


@pytest.mark.parametrize(
    ("low", "high", "p", "papers", "verdict"),
    [
        (-0.012, -0.007, 0.001, -0.9, "seen"),
        (-0.012, -0.007, 0.001, 0.9, "the opposite is seen"),
        (-0.012, -0.007, 0.001, 0.0, "a difference is seen"),
        (-0.003, 0.002, 0.7, -0.9, "not seen"),
        (-0.003, 0.002, 0.7, -0.1, "not decidable"),
        (-0.012, -0.001, 0.2, -0.9, "not decidable"),  # the interval alone does not decide
        (math.nan, math.nan, 0.2, -0.9, "not decidable"),
    ],
)
def test_what_the_paper_reports_is_seen_or_not_or_cannot_be_decided(low, high, p, papers, verdict):
    mean = (low + high) / 2
    assert Difference("SVD + NOG", "SVD", 5, mean, 0.004, low, high, p).verdict(papers) == verdict


def test_condition_numbers_are_compared_by_their_ratios():
    """An infinite one says nothing of a factor."""
    rng = np.random.default_rng(3)
    base = 10 ** rng.normal(6, 1, 6)
    factor = 10 ** rng.normal(-2, 0.05, 6)

    def conditioned(kappas):
        found = [replace(run, conditions=(replace(CONDITION, kappa=kappa),)) for run, kappa in kappas]
        return found

    groups = {
        "base": conditioned(zip(runs([0.1] * 6), base, strict=True)),
        "other": conditioned(zip(runs([0.1] * 6), base * factor, strict=True)),
        "singular": conditioned(zip(runs([0.1] * 6), [math.inf] * 6, strict=True)),
    }
    found = differences(groups, {"other": "base", "singular": "base"}, lambda run: math.log10(run.conditions[0].kappa))
    assert [one.row for one in found] == ["other"] and found[0].is_seen
    assert 10 ** found[0].mean == pytest.approx(stats.gmean(factor))
    table = conditioning_table(found)
    assert table.rows[0][:3] == ["other", "base", f"{stats.gmean(factor):.3g}"]
