"""Docstrings are written for the terminal too; here their shapes and short paragraphs are brought to the page.

``(N, C, *spatial)`` and ``|w|`` are marks of reStructuredText, and are escaped. ``Shape:``, ``Complexity:`` and ``Source:`` at
the beginning of a paragraph are printed bold, as the headings of napoleon's sections are.
"""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx

MARKS = re.compile(r"(?<=, )\*(?=\w)|(?<=[·, (])\|(?=\w+\|)")
HEADS = re.compile(r"^(Shape|Complexity|Source): ")


def for_the_page(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Change the lines of a docstring in place."""
    for i, line in enumerate(lines):
        parts = line.split("``")  # what is between two of these is literal
        parts[::2] = [MARKS.sub(lambda mark: "\\" + mark[0], part) for part in parts[::2]]
        lines[i] = HEADS.sub(r"**\1:** ", "``".join(parts))


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", for_the_page, priority=400)  # before napoleon
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
