"""The printed tables: one run; a comparison laid out as the paper's Tables 1–5 with the conditioning beside; a look
at a checkpoint."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from wellcond.experiments.results import LayerCondition, Row, RunResult

if TYPE_CHECKING:
    from wellcond.experiments.inspect import Inspection


def number(value: float) -> str:
    """Three digits: `1.23e+04` where that is shorter."""
    return f"{value:.2e}" if math.isfinite(value) and value >= 1e4 else f"{value:.3g}"


def percent(fraction: float) -> str:
    """A fraction in percent, to two places."""
    return f"{100 * fraction:.2f}"


def rank(value: float, dim: int) -> str:
    """A (median) rank out of the dimension."""
    return f"{value:g}/{dim}"


def _layer(name: str) -> str:
    return name.removeprefix("model.")


def run_table(result: RunResult) -> Table:
    """What one run found, a line each."""
    config = result.config
    title = f"{config.model}, {config.label}, on {config.data}; seed {config.seed}, {config.epochs} epochs"
    table = Table(title=title, box=box.SIMPLE_HEAVY, show_header=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_row("test error", f"{percent(result.test_error)} %  (weights of the last epoch)")
    table.add_row("test accuracy", f"{percent(result.test_accuracy)} %")
    table.add_row(
        "validation accuracy",
        f"best {percent(result.best_val_accuracy)} % after epoch {result.best_epoch + 1} (best.ckpt)",
    )
    for condition in result.conditions:
        for what, value in _conditioning(condition):
            table.add_row(f"{_layer(condition.layer)}: {what}", value)
    table.add_row("time", f"{result.seconds:.1f} s for {result.steps} steps, {result.seconds_per_step:.4f} s a step")
    return table


def _conditioning(condition: LayerCondition) -> list[tuple[str, str]]:
    return [
        ("κ(P), κ(P + εI)", f"{number(condition.kappa)}, {number(condition.kappa_eps)}"),
        (
            "rank",
            f"numerical {rank(condition.numerical_rank, condition.dim)}, "
            f"effective {number(condition.effective_rank)}  (medians of {condition.records} steps)",
        ),
        ("solver failures", str(condition.failures)),
    ]


def comparison_table(rows: Sequence[Row], title: str) -> Table:
    """The rows of a comparison. Several observed layers have a line each."""
    seeds = rows[0].seeds
    spread = f"± is the sample standard deviation over {seeds} seeds (n − 1). " if seeds > 1 else ""
    table = Table(
        title=title,
        box=box.SIMPLE_HEAVY,
        pad_edge=False,
        collapse_padding=True,  # fits 80 columns
        caption=f"{spread}κ and ranks: medians over steps, then over seeds, of the layer's batch covariance P. "
        "Time: median step.",
    )
    table.add_column("\nconfiguration", no_wrap=True)
    for heading in ("test\nerror %", "\nmin", "\nκ(P)", "\nκ(P+εI)", "\nrank", "eff.\nrank", "\nfails", "s per\nstep"):
        table.add_column(heading, justify="right", no_wrap=True)
    for label, layers in itertools.groupby(rows, key=lambda row: row.label):
        first, *others = layers
        std = "" if math.isnan(first.test_error_std) else f" ± {percent(first.test_error_std)}"
        error = (f"{percent(first.test_error_mean)}{std}", percent(first.test_error_min))
        step = f"{first.seconds_per_step:.4f}"
        if not others:
            table.add_row(label, *error, *_measures(first), step)
            continue
        table.add_row(label, *error, "", "", "", "", "", step)
        for row in (first, *others):
            table.add_row(f"  {_layer(row.layer)}", "", "", *_measures(row), "")
    return table


def inspection_table(found: Inspection) -> Table:
    """What `wellcond inspect` found: a line for each observed layer, and below it the weight before it."""
    table = Table(
        title=f"{found.config.model}, {found.config.label}, after {found.epoch} epochs; {found.images} {found.split} "
        f"images of {found.data}",
        box=box.SIMPLE_HEAVY,
        pad_edge=False,
        collapse_padding=True,
        caption=f"Medians over {len({record.step for record in found.records})} batches in training mode, of the "
        "covariance P of the layer's input.",
    )
    table.add_column("\nlayer", no_wrap=True)
    for heading in ("\nκ(P)", "\nlargest", "\nκ(P+εI)", "\nrank", "eff.\nrank", "\nλ max", "\nλ min", "\nfails"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, layer in found.layers.items():
        values = [layer[key] for key in ("kappa", "kappa_max", "kappa_eps")]
        ranks = [rank(layer["numerical_rank"], int(layer["dim"])), number(layer["effective_rank"])]
        ends = [number(layer["eig_max"]), number(layer["eig_min"]), f"{layer['failures']:g}"]
        table.add_row(_layer(name), *map(number, values), *ranks, *ends)
    return table


def weight_lines(found: Inspection) -> list[str]:
    """The singular values of the weights before the spectral layers, a line each."""
    return [
        f"weight of {w.layer}, {w.rows} × {w.columns}: singular values from {w.smallest:.6g} to {w.largest:.6g}, "
        f"κ {number(w.largest / w.smallest if w.smallest else math.inf)}"
        for w in found.weights
    ]


def _measures(row: Row) -> tuple[str, ...]:
    return (
        number(row.kappa),
        number(row.kappa_eps),
        rank(row.numerical_rank, row.dim),
        number(row.effective_rank),
        str(row.failures),
    )
