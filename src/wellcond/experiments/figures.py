"""Condition numbers over the steps of training, the paper's Figures 1–4, and losses and errors over its epochs."""

from __future__ import annotations

import io
import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from wellcond.experiments.files import read_csv, write_atomically
from wellcond.experiments.results import CONDITION, METRICS

# Okabe & Ito (2008), distinguishable with any colour vision; the line styles say the same without colour.
COLOURS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#B8A800")
STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))

Curve = tuple[list[int], list[float], list[float], list[float]]


def curve(runs: Sequence[Path], layer: str, column: str) -> Curve:
    """Steps, median, minimum and maximum over `runs` (folders) of `column`, at the steps that all recorded.

    Infinite values stay infinite: matplotlib leaves a gap there.
    """
    return _over_seeds(
        {int(row["step"]): float(row[column]) for row in read_csv(run / CONDITION) if row["layer"] == layer}
        for run in runs
    )


def _over_seeds(runs: Iterable[Mapping[int, float]]) -> Curve:
    series = list(runs)
    steps = sorted(set.intersection(*(set(one) for one in series)))
    values = [[one[step] for one in series] for step in steps]
    return steps, [statistics.median(v) for v in values], [min(v) for v in values], [max(v) for v in values]


def condition_figure(runs: Mapping[str, Sequence[Path]], layers: Mapping[str, str], title: str) -> Any:
    """κ(P) and κ(P + εI) over the steps, side by side, as a matplotlib figure.

    Args:
        runs: for each label the folders of its runs, one for each seed.
        layers: for each label the observed layer to draw.
        title: above the figure.
    """
    from matplotlib.figure import Figure  # not pyplot: no global state, no window, and quicker to import

    figure = Figure(figsize=(10.5, 4.4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    headings = {"kappa": "without ε:  κ(P)", "kappa_eps": "with ε:  κ(P + εI), what the solver sees"}
    for axis, (column, heading) in zip(axes, headings.items(), strict=True):
        for (label, folders), (colour, style) in zip(runs.items(), _looks(), strict=False):
            steps, middle, low, high = curve(folders, layers[label], column)
            gaps = sum(math.isinf(value) for value in middle)
            name = label if not gaps else f"{label} (κ(P) infinite at {gaps} of {len(middle)})"
            axis.plot(steps, middle, color=colour, linestyle=style, linewidth=1.7, label=name)
            if len(folders) > 1:
                axis.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.set_yscale("log")
        axis.set_title(heading, fontsize=10)
        axis.set_xlabel("training step")
        axis.grid(True, which="major", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("condition number of the covariance")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", frameon=False, handlelength=3.2)
    figure.suptitle(title, fontsize=11)
    return figure


def learning_figure(runs: Mapping[str, Sequence[Path]], title: str) -> Any:
    """Training loss and validation error (percent) over the epochs, side by side; arguments as `condition_figure`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.4), layout="constrained")
    axes = figure.subplots(1, 2)
    headings = {"train_loss": ("training loss", 1), "val_error": ("validation error, %", 100)}
    for axis, (column, (heading, unit)) in zip(axes, headings.items(), strict=True):
        for (label, folders), (colour, style) in zip(runs.items(), _looks(), strict=False):
            epochs, middle, low, high = _over_seeds(
                {int(row["epoch"]) + 1: unit * float(row[column]) for row in read_csv(folder / METRICS)}
                for folder in folders
            )
            axis.plot(epochs, middle, color=colour, linestyle=style, linewidth=1.7, label=label)
            if len(folders) > 1:
                axis.fill_between(epochs, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.set_title(heading, fontsize=10)
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(True, which="major", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", frameon=False, handlelength=3.2)
    figure.suptitle(title, fontsize=11)
    return figure


def _looks() -> Iterable[Any]:
    return zip(itertools.cycle(COLOURS), itertools.cycle(STYLES), strict=False)


def save_figure(figure: Any, stem: Path) -> list[Path]:
    """Write `stem.png` and `stem.svg`, atomically; the text of the SVG stays text."""
    import matplotlib

    paths = []
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "wellcond"}):
        for suffix, options in ((".png", {"dpi": 150}), (".svg", {"metadata": {"Date": None}})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=suffix[1:], **options)
            paths.append(stem.with_suffix(suffix))
            write_atomically(paths[-1], buffer.getvalue())
    return paths
