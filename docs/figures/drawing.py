"""How the figures of the landing page are drawn: curves with their names beside them, on a light and on a dark page."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

IMAGES = Path(__file__).parents[1] / "images"
INK = {"light": "#1f2328", "dark": "#e6e8eb"}
# Okabe and Ito's colours, those too dark or too pale for one of the pages replaced there.
COLOURS = {
    "light": ("#0072b2", "#d55e00", "#008060", "#aa4a8a", "#8a6d00", "#5b6470", "#1f2328"),
    "dark": ("#56b4e9", "#ff8c42", "#3cc79a", "#e295c4", "#e0c030", "#a7b0bb", "#e6e8eb"),
}
BOLD = ("factor form", "none", "nog+ow+olr")

Curves = dict[str, tuple[list[float], list[float]]]


def spread(heights: list[float], least: float) -> list[float]:
    """Heights for labels, kept at least so far apart, in the order given by the heights."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    placed = list(heights)
    for below, above in itertools.pairwise(order):
        placed[above] = max(placed[above], placed[below] + least)
    return placed


def label_ends(axis: Any, curves: Curves, colours: tuple[str, ...], least: float) -> None:
    """Draw curves and write each one's name where it ends, in its colour; no legend to look up."""
    ends = []
    for (name, (x, y)), colour in zip(curves.items(), colours, strict=False):
        axis.plot(x, y, color=colour, lw=2.6 if name in BOLD else 1.7)
        last = max(i for i, value in enumerate(y) if math.isfinite(value))
        ends.append((name, x[last], y[last], colour, last + 1 == len(y)))
    heights = spread([math.log10(y) for _, _, y, _, _ in ends], least)
    for (name, x, y, colour, whole), height in zip(ends, heights, strict=True):
        if whole:
            axis.annotate(name, (1.015, 10**height), xycoords=("axes fraction", "data"), color=colour, va="center")
        else:
            axis.plot([x], [y], "x", color=colour, ms=8, mew=2)
            axis.annotate(f"{name}: not finite from here on", (x, y), (0, 9), textcoords="offset points", color=colour)


def panel(axis: Any, title: str, page: str) -> None:
    """A title over a logarithmic panel, and everything in it in the ink of the page."""
    axis.set_yscale("log")
    axis.set_title(title, loc="left", fontsize=11, color=INK[page])
    axis.tick_params(colors=INK[page], which="both")
    axis.xaxis.label.set_color(INK[page])
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(INK[page])
    axis.grid(alpha=0.2, color=INK[page], lw=0.6)


def save(stem: str, draw: Callable[[str], Figure], folder: Path) -> None:
    """The figure for each page, the same bytes for the same numbers."""
    mpl.rcParams |= {"font.size": 10.5, "svg.hashsalt": "wellcond"}
    folder.mkdir(parents=True, exist_ok=True)
    for page in INK:
        draw(page).savefig(folder / f"{stem}-{page}.svg", transparent=True, metadata={"Date": None})
