"""Inventories for intersphinx from a list of names in this folder, as nothing is fetched when the site is built.

A line of the list is ``NAME ROLE PATH``, under a line ``[PROJECT] ADDRESS``; ``$`` in a path stands for the name.
"""

from __future__ import annotations

import zlib
from pathlib import Path

HEAD = (
    "# Sphinx inventory version 2\n# Project: {}\n# Version: \n# The remainder of this file is compressed using zlib.\n"
)


def write_inventories(listed: Path, folder: Path) -> dict[str, tuple[str, str]]:
    """Write one inventory a project; what ``intersphinx_mapping`` wants to know of them."""
    names: dict[str, list[str]] = {}
    addresses: dict[str, str] = {}
    project = ""
    for line in filter(None, map(str.strip, listed.read_text(encoding="utf-8").splitlines())):
        if line.startswith("["):
            project, _, address = line[1:].partition("] ")
            addresses[project], names[project] = address, []
        elif not line.startswith("#"):
            name, role, path = line.split()
            names[project].append(f"{name} {role} 1 {path.replace('$', name)} -\n")
    for project, lines in names.items():
        body = zlib.compress("".join(lines).encode())
        (folder / f"{project}.inv").write_bytes(HEAD.format(project).encode() + body)
    return {project: (address, str(folder / f"{project}.inv")) for project, address in addresses.items()}
