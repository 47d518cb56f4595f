"""Listing the files in a folder of images, with a note on everything skipped."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
_FOLDERS_OF_TOOLS = frozenset({"__macosx", "__pycache__", "@eadir", "$recycle.bin"})
_MAX_SHOWN = 3


class Skipped:
    """The paths skipped below `root`, by reason."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._by_reason: defaultdict[str, list[str]] = defaultdict(list)

    def add(self, reason: str, path: Path) -> None:
        self._by_reason[reason].append(str(path.relative_to(self.root)))

    def lines(self) -> list[str]:
        """One line per reason, with the first few names."""
        lines = []
        for reason, names in self._by_reason.items():
            more = f" and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else ""
            lines.append(f"skipped ({reason}): " + ", ".join(f"'{name}'" for name in names[:_MAX_SHOWN]) + more)
        return lines


def is_hidden_or_tool(name: str) -> bool:
    """Whether the name is that of a hidden file or folder, or of one that a tool creates (macOS, Jupyter, a NAS)."""
    return name.startswith(".") or name.lower() in _FOLDERS_OF_TOOLS


def files_below(folder: Path, skipped: Skipped, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """All files below `folder` in path order. Links are followed, except to a parent folder."""
    parents = (*above, folder.resolve())
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        path = folder / entry.name
        kind = path if entry.is_symlink() else entry  # for a broken link DirEntry.is_dir may raise, Path.is_dir not
        if is_hidden_or_tool(entry.name):
            skipped.add("hidden, or a tool's own", path)
        elif kind.is_dir():
            if path.resolve() in parents:
                skipped.add("a link to a parent folder", path)
            else:
                yield from files_below(path, skipped, parents)
        elif kind.is_file():
            yield path
        else:
            skipped.add("not a file, or a broken link", path)
