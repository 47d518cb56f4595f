"""Look-up by name with "did you mean", and tables of text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches

MOST_SHOWN = 20
NEAREST_SHOWN = 5


def require_known(
    name: object,
    known: Iterable[str],
    kind: str,
    where: str = "",
    error: type[Exception] = ValueError,
    also_called: Mapping[str, str] | None = None,
) -> None:
    """Raise ``error`` for a name that is not among ``known``, suggesting the nearest.

    ``also_called`` maps aliases to known names: they are used for suggestions, and are not valid names themselves.
    """
    known = list(known)
    if name not in known:
        raise error(f"unknown {kind} {name!r}{where}{choices(name, known, also_called)}")


def choices(name: object, known: Iterable[str], also_called: Mapping[str, str] | None = None) -> str:
    """``; did you mean 'x'? (known: …)``; of a long list, only the nearest names are shown."""
    known = [k for k in known if k]
    if len(known) <= MOST_SHOWN:
        return f"{did_you_mean(name, known, also_called)} (known: {listed(known)})"
    near = get_close_matches(str(name), known, n=NEAREST_SHOWN, cutoff=0.3)
    nearest = f"the nearest of {len(known)} known: {listed(near)}" if near else f"{len(known)} are known"
    return f"{did_you_mean(name, known, also_called)} ({nearest})"


def did_you_mean(name: object, known: Iterable[str], also_called: Mapping[str, str] | None = None) -> str:
    """``; did you mean 'x'?`` with the nearest known name, or an empty string if none is near."""
    by_lower = {**(also_called or {}), **{k.lower(): k for k in known}}
    near = get_close_matches(str(name).lower(), by_lower, n=1, cutoff=0.5)
    return f"; did you mean '{by_lower[near[0]]}'?" if near else ""


def listed(names: Iterable[str]) -> str:
    """The names, separated by commas; of a long list only the first ones."""
    names = [name for name in names if name]
    more = f" and {len(names) - MOST_SHOWN} more" if len(names) > MOST_SHOWN else ""
    return ", ".join(names[:MOST_SHOWN]) + more


def aligned(rows: Iterable[Sequence[str]]) -> str:
    """Rows of cells as aligned columns of text, with a rule below the first row."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)
