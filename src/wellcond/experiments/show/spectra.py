"""The eigenvalues of each layer's covariance, as a picture: where they end is the condition number."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Mapping
from typing import Any, Protocol

from wellcond.experiments.show.figures import COLOURS, HEIGHT, STYLES

FEW = 8
"""Lines that a legend tells apart; of more, colour says how deep in the network the layer is."""
LONGEST = 30
"""Letters of a name beside the bar of the colours."""
LEAST = 1e-16
"""Of the largest: what is below is drawn there."""


class Eigenvalues(Protocol):
    """Of one layer, falling, of which so many are more than rounding."""

    @property
    def eigvals(self) -> tuple[float, ...]: ...

    @property
    def numerical_rank(self) -> int: ...


def spectra_figure(spectra: Mapping[str, Eigenvalues], title: str) -> Any:
    """Eigenvalues over the largest on a log axis, against their place from the first (0) to the last (1), one line a
    layer, as a matplotlib figure. What is rounding is left out: a line that ends early, at a cross, is rank-deficient.
    """
    from matplotlib.figure import Figure  # not pyplot: no global state, no window, and quicker to import

    figure = Figure(figsize=(8.4, HEIGHT + 0.6), layout="constrained")
    figure.suptitle(textwrap.fill(title, 90), fontsize=11)
    axis = figure.subplots()
    few = len(spectra) <= FEW
    looks = zip(itertools.cycle(COLOURS), itertools.cycle(STYLES), strict=False) if few else _by_depth(len(spectra))
    short_of_rank = False
    for (name, found), (colour, style) in zip(spectra.items(), looks, strict=False):
        d, rank = len(found.eigvals), found.numerical_rank
        if rank == 0:
            continue
        places = [index / max(d - 1, 1) for index in range(rank)]
        sizes = [max(value / found.eigvals[0], LEAST) for value in found.eigvals[:rank]]
        label = f"{name} ({rank} of {d})"
        axis.plot(places, sizes, color=colour, linestyle=style, linewidth=1.7 if few else 1.1, label=label)
        if rank < d or d == 1:
            short_of_rank |= rank < d
            axis.plot(places[-1:], sizes[-1:], "x" if rank < d else "o", color=colour, markersize=6)
    axis.set_yscale("log")
    axis.set_xlim(-0.01, 1.01)
    axis.set_xlabel("place among the eigenvalues, from the largest (0) to the smallest (1)")
    axis.set_ylabel("eigenvalue over the largest;  at its end 1/κ(P)")
    if short_of_rank:
        axis.set_title("×: what follows is rounding, the covariance is rank-deficient", fontsize=9)
    axis.grid(True, which="major", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    if few:
        handles, names = axis.get_legend_handles_labels()
        names = [textwrap.fill(name, 34) for name in names]
        figure.legend(handles, names, loc="outside right center", frameon=False, handlelength=3.2)
    else:
        _scale_of_depth(figure, axis, list(spectra))
    return figure


def _end(name: str) -> str:
    """The last letters of a long name, which tell layers apart."""
    return name if len(name) <= LONGEST else f"…{name[1 - LONGEST :]}"


def _by_depth(count: int) -> Any:
    from matplotlib import colormaps

    colours = colormaps["viridis"]
    return ((colours(0.92 * index / (count - 1)), "-") for index in range(count))


def _scale_of_depth(figure: Any, axis: Any, names: list[str]) -> None:
    """A bar of the colours, with the first, the last and a few layers between by name."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    colours = ListedColormap(colormaps["viridis"]([0.92 * i / 255 for i in range(256)]))
    bar = figure.colorbar(ScalarMappable(Normalize(0, len(names) - 1), colours), ax=axis, pad=0.02)
    shown = [round(i * (len(names) - 1) / FEW) for i in range(FEW + 1)]
    bar.set_ticks(shown, labels=[_end(names[i]) for i in shown], fontsize=8)
    bar.outline.set_visible(False)
