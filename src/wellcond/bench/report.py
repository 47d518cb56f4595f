"""Tables of the measured ratios, remarks, and a figure (one panel per task, row per contestant, mark per shape)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle, groupby
from typing import Any

from wellcond.bench.contestants import AUTO, ISQRT, REFERENCE, SVD
from wellcond.bench.gauges import Time
from wellcond.bench.results import CaseResult, Measured
from wellcond.experiments.results.table import Column, Strong, Table
from wellcond.experiments.show.figures import COLOURS

NOTHING = "—"
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
# Marks are hollow if the relative error of the gradient is larger.
GRADIENT_OFF = 0.01
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
TITLES = {
    "sqrt": r"$P^{1/2}$",
    "invsqrt": r"$P^{-1/2}$",
    "polar": "polar factor",
    "covariance_sqrt": "square root of a covariance, from features",
    "pooling_layer": "global covariance pooling",
    "whitening_layer": "decorrelated batch norm",
}

EXPLAINED = (
    f"Speed relative to {REFERENCE}, forward and backward, from the minimum of the timings; above 1 is faster. "
    "— means not available, or failed."
)

SUMMARY_EXPLAINED = (
    f"{AUTO} with its default solver, forward and backward: speed relative to autograd through eigh, autograd through "
    "svd, and iSQRT-COV with five steps; time in excess of the decomposition and five products; memory saved for "
    "backward and peak memory, relative to the input; relative error against double precision."
)


def by_task(results: Iterable[CaseResult]) -> list[tuple[str, list[CaseResult]]]:
    """The results grouped by task."""
    return [(task, list(group)) for task, group in groupby(results, key=lambda result: result.case.task)]


def ratio_table(results: Sequence[CaseResult]) -> Table:
    """The ratios of one task: a row per contestant, a column per shape."""
    rows = []
    for name in dict.fromkeys(row.name for result in results for row in result.rows):
        found = [next((row for row in result.rows if row.name == name), None) for result in results]
        ratios = [result.faster(row) if row else None for result, row in zip(results, found, strict=True)]
        cells = [name, *map(ratio, ratios)]
        rows.append([Strong(cell) for cell in cells] if name == AUTO else cells)
    return Table([results[0].case.task, *(result.case.size for result in results)], rows)


def summary_table(results: Sequence[CaseResult]) -> Table:
    """`wellcond` on every case: speed ratios, time over the lower bound, memory and error."""
    rows = []
    for result in results:
        ours = result[AUTO]
        others = [result[name].both for name in (REFERENCE, SVD, ISQRT)]
        rows.append(
            [
                result.case.task,
                result.case.size,
                milliseconds(ours.both),
                *(ratio(other.minimum / ours.both.minimum if other and ours.both else None) for other in others),
                cell(result.overhead, "+.0%").replace("%", " %"),
                *measures(ours, result),
            ]
        )
    # Wide columns are omitted on the terminal, so that the rest fits 80 columns.
    heads = ["task", "shape", Column("ms", wide=True), "vs eigh", "vs svd", "vs iSQRT", "limit", "saved", "peak"]
    return Table([*heads, Column("error", wide=True), "grad. error"], rows, SUMMARY_EXPLAINED)


def detail_table(result: CaseResult) -> Table:
    """All measurements of one case, with GFLOP/s and their share of the peak for contestants that only multiply."""
    rows = []
    for row in result.rows:
        rate = row.operations_per_second
        rows.append(
            [
                row.name,
                *map(milliseconds, (row.forward, row.both)),
                *(ratio(result.faster(row, what)) for what in ("forward", "both")),
                *measures(row, result),
                cell(rate and rate / 1e9, ".3g"),
                cell(rate and rate / result.peak, ".0%"),
            ]
        )
    heads = ["", "forward ms", "both ms", "× forward", "× both", "saved", "peak", "error", "grad. error"]
    return Table([*heads, "GFLOP/s", "of peak"], rows)


def tables(results: Sequence[CaseResult]) -> list[Table]:
    """The ratios of every task, then the summary of `wellcond`."""
    return [*(ratio_table(group) for _, group in by_task(results)), summary_table(results)]


def line(result: CaseResult) -> str:
    """One line about a finished case, for progress output."""
    return f"{result.case.task} {result.case.size}: {AUTO} {ratio(result.faster(result[AUTO]))} × {REFERENCE}"


def remarks(results: Sequence[CaseResult], missing: Mapping[str, str], truths: Mapping[str, float | None]) -> list[str]:
    """Remarks below the tables: missing packages, failures, and the accuracy of the ground truth."""
    lines = [f"{name}: {why}" for name, why in missing.items()]
    failed: dict[tuple[str, str, str], list[str]] = {}
    for result in results:
        for row in result.rows:
            if row.failure:
                failed.setdefault((row.name, result.case.task, row.failure), []).append(result.case.size)
    lines += [f"{name} on {task} {', '.join(sizes)}: {why}" for (name, task, why), sizes in failed.items()]
    for name, error in truths.items():
        difference = "not compared (mpmath or scipy is not installed)" if error is None else f"off by {error:.1e}"
        lines.append(f"{name} against mpmath at 50 digits, 8×8, κ = 1e4: {difference}")
    return lines


def cell(value: float | None, form: str) -> str:
    """A formatted number, or a dash for None."""
    return NOTHING if value is None else format(value, form)


def measures(row: Measured, result: CaseResult) -> list[str]:
    """Memory relative to the input, and both errors."""
    sizes = [cell(size if size is None else size / result.input_bytes, ".2g") for size in (row.saved, row.peak)]
    return [*sizes, *(cell(error, ".1e") for error in (row.error, row.gradient_error))]


def milliseconds(time: Time | None) -> str:
    """The minimum in milliseconds, with three digits."""
    return cell(time and 1e3 * time.minimum, ".3g")


def ratio(value: float | None) -> str:
    """A ratio with two significant digits; more would be noise."""
    return cell(value, ".0f" if value and value >= 9.95 else ".2g")


def speed_figure(results: Sequence[CaseResult], environment: dict[str, str]) -> Any:
    """A matplotlib figure of the speed of all contestants, forward and backward."""
    from matplotlib.figure import Figure

    tasks = by_task(results)
    shapes = dict.fromkeys(result.case.size for result in results)
    looks = dict(zip(shapes, zip(cycle(COLOURS), cycle(MARKS), strict=False), strict=False))
    columns = min(2, len(tasks))
    heights = [len(_timed(group)) + 2 for _, group in tasks]
    row_heights = [max(heights[i : i + columns]) for i in range(0, len(tasks), columns)]
    figure = Figure(figsize=(6.6 * columns, 0.26 * sum(row_heights) + 1.1), layout="constrained")
    axes = figure.subplots(len(row_heights), columns, squeeze=False, gridspec_kw={"height_ratios": row_heights})
    factors = [factor for result in results for row in result.rows if (factor := result.faster(row)) is not None]
    low, high = min(factors, default=1.0) / 1.3, max(factors, default=1.0) * 1.3
    ticks = [tick for tick in TICKS if low <= tick <= high]
    for axis, (task, group) in zip(axes.flat, tasks, strict=False):
        _panel(axis, task, group, looks)
        axis.set(xscale="log", xlim=(low, high))
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
        axis.set_xticks([], minor=True)
    for axis in axes.flat[len(tasks) :]:
        axis.set_visible(False)
    marks = [axes.flat[0].plot([], [], mark, color=colour, markersize=5.5)[0] for colour, mark in looks.values()]
    figure.legend(marks, shapes, loc="outside lower center", ncols=min(len(marks), 5), frameon=False)
    figure.suptitle(
        f"Forward and backward, speed relative to {REFERENCE}: further right is faster; "
        f"hollow if the gradient is off by more than {GRADIENT_OFF:.0%}\n"
        f"{environment['device']}, {environment['threads']} threads, PyTorch {environment['torch']}",
        fontsize=10,
    )
    return figure


def _timed(group: Sequence[CaseResult]) -> list[str]:
    return list(dict.fromkeys(row.name for result in group for row in result.rows if row.both))


def _panel(axis: Any, task: str, group: Sequence[CaseResult], looks: dict[str, tuple[str, str]]) -> None:
    names = _timed(group)
    for result in group:
        colour, mark = looks[result.case.size]
        for row in result.rows:
            if (factor := result.faster(row)) is not None:
                face = "none" if (row.gradient_error or 0.0) > GRADIENT_OFF else colour
                axis.plot(factor, names.index(row.name), mark, color=colour, markerfacecolor=face, markersize=5.5)
    axis.axvline(1.0, color="#000000", linewidth=0.8)
    axis.axhspan(names.index(AUTO) - 0.5, names.index(AUTO) + 0.5, color="#E69F00", alpha=0.18, linewidth=0)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.get_yticklabels()[names.index(AUTO)].set_fontweight("bold")
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_title(TITLES[task], fontsize=10)
    axis.grid(True, which="major", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
