"""How many times as fast as autograd through eigh: a panel a task, a line a contestant, a mark a shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from wellcond.bench.contestants import AUTO, REFERENCE
from wellcond.bench.measure import CaseResult
from wellcond.bench.report import by_task
from wellcond.experiments.show.figures import COLOURS

TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
# A gradient further off than this is not the gradient; its mark is hollow.
OFF = 0.01
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
TITLES = {
    "sqrt": r"$P^{1/2}$",
    "invsqrt": r"$P^{-1/2}$",
    "polar": "polar factor",
    "covariance_sqrt": "square root of a covariance, from features",
    "pooling_layer": "global covariance pooling",
    "whitening_layer": "decorrelated batch norm",
}


def speed_figure(results: Sequence[CaseResult], environment: dict[str, str]) -> Any:
    """The speed of everybody, forward and backward, as a matplotlib figure."""
    from matplotlib.figure import Figure

    tasks = by_task(results)
    shapes = list(dict.fromkeys(result.case.size for result in results))
    looks = {size: (COLOURS[i % len(COLOURS)], MARKS[i % len(MARKS)]) for i, size in enumerate(shapes)}
    heights = [len(_names(group)) for _, group in tasks]
    columns = min(2, len(tasks))
    rows = -(-len(tasks) // columns)
    row_heights = [max(heights[i * columns : (i + 1) * columns]) + 2 for i in range(rows)]
    figure = Figure(figsize=(6.6 * columns, 0.26 * sum(row_heights) + 1.1), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, gridspec_kw={"height_ratios": row_heights})
    for axis, (task, group) in zip(axes.flat, tasks, strict=False):
        _panel(axis, task, group, looks)
    ratios = [ratio for result in results for row in result.rows if (ratio := result.faster(row)) is not None]
    low, high = min(ratios, default=1.0) / 1.3, max(ratios, default=1.0) * 1.3
    ticks = [tick for tick in TICKS if low <= tick <= high]
    for axis in axes.flat:
        axis.set_xscale("log")
        axis.set_xlim(low, high)
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_xticks([], minor=True)
        axis.tick_params(axis="x", labelsize=8)
    for axis in axes.flat[len(tasks) :]:
        axis.set_visible(False)
    handles = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=min(len(handles), 5), frameon=False)
    figure.suptitle(
        f"Forward and backward, times as fast as {REFERENCE}: to the right is faster; "
        f"hollow where the gradient is off by more than {OFF:.0%}\n"
        f"{environment['device']}, {environment['threads']} threads, PyTorch {environment['torch']}",
        fontsize=10,
    )
    return figure


def _names(group: Sequence[CaseResult]) -> list[str]:
    return list(dict.fromkeys(row.name for result in group for row in result.rows if row.both))


def _panel(axis: Any, task: str, group: Sequence[CaseResult], looks: dict[str, tuple[str, str]]) -> None:
    names = _names(group)
    for result in group:
        colour, mark = looks[result.case.size]
        for row in result.rows:
            if (ratio := result.faster(row)) is not None:
                face = "none" if (row.gradient_error or 0.0) > OFF else colour
                axis.plot(ratio, names.index(row.name), mark, color=colour, markerfacecolor=face, markersize=5.5)
        axis.plot([], [], mark, color=colour, markersize=5.5, label=result.case.size)  # the legend's, filled
    axis.axvline(1.0, color="#000000", linewidth=0.8)
    axis.axhspan(names.index(AUTO) - 0.5, names.index(AUTO) + 0.5, color="#E69F00", alpha=0.18, linewidth=0)
    axis.set_yticks(range(len(names)), names)
    for label in axis.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() == AUTO else "normal")
        label.set_fontsize(8)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_title(TITLES[task], fontsize=10)
    axis.grid(True, which="major", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
