"""A table as data, before it is shown on the terminal, in Markdown or on a page; and how its numbers are written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

SPACE = "\N{NO-BREAK SPACE}"
"""At which no heading is broken."""


class Strong(str):
    """A cell in bold, such as the best of its column."""

    __slots__ = ()


class Column(NamedTuple):
    """A heading, whether its cells are text (flush left), and whether it is too much for the terminal's 80 columns."""

    head: str
    text: bool = False
    wide: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of cells under columns; a heading alone stands for a column of numbers, the first for one of text."""

    heads: Sequence[str | Column]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    title: str = ""

    @property
    def columns(self) -> list[Column]:
        """The columns, all of them spelt out."""
        return [head if isinstance(head, Column) else Column(head, text=i == 0) for i, head in enumerate(self.heads)]


def number(value: float) -> str:
    """Three digits: `1.23e+04` where that is shorter."""
    return f"{value:.2e}" if math.isfinite(value) and value >= 1e4 else f"{value:.3g}"


def percent(fraction: float) -> str:
    """A fraction in percent, to two places."""
    return f"{100 * fraction:.2f}"


def rank(value: float, dim: int) -> str:
    """A (median) rank out of the dimension."""
    return f"{value:g}/{dim}"


def short(layer: str) -> str:
    """The name of a layer without that of the network it is in."""
    return layer.removeprefix("model.")
