"""A figure of the eigenvalues of each layer's covariance."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Mapping
from typing import Any, Protocol

from wellcond.experiments.show.figures import COLOURS, HEIGHT, STYLES

MAX_LEGEND = 8
"""Lines in a legend; for more, the colour encodes the depth in the network."""
MAX_NAME = 30
"""Characters of a layer's name beside the colour bar."""
MIN_RATIO = 1e-16
"""Smaller eigenvalues, relative to the largest, are drawn here."""


class Eigenvalues(Protocol):
    """The eigenvalues of a layer in descending order, and its numerical rank."""

    @property
    def eigvals(self) -> tuple[float, ...]: ...

    @property
    def numerical_rank(self) -> int: ...


def spectra_figure(spectra: Mapping[str, Eigenvalues], title: str) -> Any:
    """A matplotlib figure with one line per layer: eigenvalues relative to the largest, over their position from first
    (0) to last (1). Eigenvalues at rounding level are omitted: a rank-deficient line ends early, at a cross.
    """
    from matplotlib.figure import Figure  # not pyplot: no global state, faster import

    figure = Figure(figsize=(8.4, HEIGHT + 0.6), layout="constrained")
    figure.suptitle(textwrap.fill(title, 90), fontsize=11)
    axis = figure.subplots()
    few = len(spectra) <= MAX_LEGEND
    looks = zip(itertools.cycle(COLOURS), itertools.cycle(STYLES), strict=False) if few else _by_depth(len(spectra))
    short_of_rank = False
    for (name, found), (colour, style) in zip(spectra.items(), looks, strict=False):
        d, rank = len(found.eigvals), found.numerical_rank
        if rank == 0:
            continue
        places = [index / max(d - 1, 1) for index in range(rank)]
        sizes = [max(value / found.eigvals[0], MIN_RATIO) for value in found.eigvals[:rank]]
        label = f"{name} ({rank} of {d})"
        axis.plot(places, sizes, color=colour, linestyle=style, linewidth=1.7 if few else 1.1, label=label)
        if rank < d or d == 1:
            short_of_rank |= rank < d
            axis.plot(places[-1:], sizes[-1:], "x" if rank < d else "o", color=colour, markersize=6)
    axis.set_yscale("log")
    axis.set_xlim(-0.01, 1.01)
    axis.set_xlabel("position of the eigenvalue, from the largest (0) to the smallest (1)")
    axis.set_ylabel("eigenvalue relative to the largest;  last: 1/κ(P)")
    if short_of_rank:
        axis.set_title("×: rank-deficient covariance; the remaining eigenvalues are rounding noise", fontsize=9)
    axis.grid(True, which="major", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    if few:
        handles, names = axis.get_legend_handles_labels()
        names = [textwrap.fill(name, 34) for name in names]
        figure.legend(handles, names, loc="outside right center", frameon=False, handlelength=3.2)
    else:
        _depth_colour_bar(figure, axis, list(spectra))
    return figure


def _shortened(name: str) -> str:
    """The end of a long name, which distinguishes layers."""
    return name if len(name) <= MAX_NAME else f"…{name[1 - MAX_NAME :]}"


def _by_depth(count: int) -> Any:
    from matplotlib import colormaps

    colours = colormaps["viridis"]
    return ((colours(0.92 * index / (count - 1)), "-") for index in range(count))


def _depth_colour_bar(figure: Any, axis: Any, names: list[str]) -> None:
    """A colour bar labelled with the names of some layers."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    colours = ListedColormap(colormaps["viridis"]([0.92 * i / 255 for i in range(256)]))
    bar = figure.colorbar(ScalarMappable(Normalize(0, len(names) - 1), colours), ax=axis, pad=0.02)
    shown = [round(i * (len(names) - 1) / MAX_LEGEND) for i in range(MAX_LEGEND + 1)]
    bar.set_ticks(shown, labels=[_shortened(names[i]) for i in shown], fontsize=8)
    bar.outline.set_visible(False)
