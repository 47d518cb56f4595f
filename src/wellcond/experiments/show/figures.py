"""Figures: condition numbers over the steps (the paper's Figures 1–4), losses and errors over the epochs."""

from __future__ import annotations

import io
import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wellcond.experiments.files import write_atomically
from wellcond.experiments.run.result import RunResult
from wellcond.experiments.show.curves import BOTH, Panel, condition_panels, learning_panels

INK = "#1b1f24"
# Okabe & Ito (2008), distinguishable with any colour vision; line styles distinguish them without colour.
COLOURS = (INK, "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#B8A800")
READOUT_POINTS = 500  # per curve
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
"""Style for dark mode: black text, axes and curves become light, the background dark."""


def condition_figure(
    runs: Mapping[str, Sequence[RunResult]], title: str, stacked: bool = False, columns: Mapping[str, str] = BOTH
) -> Any:
    """A matplotlib figure of κ(P) and κ(P + εI) of the first layer over the steps; panels are `stacked` for phones.

    `runs` has the runs of all seeds by label; `columns` has the columns of `condition.csv` with their headings.
    """
    panels = condition_panels(runs, columns)
    figure = _figure(panels, title, "training step", stacked, sharey=True)
    for axis in figure.axes if stacked else figure.axes[:1]:
        axis.set_ylabel("condition number" if stacked or len(panels) == 1 else "condition number of the covariance")
    return figure


def learning_figure(runs: Mapping[str, Sequence[RunResult]], title: str, stacked: bool = False) -> Any:
    """A matplotlib figure of training loss and validation error (percent) over the epochs."""
    figure = _figure(learning_panels(runs), title, "epoch", stacked)
    for axis in figure.axes:
        axis.xaxis.get_major_locator().set_params(integer=True)
    return figure


def _figure(panels: Sequence[Panel], title: str, x: str, stacked: bool, **options: Any) -> Any:
    """The panels side by side or stacked."""
    from matplotlib.figure import Figure  # not pyplot: no global state, faster import

    width, title_width = (4.8, 50) if stacked else (7.5, 80) if len(panels) == 1 else (10.5, 110)
    figure = Figure(figsize=(width, HEIGHT), layout="constrained")
    figure.suptitle(textwrap.fill(title, title_width), fontsize=11)
    rows, columns = (len(panels), 1) if stacked else (1, len(panels))
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for axis, panel in zip(axes.flat, panels, strict=True):
        _draw(axis, panel, beside=not stacked)
        axis.set_xlabel(x)
        axis.grid(True, which="major", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        if panel.log:
            axis.set_yscale("log")
    return figure


def _draw(axis: Any, panel: Panel, beside: bool) -> None:
    """Draw the curves, with a band for the range over seeds; the first panel provides the legend."""
    axis.set_title(textwrap.fill(panel.heading, 46), fontsize=10)
    looks = zip(itertools.cycle(COLOURS), itertools.cycle(STYLES), strict=False)
    for (label, (x, middle, low, high)), (colour, style) in zip(panel.curves.items(), looks, strict=False):
        alone = "o" if len(x) == 1 else None  # a single point makes no line
        axis.plot(x, middle, color=colour, linestyle=style, linewidth=1.7, marker=alone, label=label)
        if low != high:
            axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    if not axis.figure.legends:
        handles, names = axis.get_legend_handles_labels()
        where, width = ("outside right center", 34) if beside else ("outside lower center", 44)
        names = [textwrap.fill(name, width).replace("$", r"\$") for name in names]  # no mathematics
        axis.figure.legend(handles, names, loc=where, frameon=False, handlelength=3.2)
        needed = sum(0.07 + 0.17 * (1 + name.count("\n")) for name in names)  # inches, at 10 points
        axis.figure.set_figheight(max(HEIGHT, needed + 0.5) if beside else 1.5 * HEIGHT + needed)


def readout(figure: Any) -> list[dict[str, Any]]:
    """The data of the page's readout for every panel of a drawn figure: its position (fractions of the figure, from the
    top left), its horizontal range, and up to 500 points of each curve."""
    panels = []
    for axis in figure.axes:
        box, curves = axis.get_position(), []
        for line in axis.get_lines():
            x, y = line.get_xdata(), line.get_ydata()
            some = range(0, len(x), max(1, math.ceil(len(x) / READOUT_POINTS)))
            values = [float(f"{y[i]:.4g}") if math.isfinite(y[i]) else None for i in some]
            curves.append(
                {"label": line.get_label(), "colour": line.get_color(), "x": [int(x[i]) for i in some], "y": values}
            )
        place = {"left": box.x0, "right": box.x1, "top": 1 - box.y1, "bottom": 1 - box.y0}
        panels.append({**place, "range": list(axis.get_xlim()), "curves": curves})
    return panels


def svg(figure: Any) -> bytes:
    """The figure as SVG with text as text, readable in dark mode."""
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
