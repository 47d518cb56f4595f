"""Docstrings are written for the terminal too; here their shapes and short paragraphs are brought to the page.

``(N, C, *spatial)`` and ``|w|`` are marks of reStructuredText, and are escaped; ``^{1/2}`` becomes a power. ``Shape:``,
``Complexity:`` and ``Source:`` at the beginning of a paragraph are printed bold, as napoleon's headings are.
"""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx

MARKS = re.compile(r"(?<=, )\*(?=\w)|(?<=[·, (])\|(?=\w+\|)")
POWERS = re.compile(r"\^\{([^}`]+)\}")
HEADS = re.compile(r"^(Shape|Complexity|Source): ")


def for_the_page(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Change the lines of a docstring in place."""
    for i, line in enumerate(lines):
        parts = line.split("``")  # what is between two of these is literal
        for j in range(0, len(parts), 2):
            parts[j] = MARKS.sub(lambda mark: "\\" + mark[0], POWERS.sub(r"\\ :sup:`\1`\\ ", parts[j]))
        lines[i] = HEADS.sub(r"**\1:** ", "``".join(parts))


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", for_the_page, priority=400)  # before napoleon
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
