"""What a run and a comparison leave on the disk: whole files, right statistics, a readable figure."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from rich.console import Console

from small_runs import full_disk_after
from wellcond.experiments.errors import ConfigError
from wellcond.experiments.files import write_atomically, write_csv, write_json
from wellcond.experiments.grid.configs import grid
from wellcond.experiments.results.summary import labels, summarise
from wellcond.experiments.results.tables import comparison_table
from wellcond.experiments.run.config import BEFORE, RunConfig, run_config
from wellcond.experiments.run.result import CONDITION, LayerCondition, RunResult, load_result
from wellcond.experiments.run.schedule import Schedule
from wellcond.experiments.show.curves import columns, curve
from wellcond.experiments.show.figures import COLOURS, condition_figure, save_figure
from wellcond.experiments.show.render import for_terminal

CONDITION_COLUMNS = ("step", "layer", "kappa", "kappa_eps", "numerical_rank", "effective_rank", "dim")


def write_conditions(folder, rng, steps=11, scale=1.0):
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        dict(
            zip(
                CONDITION_COLUMNS,
                (step, "norm1", scale * 10 ** rng.uniform(2, 6), 10 ** rng.uniform(2, 5), 15, rng.uniform(1, 9), 16),
                strict=True,
            )
        )
        for step in range(0, 5 * steps, 5)
    ]
    write_csv(folder / CONDITION, CONDITION_COLUMNS, rows)
    return rows


def result(folder, *, treat="none", seed=0, error=0.1, kappa=1e3, seconds=0.01):
    config = run_config(data="digits", treat=treat, seed=seed)
    condition = LayerCondition("norm1", kappa, kappa / 2, 16, 16, 3.5, 1, 20)
    return RunResult(
        config=config,
        folder=str(folder),
        test_error=error,
        test_accuracy=1 - error,
        test_loss=0.3,
        best_val_accuracy=0.95,
        best_epoch=1,
        steps=55,
        seconds=4.0,
        seconds_per_step=seconds,
        conditions=(condition,),
        environment={"torch": "x"},
    )


def test_a_full_disk_leaves_the_old_file_and_no_remains(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    full_disk_after(1000, monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"n" * 5000, previous=tmp_path / "previous")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_write_keeps_what_was_there_as_previous(tmp_path):
    path, previous = tmp_path / "file", tmp_path / "previous"
    for content in (b"one", b"two", b"three"):
        write_atomically(path, content, previous=previous)
    assert (path.read_bytes(), previous.read_bytes()) == (b"three", b"two")


def test_json_is_strict_and_keeps_infinity_readable(tmp_path):
    write_json(tmp_path / "x.json", {"a": math.inf, "b": [math.nan, 1.5], "c": {"d": (-math.inf,)}})

    def refuse(constant):
        raise AssertionError(constant)

    held = json.loads((tmp_path / "x.json").read_text(), parse_constant=refuse)
    assert held == {"a": "inf", "b": ["nan", 1.5], "c": {"d": ["-inf"]}}


def test_a_result_survives_the_disk(tmp_path):
    kept = replace(result(tmp_path, kappa=math.inf), test_loss=math.nan)
    kept.save()
    back = load_result(tmp_path)
    assert back is not None
    assert math.isnan(back.test_loss)
    assert replace(back, test_loss=0) == replace(kept, test_loss=0)
    assert load_result(tmp_path / "elsewhere") is None


def test_the_spread_is_the_sample_standard_deviation(tmp_path):
    errors = [0.02, 0.03, 0.07]
    runs = [result(tmp_path, seed=s, error=e, kappa=10**s) for s, e in enumerate(errors)]
    row, other = summarise([*runs, result(tmp_path, treat="nog")])
    # two summation orders of three numbers below 0.1 differ by a few eps64
    assert row.test_error_mean == pytest.approx(np.mean(errors), rel=1e-14)
    assert row.test_error_std == pytest.approx(np.std(errors, ddof=1), rel=1e-14)
    assert (row.test_error_min, row.kappa, row.failures, row.seeds) == (0.02, 10, 3, 3)
    assert other.label == "zca+nog"
    assert math.isnan(other.test_error_std)


def test_a_row_says_its_solver_once_and_what_else_differs():
    configs = grid(["batch", "zca"], ["avg"], ["none"], [0], solver="svd")
    assert list(map(labels(configs), configs)) == ["batch", "zca by svd"]
    others = [replace(config, lr=lr) for config in configs for lr in (0.1, 0.2)]
    assert labels(others)(others[-1]) == "zca by svd, lr 0.2"


def test_the_default_grid_is_that_of_the_papers_tables():
    configs = grid(["batch", "zca"], ["avg"], ["none", "nog", "olr", "ow", "nog+ow+olr"], range(2))
    labels = ["batch", "zca", "zca+nog", "zca+olr", "zca+ow", "zca+nog+ow+olr"]
    assert [(c.label, c.seed) for c in configs] == [(label, seed) for label in labels for seed in (0, 1)]
    assert len(grid(["batch"], ["gcp"], ["none", "nog"], [0])) == 2  # a spectral head can be treated


def test_treatments_are_named_as_in_the_tables_however_they_are_typed():
    assert run_config(treat="NOG + ow").label == "zca+nog+ow"


def test_the_paper_s_recipe_is_the_default_away_from_the_digits():
    config = run_config(data="cifar100")
    assert (config.epochs, config.lr, config.batch_size) == (350, 0.1, 128)
    assert (config.momentum, config.weight_decay) == (0.9, 5e-4)
    rates = [config.lr * Schedule.parse(config.schedule).factor(epoch, 350) for epoch in (99, 100, 199, 200, 300, 349)]
    assert rates == pytest.approx([1e-1, 1e-2, 1e-2, 1e-3, 1e-4, 1e-4])


def test_a_configuration_of_another_version_is_refused():
    values = run_config(data="digits").to_dict()
    assert RunConfig.from_dict(values) == run_config(data="digits")
    earlier = RunConfig.from_dict({name: value for name, value in values.items() if name not in BEFORE})
    assert (earlier.image_size, earlier.schedule, earlier.memory_format) == (None, "150,250/350", "contiguous")
    with pytest.raises(ConfigError, match="epochs"):
        RunConfig.from_dict({name: value for name, value in values.items() if name != "epochs"})
    with pytest.raises(ConfigError, match="colour"):
        RunConfig.from_dict({**values, "colour": "red"})


def test_the_curve_is_the_median_over_seeds_with_its_range(tmp_path):
    rng = np.random.default_rng(1)
    folders = [tmp_path / str(seed) for seed in range(3)]
    table = np.array([[row["kappa"] for row in write_conditions(folder, rng)] for folder in folders])
    steps, middle, low, high = curve([result(folder) for folder in folders], "kappa")
    assert steps == list(range(0, 55, 5))
    np.testing.assert_array_equal(middle, np.median(table, 0))
    np.testing.assert_array_equal(low, table.min(0))
    np.testing.assert_array_equal(high, table.max(0))


def test_the_figure_is_readable(tmp_path):
    """Legend, titles and axes lie apart; every line is labelled, has its own look, and is on a log scale."""
    rng = np.random.default_rng(2)
    labels = ["batch", "zca", "zca+nog", "zca+olr", "zca+ow", "zca+nog+ow+olr"]
    runs = {label: [result(tmp_path / f"{label}-{seed}") for seed in range(2)] for label in labels}
    for run in (run for found in runs.values() for run in found):
        write_conditions(Path(run.folder), rng)
    figure = condition_figure(runs, "resnet8 on digits")
    png, svg = save_figure(figure, tmp_path / "condition")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert all(f">{label}<" in svg.read_text() for label in labels)
    figure.canvas.draw()
    left, right = figure.axes
    boxes = [axis.get_tightbbox() for axis in (left, right)] + [figure.legends[0].get_window_extent()]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not boxes[one].overlaps(boxes[other])
    assert max(box.x1 for box in boxes) <= figure.bbox.width  # nothing is cut off
    assert left.get_yscale() == right.get_yscale() == "log"
    looks = {(line.get_color(), line.get_linestyle()) for line in left.lines}
    assert len(looks) == len(left.lines) == len(labels)
    assert [line.get_color() for line in left.lines] == list(COLOURS[: len(labels)])


@pytest.mark.parametrize("stacked", [False, True], ids=["side by side", "stacked"])
def test_long_labels_break_and_cut_nothing(stacked, tmp_path):
    """Of both forms: panels and legend lie apart and inside, and no title reaches into the next panel."""
    rng = np.random.default_rng(5)
    labels = [f"batch/gcp+nog+ow+olr, epochs {n}, weight_decay 0.0005, monitor_every 2" for n in range(12)]
    runs = {label: [result(tmp_path / label.replace("/", "-"))] for label in labels}
    for (run,) in runs.values():
        write_conditions(Path(run.folder), rng, scale=math.inf)
    figure = condition_figure(runs, "condition number of the covariance: median of 12 seeds", stacked=stacked)
    FigureCanvasAgg(figure).draw()  # which lays it out
    boxes = [axis.get_tightbbox() for axis in figure.axes] + [figure.legends[0].get_window_extent()]
    boxes = [box.padded(-1) for box in boxes]  # pixels are rounded
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    assert min(box.x0 for box in boxes) >= 0
    assert max(box.x1 for box in boxes) <= figure.bbox.width
    assert min(box.y0 for box in boxes) >= 0
    assert max(box.y1 for box in boxes) <= figure.bbox.height
    panel = figure.axes[0].get_position()
    assert min(panel.width * figure.bbox.width, panel.height * figure.bbox.height) > 150  # there is room for curves
    assert [text.get_text().replace("\n", " ") for text in figure.legends[0].get_texts()] == [
        f"{label} (κ(P) infinite at 11 of 11)" for label in labels
    ]


@pytest.mark.parametrize("stacked", [False, True], ids=["alone", "stacked"])
def test_the_heading_of_a_covariance_without_full_rank_breaks_and_cuts_nothing(stacked, tmp_path):
    rows = [{"step": step, "layer": "norm1", "kappa": math.inf, "kappa_range": 1e3 + step} for step in range(3)]
    write_csv(tmp_path / CONDITION, ("step", "layer", "kappa", "kappa_range"), rows)
    runs = [result(tmp_path, kappa=math.inf)]
    shown = columns(runs, papers=False)
    assert list(shown) == ["kappa_range"]
    figure = condition_figure({"SVD": runs}, "title", stacked=stacked, columns=shown)
    FigureCanvasAgg(figure).draw()
    box = figure.axes[0].get_tightbbox()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width


def test_on_the_terminal_labels_break_before_a_number_is_cut(tmp_path):
    runs = [result(tmp_path, treat="nog+ow+olr", kappa=1.234e8), result(tmp_path)]
    rows = summarise(
        runs, lambda config: f"batch/gcp+{config.treat}, weight_decay {config.weight_decay}, a_rather_long_word"
    )
    console = Console(width=80, file=io.StringIO())
    console.print(for_terminal(comparison_table(rows)))
    shown = console.file.getvalue()
    assert "…" not in shown
    for number in ("10.00", "1.23e+08", "6.17e+07", "16/16", "0.0100"):
        assert number in shown
    words = "".join(line[: line.index("  ")] if "  " in line else line for line in map(str.strip, shown.splitlines()))
    assert "batch/gcp+nog+ow+olr,weight_decay0.0005,a_rather_long_word" in words.replace(" ", "")


def test_infinite_condition_numbers_are_said_and_not_drawn(tmp_path):
    write_conditions(tmp_path / "a", np.random.default_rng(3), scale=math.inf)
    write_conditions(tmp_path / "b", np.random.default_rng(3))
    figure = condition_figure({name: [result(tmp_path / name)] for name in "ab"}, "title")
    save_figure(figure, tmp_path / "f")
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["a (κ(P) infinite at 11 of 11)", "b"]


def test_names_are_not_read_as_mathematics(tmp_path):
    write_conditions(tmp_path / "a", np.random.default_rng(3))
    figure = condition_figure({"cost $5_0$": [result(tmp_path / "a")]}, "title")
    (path, *_) = save_figure(figure, tmp_path / "f")
    svg = path.with_suffix(".svg").read_text()
    assert "cost $5_0$" in svg


def test_csv_floats_keep_every_digit(tmp_path):
    values = np.random.default_rng(4).standard_normal(50).tolist()
    write_csv(tmp_path / "v.csv", ("v",), [{"v": value} for value in values])
    with (tmp_path / "v.csv").open() as stream:
        assert [float(row["v"]) for row in csv.DictReader(stream)] == values
