"""The folder of a run or a comparison: what may be written where, so that nothing is ever lost unasked.

`config.json` marks a folder as ours and says what was run there. A folder that holds something is refused unless
the user says `resume` (go on with exactly that) or `overwrite` (delete what it made, and nothing else).
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
    """Whether there is anything in the folder (a file of that name counts too).

    What a process leaves that was killed before it had written its `config.json` is nothing.
    """
    nothing = (LOCK, part_of(folder / CONFIG).name)
    return folder.exists() and (not folder.is_dir() or any(path.name not in nothing for path in folder.iterdir()))


def kind_of(folder: Path) -> str | None:
    """What `config.json` says that the folder holds; None if there is none of ours."""
    try:
        return str(json.loads((folder / CONFIG).read_text())["kind"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_config(folder: Path, kind: str) -> dict[str, Any]:
    """The configuration of the `kind` (`run`, `comparison`) that the folder holds, or a `FolderError`."""
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
    """Refuse to resume with options that differ from the held configuration; name every one."""
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
    """The configuration held in the folder, {} where it is free; a `FolderError` where something would be lost."""
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
    """Make the folder, or delete what an earlier `kind` made there (glob patterns), and write its `config.json`."""
    emptied = {folder}
    for pattern in made:
        for path in folder.glob(pattern):
            path.unlink()
            emptied.update(parent for parent in path.parents if folder in parent.parents)
    for directory in sorted(emptied - {folder}, reverse=True):  # the innermost first
        if not any(directory.iterdir()):
            directory.rmdir()
    folder.mkdir(parents=True, exist_ok=True)
    mark(folder, kind, config)


def mark(folder: Path, kind: str, config: Mapping[str, Any]) -> None:
    """Write `config.json`."""
    write_json(folder / CONFIG, {"kind": kind, "config": config})


@contextmanager
def claimed(folder: Path, check: Callable[[], Any]) -> Iterator[None]:
    """Make the folder, and keep every other process out of it inside the block; a `FolderError` where one is in it.

    `check` refuses what the folder holds: before anything is written, and under the lock once more, since until then
    another process may have been at work. The lock ends with the process, however that ends; a file that it leaves
    behind locks nothing. Folders made here in which nothing was written go again.
    """
    with needs_train_extra():
        from filelock import FileLock, Timeout
    check()
    made = [place for place in (folder, *folder.parents) if not place.exists()]  # the innermost first
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
        with suppress(OSError):  # there is something in the folder
            (folder / LOCK).unlink()  # while it is held: who opens it now is told by `filelock` that it is gone
            for place in made:
                place.rmdir()
        lock.release()
