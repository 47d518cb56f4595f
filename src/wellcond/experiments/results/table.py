"""Tables as data, to be rendered on the terminal, in Markdown or in HTML, and the formatting of their numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

SPACE = "\N{NO-BREAK SPACE}"


class Strong(str):
    """A cell in bold, such as the best of its column."""

    __slots__ = ()


class Column(NamedTuple):
    """A column: its heading, whether it is text (left-aligned), and whether it is omitted on an 80-column terminal."""

    head: str
    text: bool = False
    wide: bool = False


@dataclass(frozen=True)
class Table:
    """A table. A plain string as heading means a column of numbers, or of text for the first column."""

    heads: Sequence[str | Column]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    title: str = ""

    @property
    def columns(self) -> list[Column]:
        """All columns as `Column`."""
        return [head if isinstance(head, Column) else Column(head, text=i == 0) for i, head in enumerate(self.heads)]


def number(value: float) -> str:
    """Three significant digits, in exponential notation from 1e4."""
    return f"{value:.2e}" if math.isfinite(value) and value >= 1e4 else f"{value:.3g}"


def percent(fraction: float) -> str:
    """A fraction in percent, with two decimals."""
    return f"{100 * fraction:.2f}"


def rank(value: float, dim: int) -> str:
    """A (median) rank and the dimension, as `12/16`."""
    return f"{value:g}/{dim}"


def short(layer: str) -> str:
    """The name of a layer without the prefix of the network."""
    return layer.removeprefix("model.")
