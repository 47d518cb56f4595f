"""Condition numbers over the steps of training, the paper's Figures 1–4, and losses and errors over its epochs."""

from __future__ import annotations

import io
import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wellcond.experiments.files import read_csv, write_atomically
from wellcond.experiments.results.condition import condition_rows
from wellcond.experiments.run.result import CONDITION, METRICS, RunResult

INK = "#1b1f24"
# Okabe & Ito (2008), distinguishable with any colour vision; the line styles say the same without colour.
COLOURS = (INK, "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#B8A800")
HEIGHT = 4.4  # inches, of two panels side by side
STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))

DARK = """<style>
:root { color-scheme: light dark; }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 !important; }
[style*="stroke: #000000"], [style*="stroke: #1b1f24"] { stroke: #e6edf3 !important; }
[style*="fill: #1b1f24"] { fill: #e6edf3 !important; }
[style*="fill: #ffffff"] { fill: #0d1117 !important; }
}
</style>
"""
"""What an SVG says of the dark: what is black in it (text, axes, the first curve) is light, and the paper dark."""

Curve = tuple[list[int], list[float], list[float], list[float]]


def curve(runs: Sequence[RunResult], column: str) -> Curve:
    """Steps, median, minimum and maximum over `runs` of the first observed layer's `column`, where all recorded it.

    Infinite values stay infinite: matplotlib leaves a gap there.
    """
    layer = runs[0].conditions[0].layer
    return _over_seeds([table[table.layer == layer] for table in _tables(runs, CONDITION)], "step", column)


def _tables(runs: Sequence[RunResult], name: str) -> list[Any]:
    """A file of every run as a data frame, in which only `layer` is not a number.

    It ends with the result's last step or epoch: what comes after it is of the same run made longer.
    """
    import pandas as pd

    def number(text: str) -> float:
        return float("nan" if text == "" else text)  # pandas' own reader does not keep the last digit

    rows = (condition_rows(run) if name == CONDITION else read_csv(Path(run.folder) / name) for run in runs)
    frames = [pd.DataFrame(found) for found in rows]
    frames = [frame.apply(lambda column: column if column.name == "layer" else column.map(number)) for frame in frames]
    ends = [run.steps if name == CONDITION else run.config.epochs for run in runs]
    column = "step" if name == CONDITION else "epoch"
    return [frame[frame[column] < end] for frame, end in zip(frames, ends, strict=True)]


def _over_seeds(tables: Sequence[Any], x: str, y: str) -> Curve:
    import pandas as pd

    found: Any = pd.concat([table.set_index(table[x].astype(int))[y] for table in tables], axis=1, join="inner")
    middle, low, high = found.median(axis=1), found.min(axis=1), found.max(axis=1)
    return found.index.tolist(), middle.tolist(), low.tolist(), high.tolist()


def condition_figure(runs: Mapping[str, Sequence[RunResult]], title: str, stacked: bool = False) -> Any:
    """κ(P) and κ(P + εI) of the first observed layer over the steps, side by side, as a matplotlib figure.

    `runs` has for each label its runs, one for each seed. A `stacked` figure has one panel over the other, for phones.
    """
    figure, axes = _two_panels(title, "training step", stacked, sharey=True)
    headings = {"kappa": "without ε:  κ(P)", "kappa_eps": "with ε:  κ(P + εI), what the solver sees"}
    for axis, (column, heading) in zip(axes, headings.items(), strict=True):
        curves = {}
        for label, results in runs.items():
            found = curve(results, column)
            gaps = sum(math.isinf(value) for value in found[1])
            curves[label if not gaps else f"{label} (κ(P) infinite at {gaps} of {len(found[1])})"] = found
        _draw(axis, curves, heading)
        axis.set_yscale("log")
    for axis in axes if stacked else axes[:1]:
        axis.set_ylabel("condition number" if stacked else "condition number of the covariance")
    return figure


def learning_figure(runs: Mapping[str, Sequence[RunResult]], title: str, stacked: bool = False) -> Any:
    """Training loss and validation error (percent) over the epochs, side by side, as a matplotlib figure."""
    figure, axes = _two_panels(title, "epoch", stacked)
    tables = {
        label: [t.assign(epoch=t.epoch + 1, val_error=100 * t.val_error) for t in _tables(results, METRICS)]
        for label, results in _with(METRICS, runs).items()
    }
    headings = {"train_loss": "training loss", "val_error": "validation error, %"}
    for axis, (column, heading) in zip(axes, headings.items(), strict=True):
        _draw(axis, {label: _over_seeds(found, "epoch", column) for label, found in tables.items()}, heading)
        axis.xaxis.get_major_locator().set_params(integer=True)
    return figure


def _with(name: str, runs: Mapping[str, Sequence[RunResult]]) -> dict[str, list[RunResult]]:
    """The runs that have the file: those that were read from a table of results have no folder."""
    found = {label: [run for run in results if (Path(run.folder) / name).exists()] for label, results in runs.items()}
    return {label: results for label, results in found.items() if results}


def _two_panels(title: str, x: str, stacked: bool, **options: Any) -> tuple[Any, Any]:
    """An empty figure of two panels, side by side or one over the other."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no window, and quicker to import

    figure = Figure(figsize=(4.8 if stacked else 10.5, HEIGHT), layout="constrained")
    figure.suptitle(textwrap.fill(title, 50) if stacked else title, fontsize=11)
    axes = figure.subplots(*((2, 1) if stacked else (1, 2)), **options)
    for axis in axes:
        axis.set_xlabel(x)
        axis.grid(True, which="major", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _draw(axis: Any, curves: Mapping[str, Curve], heading: str) -> None:
    """The curves, with a band where they differ between seeds; the first panel has the legend of both."""
    axis.set_title(heading, fontsize=10)
    looks = zip(itertools.cycle(COLOURS), itertools.cycle(STYLES), strict=False)
    for (label, (x, middle, low, high)), (colour, style) in zip(curves.items(), looks, strict=False):
        alone = "o" if len(x) == 1 else None  # of one point there is no line
        axis.plot(x, middle, color=colour, linestyle=style, linewidth=1.7, marker=alone, label=label)
        if low != high:
            axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    if not axis.figure.legends:
        handles, names = axis.get_legend_handles_labels()
        beside = axis.get_subplotspec().get_gridspec().ncols > 1
        where, width = ("outside right center", 34) if beside else ("outside lower center", 44)
        names = [textwrap.fill(name, width) for name in names]
        axis.figure.legend(handles, names, loc=where, frameon=False, handlelength=3.2)
        needed = sum(0.07 + 0.17 * (1 + name.count("\n")) for name in names)  # inches, at 10 points
        axis.figure.set_figheight(max(HEIGHT, needed + 0.5) if beside else 1.5 * HEIGHT + needed)


def svg(figure: Any) -> bytes:
    """The figure as SVG, in which text stays text, and which is readable in the dark."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "wellcond"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue().replace(b"</svg>", DARK.encode() + b"</svg>")


def save_figure(figure: Any, stem: Path) -> list[Path]:
    """Write `stem.png` and `stem.svg`, atomically."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    paths = [stem.with_suffix(suffix) for suffix in (".png", ".svg")]
    for path, content in zip(paths, (png.getvalue(), svg(figure)), strict=True):
        write_atomically(path, content)
    return paths
