"""``{command-options} train``: the options of one of wellcond's commands as a table, read from the command itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from wellcond.cli import app as command_line


class CommandOptions(SphinxDirective):
    """A table of names and meanings; the default is in the meaning, as ``--help`` has it."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        group: Any = typer.main.get_command(command_line)
        command = group.commands[self.arguments[0]]
        about = nodes.paragraph(text=" ".join(str(command.help).split()))
        rows = [row for parameter in command.params if (row := self.row(parameter)) and not parameter.hidden]
        table, layout = nodes.table(classes=["command-options"]), nodes.tgroup(cols=2)
        layout += [nodes.colspec(colwidth=30), nodes.colspec(colwidth=70), nodes.tbody("", *rows)]
        table += layout
        return [about, table]

    def row(self, parameter: Any) -> nodes.row:
        is_argument = parameter.param_type_name == "argument"
        names = parameter.name.upper() if is_argument else " / ".join([*parameter.opts, *parameter.secondary_opts])
        help, default = str(parameter.help or ""), parameter.default
        if isinstance(default, (str, int, Path)) and not isinstance(default, bool) and "default" not in help:
            help += f" (default {default})"
        entry = nodes.entry("", nodes.paragraph("", "", nodes.literal(text=names)))
        return nodes.row("", entry, nodes.entry("", nodes.paragraph(text=help)))


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("command-options", CommandOptions)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
