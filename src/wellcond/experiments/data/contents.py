"""What is below a folder of images, and a line for whatever is passed over, so that nothing vanishes in silence."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
_FOLDERS_OF_TOOLS = frozenset({"__macosx", "__pycache__", "@eadir", "$recycle.bin"})
_SHOWN = 3


class Skipped:
    """What was passed over below `root`, by the reason."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._by_reason: defaultdict[str, list[str]] = defaultdict(list)

    def add(self, reason: str, path: Path) -> None:
        self._by_reason[reason].append(str(path.relative_to(self.root)))

    def lines(self) -> list[str]:
        """One for each reason, with the first names."""
        lines = []
        for reason, names in self._by_reason.items():
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            lines.append(f"skipped ({reason}): " + ", ".join(f"'{name}'" for name in names[:_SHOWN]) + more)
        return lines


def is_a_tools(name: str) -> bool:
    """Whether files and folders of this name are hidden, or made by a tool for itself (macOS, Jupyter, a NAS)."""
    return name.startswith(".") or name.lower() in _FOLDERS_OF_TOOLS


def files_below(folder: Path, skipped: Skipped, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Every file below `folder` in the order of their paths. Links are followed, unless they lead to a folder above."""
    inside = (*above, folder.resolve())
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        path = folder / entry.name
        kind = path if entry.is_symlink() else entry  # of a link into nowhere a path says no where an entry raises
        if is_a_tools(entry.name):
            skipped.add("hidden, or a tool's own", path)
        elif kind.is_dir():
            if path.resolve() in inside:
                skipped.add("a link to a folder that it is in", path)
            else:
                yield from files_below(path, skipped, inside)
        elif kind.is_file():
            yield path
        else:
            skipped.add("no file, or a link to none", path)
