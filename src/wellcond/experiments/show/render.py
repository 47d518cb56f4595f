"""Rendering of tables on the terminal (rich), in Markdown, and in HTML (template ``page.html``)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from wellcond.experiments.results.table import Strong, Table


def for_terminal(table: Table) -> Any:
    """A `rich.table.Table` without the wide columns, to fit 80 columns.

    Headings wrap at spaces, text cells where needed, numbers never.
    """
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    columns = [(index, column) for index, column in enumerate(table.columns) if not column.wide]
    shown = RichTable(
        title=Text(table.title, "table.title"),
        caption=Text(table.caption, "table.caption"),
        box=box.SIMPLE_HEAVY,
        show_header=any(column.head for _, column in columns),
        pad_edge=False,
        collapse_padding=True,
    )
    for _, column in columns:
        # Shapes are split after the batch size, so that many fit side by side.
        head = column.head.replace("×", "×\n", 1) if column.head[:1].isdigit() else column.head.replace(" ", "\n")
        justify = "left" if column.text else "right"
        shown.add_column(head, justify=justify, vertical="bottom", no_wrap=not column.text, overflow="fold")
    for row in table.rows:
        cells = [row[index] for index, _ in columns]
        shown.add_row(*(Text(cell, style="bold" if isinstance(cell, Strong) else "") for cell in cells))
    return shown


def for_markdown(table: Table) -> str:
    """A Markdown table; numbers are right-aligned."""

    def escaped(cell: str) -> str:
        return re.sub(r"([\\|*`<\[]|\b_|_\b)", r"\\\1", cell)  # within a word an underscore is one

    rule = ["---" if column.text else "---:" for column in table.columns]
    rows = [
        [f"**{escaped(cell)}**" if isinstance(cell, Strong) else escaped(cell) for cell in row] for row in table.rows
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in [[c.head for c in table.columns], rule, *rows])


def page(**parts: Any) -> str:
    """The self-contained HTML page; `parts` are the variables of its template."""
    from markupsafe import Markup

    script = Markup((Path(__file__).parent / "page.js").read_text(encoding="utf-8"))
    return _templates(autoescape=True).get_template("page.html").render(parts, script=script)


def markdown_page(**parts: Any) -> str:
    """The same in Markdown, with the figures as separate files."""
    return _templates(autoescape=False).get_template("page.md").render(parts)


def _templates(autoescape: bool) -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.tests["strong"] = lambda cell: isinstance(cell, Strong)
    templates.filters["markdown"] = for_markdown
    return templates
