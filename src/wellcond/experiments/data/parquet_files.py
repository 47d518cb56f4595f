"""Parquet files in the hub's layout: `train-00000-of-00001.parquet` or `train/0000.parquet`."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wellcond._shared.names import listed
from wellcond.experiments.data.splits import may_mean_a_split, split_of, split_of_file
from wellcond.experiments.data.tables import holds_images
from wellcond.experiments.errors import DataError, needs_train_extra

if TYPE_CHECKING:
    import datasets


def from_parquet(path: Path, files: Sequence[Path]) -> datasets.DatasetDict:
    """The tables of `files`, located in the folder `path` or equal to it, by split."""
    with needs_train_extra():
        import datasets

    splits = _by_split(path, files)
    try:
        return datasets.load_dataset(
            "parquet", data_files={s: [glob.escape(str(f)) for f in found] for s, found in splits.items()}
        )
    except Exception as error:  # many types, from pyarrow and datasets
        cause = error.__cause__ or error
        raise DataError(f"'{path}': the parquet files cannot be read together ({cause})") from error


def with_images(files: Sequence[Path]) -> list[Path]:
    """The Parquet files with an image column in their schema, and damaged ones, which may have one."""
    with needs_train_extra():
        import datasets
        import pyarrow.parquet as pq

    def may_have_images(file: Path) -> bool:
        try:
            return holds_images(datasets.Features.from_arrow_schema(pq.read_schema(file)))
        except Exception:  # any type, from pyarrow and datasets
            return True

    return [file for file in files if may_have_images(file)]


def _by_split(path: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
    """The files of each split, by file or folder name; if no name is that of a split, all are for training."""
    known: dict[str, list[Path]] = {}
    unknown: list[Path] = []
    homes: set[Path] = set()  # folders that hold the splits
    root = path if path.is_dir() else path.parent
    for file in files:
        split, home = split_of_file(file.stem), file.parent
        if split is None and home != root and split_of(home.name):
            split, home = split_of(home.name), home.parent
        known.setdefault(split, []).append(file) if split else unknown.append(file)
        homes.add(home)
    if len(homes) > 1:
        raise DataError(
            f"'{path}' holds parquet files of several data sets; name one: "
            + ", ".join(f"'{home}'" for home in sorted(homes))
        )
    if unknown and (known or (len(files) > 1 and any(may_mean_a_split(file.stem) for file in unknown))):
        raise DataError(
            f"'{path}': which split are {listed([file.name for file in unknown][:5])} of? "
            "Name the files train-*.parquet, validation-*.parquet, test-*.parquet"
        )
    return known or {"train": unknown}
