"""Differences between the rows of a table: what is said to be seen is there, and what is noise is said to be noise."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from wellcond.experiments.results.condition import kappa_over_range, lack_rank
from wellcond.experiments.results.difference_tables import conditioning_table, differences_table
from wellcond.experiments.results.experiment import Experiment
from wellcond.experiments.results.statistics import LEVEL, POWER, Difference, differences, seeds_needed, signed
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


def test_two_runs_of_a_seed_are_refused():
    groups = {"base": runs([0.1, 0.2]), "other": runs([0.1, 0.2, 0.3], [0, 1, 1])}
    with pytest.raises(ValueError, match="row 'other' has two runs of seed 1"):
        differences(groups, {"other": "base"})


def of_values(values):
    """Runs with these values for the test error, quickly made."""
    return [SimpleNamespace(config=SimpleNamespace(seed=seed), test_error=value) for seed, value in enumerate(values)]


def against_zero(values):
    """The difference of a single row, whose pairs differ by these values."""
    (found,) = differences({"base": of_values(np.zeros(len(values))), "row": of_values(values)}, {"row": "base"})
    return found


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_intervals_hold_the_true_difference_as_often_as_they_say(n):
    """In 95 % of tables; of 2,000 tables in at least 93 %, four standard errors fewer."""
    drawn = np.random.default_rng(n).normal(0.3, 1.0, (2_000, n))
    held = [one.low <= 0.3 <= one.high for one in map(against_zero, drawn)]
    assert np.mean(held) >= 0.93


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_the_interval_is_without_0_exactly_where_p_is_small(n):
    drawn = np.random.default_rng(n).normal(1.0, 1.0, (300, n))
    found = [against_zero(values) for values in drawn]
    assert [one.is_seen for one in found] == [one.low > 0 or one.high < 0 for one in found]
    assert 0 < sum(one.is_seen for one in found) < 300
    expected = [stats.ttest_1samp(values, 0.0) for values in drawn]
    assert [one.p for one in found] == pytest.approx([one.pvalue for one in expected])
    intervals = np.array([one.confidence_interval(1 - LEVEL) for one in expected])
    assert np.allclose([(one.low, one.high) for one in found], intervals, rtol=1e-9)


@pytest.mark.parametrize("n", [2, 3, 6, 10])
def test_of_many_rows_that_do_not_differ_few_are_said_to(n):
    """The false discovery rate: without any true difference, in at most LEVEL of the tables any is seen.

    Of eight uncorrected tests one is significant in a quarter of the tables.
    """
    rng = np.random.default_rng(n)
    wrong, tables, names = 0, 200, "abcdefgh"
    for _ in range(tables):
        groups = {name: of_values(rng.normal(0.3, 0.01, n)) for name in ("base", *names)}
        found = differences(groups, dict.fromkeys(names, "base"))
        assert {one.rows for one in found} == {8}
        wrong += any(one.is_seen for one in found)
    assert wrong <= stats.binom.ppf(0.999, tables, LEVEL)  # 20


@pytest.mark.parametrize(("std", "difference"), [(0.3, 0.5), (0.3, 0.25), (1.0, -2.0), (0.1, 5.0)])
def test_so_many_seeds_see_the_difference(std, difference):
    """By simulation of single rows: 80 % at that number, fewer at one seed less; 2,000 tables are within 2.5 %."""
    rng = np.random.default_rng(2)

    def seen(n):
        found = [against_zero(values) for values in rng.normal(difference, std, (2_000, n))]
        return np.mean([one.is_seen and one.mean * difference > 0 for one in found])

    n = seeds_needed(std, difference)
    assert seen(n) > POWER - 0.025
    assert seen(n - 1) < POWER


def test_so_many_seeds_see_the_difference_in_a_table_of_many_rows():
    """Of eight rows one differs, and p is corrected: the number for a single row sees it in half of the tables.

    300 tables are within 7 %.
    """
    names = "abcdefgh"
    rng = np.random.default_rng(4)

    def seen(n):
        count = 0
        for _ in range(300):
            groups = {name: of_values(rng.normal(0.5 * (name == "a"), 0.3, n)) for name in names}
            groups["base"] = of_values(np.zeros(n))
            count += differences(groups, dict.fromkeys(names, "base"))[0].is_seen
        return count / 300

    n = seeds_needed(0.3, 0.5, rows=8)
    assert seen(n) > POWER - 0.07 > 0.65 > seen(seeds_needed(0.3, 0.5))


def test_no_number_of_seeds_is_made_up():
    assert seeds_needed(math.nan, 0.5) is None and seeds_needed(0.0, 0.5) is None
    assert seeds_needed(1.0, 0.0) is None and seeds_needed(1.0, 1e-6) is None
    assert seeds_needed(1.0, 20.0, rows=8) == 3  # of two seeds 22 % would see it, and SciPy's lower tail is nan


def test_of_two_pairs_no_number_of_seeds_is_derived():
    """Their deviation says next to nothing of that of further pairs."""
    two = Difference("SVD + SN", "SVD", 2, -0.0005, 0.004, -0.036, 0.035, 0.9)
    assert two.seeds_for(-0.05) is None and two._replace(seeds=3).seeds_for(-0.5) == seeds_needed(0.004, -0.005)
    assert two._replace(seeds=3, rows=8).seeds_for(-0.5) == seeds_needed(0.004, -0.005, rows=8)
    assert differences_table([two], {"SVD + SN": -0.05}).rows[0][-2] == ""
    assert "seeds" not in two.sentence(-0.05)


@pytest.mark.parametrize("errors", [[0.1, 0.1], [0.3, 0.3, 0.3], [0.2, 0.2]])
def test_of_equal_differences_nothing_is_known(errors, recwarn):
    """Errors are counts of images, so that differences are equal now and then; that is no sign of a spread of zero."""
    (found,) = differences({"base": runs([0.2] * len(errors)), "other": runs(errors)}, {"other": "base"})
    assert not found.is_seen and math.isnan(found.p) and math.isnan(found.low) and not recwarn.list


def test_the_table_says_what_is_noise_and_fits_the_terminal():
    seen = Difference("SVD + NOG + OW + OLR", "SVD", 10, -0.0094, 0.004, -0.012, -0.007, 0.001, rows=2)
    noise = Difference("SVD + SN", "SVD", 10, -0.0005, 0.004, -0.003, 0.002, 0.7, rows=2)
    table = differences_table([seen, noise], {"SVD + NOG + OW + OLR": -0.94, "SVD + SN": -0.05})
    assert [type(row[2]).__name__ for row in table.rows] == ["Strong", "str"]
    assert table.rows[1][-2:] == [str(seeds_needed(0.004, -0.0005, rows=2)), "not decidable"]
    assert table.rows[0][-1] == "seen"
    assert "paired t-test" in table.caption and "0.05 / 2 (Bonferroni" in table.caption
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
        (0.001, 0.012, 0.07, 0.0, "not decidable"),  # a difference of zero cannot be missing
        (0.001, 0.012, 0.07, -0.1, "not seen"),
        (math.nan, math.nan, 0.2, -0.9, "not decidable"),
    ],
)
def test_what_the_paper_reports_is_seen_or_not_or_cannot_be_decided(low, high, p, papers, verdict):
    mean = (low + high) / 2
    assert Difference("SVD + NOG", "SVD", 5, mean, 0.004, low, high, p).verdict(papers) == verdict


def test_condition_numbers_are_compared_by_their_ratios():
    rng = np.random.default_rng(3)
    base = 10 ** rng.normal(6, 1, 6)
    factor = 10 ** rng.normal(-2, 0.05, 6)

    (found,) = compared({"base": base, "other": base * factor})
    assert found.is_seen and found.infinite == 0
    assert 10**found.mean == pytest.approx(stats.gmean(factor))
    logs = np.log10(factor)
    margin = stats.t.ppf(0.975, 5) * stats.sem(logs)
    assert (found.low, found.high) == pytest.approx((logs.mean() - margin, logs.mean() + margin))
    table = conditioning_table([found])
    assert table.rows[0][:3] == ["other", "base", f"{stats.gmean(factor):.3g}"]
    assert "infinite" not in table.caption


def compared(kappas):
    """The condition numbers of the other rows, by name, against those of the first; None where there is no layer."""
    configs = {row: replace(RUN.config, epochs=epochs, threads=None) for epochs, row in enumerate(kappas, 1)}
    base, *others = kappas
    experiment = Experiment("", {config: row for row, config in configs.items()}, dict.fromkeys(others, base), {})
    results = [
        replace(
            RUN,
            config=replace(configs[row], seed=seed),
            conditions=() if kappa is None else (replace(CONDITION, kappa=kappa),),
        )
        for row, values in kappas.items()
        for seed, kappa in enumerate(values)
    ]
    return experiment.conditioning(results)


def test_where_no_covariance_has_full_rank_the_numerical_ranges_are_compared(tmp_path):
    """As behind covariance pooling of fewer positions than channels; by the median of the records before the end."""
    configs = {row: replace(RUN.config, epochs=epochs, threads=None) for epochs, row in enumerate(("base", "other"), 1)}
    experiment = Experiment("", {config: row for row, config in configs.items()}, {"other": "base"}, {})
    results = []
    for row, factor in (("base", 1.0), ("other", 0.1)):
        for seed, spread in enumerate((1.0, 2.0, 3.0)):
            folder = tmp_path / f"{row}{seed}"
            folder.mkdir()
            kappas = [factor * spread * k * (1.1 if seed == 2 and row == "other" else 1.0) for k in (1e2, 1e4, 1e3)]
            lines = [f"{10 * i},pool,{kappa}" for i, kappa in enumerate([*kappas, 1e9, 1e9])]
            lines.insert(1, "10,elsewhere,1e9")
            (folder / "condition.csv").write_text("\n".join(["step,layer,kappa_range", *lines]) + "\n")
            condition = replace(CONDITION, layer="pool", kappa=math.inf)
            config = replace(configs[row], seed=seed)
            results.append(replace(RUN, config=config, folder=str(folder), steps=30, conditions=(condition,)))
    assert lack_rank(results) and not lack_rank([*results, replace(RUN, conditions=(CONDITION,))]) and not lack_rank([])
    assert kappa_over_range(results[1]) == 2e3
    (found,) = experiment.conditioning(results, over_range=True)
    assert found.infinite == 0 and found.seeds == 3 and found.is_seen
    assert found.mean == pytest.approx(-1 + math.log10(1.1) / 3)
    table = conditioning_table([found], over_range=True)
    assert "over the numerical range of P (κ(P) is infinite, as P lacks full rank)" in table.caption
    assert math.isnan(kappa_over_range(replace(results[0], folder=str(tmp_path / "gone"))))


def test_pairs_with_an_infinite_condition_number_are_counted_and_nothing_is_concluded_from_the_others():
    """What is left are the seeds at which the matrix was well conditioned."""
    inf = math.inf
    found = compared(
        {
            "base": (1e9, inf, inf, 1e3),
            "other": (1e8, 1e4, 1e4, 1e2),
            "singular": (inf, inf, inf, inf),
            "unmeasured": [None] * 4,
        }
    )
    assert [(one.row, one.seeds, one.infinite) for one in found] == [("other", 2, 2), ("singular", 0, 4)]
    assert all(math.isnan(value) for one in found for value in (one.low, one.high, one.p))
    assert not any(one.is_seen for one in found)
    table = conditioning_table(found)
    assert table.rows == [
        ["other", "base", "0.1", "κ infinite in 2 of 4", ""],
        ["singular", "base", "", "κ infinite in 4 of 4", ""],
    ]
    assert "mean of 4 paired seeds" in table.caption and "better conditioned" in table.caption
