"""Output folders of runs and comparisons, and the checks that nothing in them is lost by accident.

`config.json` marks a folder as ours and holds its configuration. A non-empty folder is rejected unless the user asks to
`resume` (continue exactly that) or to `overwrite` (delete our files, and nothing else).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from wellcond.experiments.errors import FolderError, needs_train_extra
from wellcond.experiments.files import part_of, write_json

CONFIG = "config.json"
LOCK = ".lock"


def is_occupied(folder: Path) -> bool:
    """Whether the folder is not empty, or is a file.

    Leftovers of a process that was killed before it wrote its `config.json` do not count.
    """
    leftovers = (LOCK, part_of(folder / CONFIG).name)
    return folder.exists() and (not folder.is_dir() or any(path.name not in leftovers for path in folder.iterdir()))


def kind_of(folder: Path) -> str | None:
    """The kind of folder according to its `config.json`; None if it is not ours."""
    try:
        return str(json.loads((folder / CONFIG).read_text())["kind"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_config(folder: Path, kind: str) -> dict[str, Any]:
    """The configuration of the `kind` (`run`, `comparison`) in the folder, or a `FolderError`."""
    path = folder / CONFIG
    if not path.exists():
        raise FolderError(f"'{folder}' holds no {kind} to resume; leave out --resume to start one there")
    try:
        marked = json.loads(path.read_text())
        held, config = marked["kind"], dict(marked["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise FolderError(f"'{path}' is not the configuration of a {kind} ({error})") from error
    if held != kind:
        raise FolderError(f"'{folder}' holds a {held}, not a {kind}; choose another --out")
    return config


def refuse_conflicts(held: Mapping[str, Any], asked: Mapping[str, Any], folder: Path) -> None:
    """Raise a `FolderError` that names all options that differ from the configuration in the folder."""
    differing = [
        f"{name} is {held.get(name)!r} there, {value!r} was asked"
        for name, value in asked.items()
        if held.get(name) != value
    ]
    if differing:
        raise FolderError(
            f"cannot resume '{folder}' with another configuration ({'; '.join(differing)}); leave the "
            "conflicting options out, or choose another --out"
        )


def check(
    folder: Path, kind: str, *, resume: bool = False, overwrite: bool = False, resumable: bool = True
) -> dict[str, Any]:
    """The configuration in the folder, {} if it is unused; a `FolderError` if data would be lost."""
    if resume and overwrite:
        raise FolderError("--resume and --overwrite exclude each other")
    if not resume and not is_occupied(folder):
        return {}
    if not resume and not (folder / CONFIG).exists():
        raise FolderError(f"'{folder}' holds files that no {kind} made; choose another --out")
    held = read_config(folder, kind)
    if not (resume or overwrite):
        go_on = "go on with it by --resume, " if resumable else ""
        raise FolderError(f"'{folder}' holds another {kind}; {go_on}delete it by --overwrite, or choose another --out")
    return held


def prepare(folder: Path, kind: str, config: Mapping[str, Any], made: Iterable[str]) -> None:
    """Create the folder, or delete the files `made` there before (glob patterns), and write `config.json`.

    Killed at any moment it leaves a folder that is still ours, in which nothing counts as finished that lacks files:
    results are deleted first, and `config.json` is replaced at the end.
    """
    emptied = {folder}
    found = {path for pattern in made for path in folder.glob(pattern)} - {folder / CONFIG}
    for path in sorted(found, key=lambda path: (path.name == CONFIG, not path.name.startswith("result"))):
        path.unlink()
        emptied.update(parent for parent in path.parents if folder in parent.parents)
    for directory in sorted(emptied - {folder}, reverse=True):  # innermost first
        if not any(directory.iterdir()):
            directory.rmdir()
    folder.mkdir(parents=True, exist_ok=True)
    mark(folder, kind, config)


def mark(folder: Path, kind: str, config: Mapping[str, Any]) -> None:
    """Write `config.json`."""
    write_json(folder / CONFIG, {"kind": kind, "config": config})


@contextmanager
def claimed(folder: Path, check: Callable[[], Any]) -> Iterator[None]:
    """Create the folder and lock it against other processes; a `FolderError` if another process holds the lock.

    `check` validates the content of the folder: before anything is written, and again under the lock, as another
    process may have written meanwhile. The lock is released however the process ends; a left-over lock file locks
    nothing. Folders created here are removed again if they remain empty.
    """
    with needs_train_extra():
        from filelock import FileLock, Timeout
    check()
    created = [place for place in (folder, *folder.parents) if not place.exists()]  # innermost first
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise FolderError(f"another process is at work in '{folder}': wait for it, or choose another --out") from None
    try:
        check()
        yield
    finally:
        with suppress(OSError):  # the folder is not empty
            (folder / LOCK).unlink()  # while locked: `filelock` detects that a waiting process opened a removed file
            for place in created:
                place.rmdir()
        lock.release()
