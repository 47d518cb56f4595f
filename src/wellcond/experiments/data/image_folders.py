"""Image folders: one folder per class, optionally inside one folder per split.

    DIR/CLASS/…/file                or                DIR/{train,validation,test}/CLASS/…/file

The layouts are distinguished by exact names and by the position of the images: a split contains folders, a class
contains images, so that `train` next to `bus` is a class. Ambiguous folders raise an error.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wellcond._shared.names import did_you_mean, listed
from wellcond.experiments.data.contents import Skipped, is_hidden_or_tool
from wellcond.experiments.data.splits import by_split, may_mean_a_split, split_of
from wellcond.experiments.errors import DataError

if TYPE_CHECKING:
    import datasets

Parts = tuple[str, ...]
"""The path of an image, relative to some folder."""


def from_image_folders(
    path: Path, files: Sequence[Path], skipped: Skipped
) -> tuple[dict[str, datasets.Dataset], list[str]]:
    """The images `files` below `path` as data sets of paths and labels by split, and notes.

    `load_dataset("imagefolder")` is not used as it takes a minute to list the 60,000 files of CIFAR-10 every time.
    """
    import datasets

    images = [file.relative_to(path).parts for file in files]
    folders = split_folders(path, images)
    if not folders:
        by_class = {"train": _classes(path, images, skipped)}
    else:
        by_class = {
            split: _classes(path / name, [image[1:] for image in images if image[0] == name], skipped)
            for split, name in folders.items()
        }
        _classes(path, images, skipped)  # notes files and folders outside the splits
    classes = sorted(by_class["train"])
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=classes)})
    tables, notes = {}, []
    for split, found in by_class.items():
        root = path / folders.get(split, "")
        if unknown := sorted(found.keys() - set(classes)):
            raise DataError(
                f"'{root}' has folders of classes that training lacks: {listed(unknown[:5])}"
                f"{did_you_mean(unknown[0], classes)}; remove them, or add them to training"
            )
        if found:
            rows = [(os.path.join(root, *image), c) for c, name in enumerate(classes) for image in found.get(name, ())]
            paths, labels = (list(column) for column in zip(*rows, strict=True))
            if invalid := next((path for path in paths if re.search("[\ud800-\udfff]", path)), None):
                raise DataError(
                    f"the file name {os.fsencode(invalid)!r} is not UTF-8: rename the file, or set PYTHONUTF8=1"
                )
            tables[split] = datasets.Dataset.from_dict({"image": paths, "label": labels}, features=features)
        else:
            notes.append(f"'{root.name}' has no folders of classes: split '{split}' is not used")
    return tables, notes


def split_folders(path: Path, images: Sequence[Parts]) -> dict[str, str]:
    """The name of each split's folder in `path`; {} if the folders are classes.

    Raises:
        DataError: no images in folders, or folders that may be either splits or classes.
    """
    folders = sorted({image[0] for image in images if len(image) > 1})
    if not folders:
        inside = listed(sorted(p.name for p in path.iterdir())) or "nothing"
        raise DataError(
            f"'{path}' has neither parquet files (train-*.parquet, test-*.parquet) nor images in one folder per class "
            f"(train/CLASS/*.png, test/CLASS/*.png); it holds: {inside}"
        )
    nested = {image[0] for image in images if len(image) > 2}  # folders with subfolders of images
    named = [name for name in folders if split_of(name)]
    others = [name for name in folders if name not in named]
    as_classes = f"if they are classes, move them all to '{path / 'train'}'"
    if others and nested.intersection(named):
        raise DataError(
            f"'{path}' has splits ({listed(named)}) next to other folders of images ({listed(others)}): "
            f"remove the others; {as_classes}"
        )
    if others and all(len(image) != 2 for image in images) and all(map(may_mean_a_split, folders)):
        raise DataError(
            f"'{path}' has folders that may be splits ({listed(folders)}): rename them to train, validation and test; "
            f"{as_classes}"
        )
    if others:
        _refuse_inner_splits(path, images)
        return {}
    splits = by_split(f"'{path}'", named)
    if splits.get("train") not in nested:
        lacks = f"no folders of classes in '{splits['train']}'" if "train" in splits else "no folder 'train'"
        raise DataError(f"'{path}' has images in {listed(named)}, but {lacks}: make train/CLASS/…; {as_classes}")
    return splits


def _refuse_inner_splits(path: Path, images: Sequence[Parts]) -> None:
    """Reject folders that look like classes but contain splits, whose images would be mixed."""
    inside: dict[str, set[str]] = {}
    for image in images:
        if len(image) > 1:
            inside.setdefault(image[0], set()).add(
                image[1] if len(image) > 2 else ""
            )  # "": an image directly in the folder
    for names in inside.values():
        named = {split_of(name) for name in names} - {None}
        # Several splits may have another folder next to them, such as one of masks.
        if "" in names or not named or (len(named) == 1 and not all(map(split_of, names))):
            return
    first = min(inside)
    raise DataError(
        f"'{path}' has splits inside its folders ({listed(sorted(inside))}): give the folder that holds the splits, "
        f"such as '{path / first}'; if those are classes, move the splits above them, as in train/{first}/…"
    )


def _classes(root: Path, images: Sequence[Parts], skipped: Skipped) -> dict[str, list[Parts]]:
    """The images in `root` by their top folder."""
    found: dict[str, list[Parts]] = {}
    for image in images:
        if len(image) > 1:
            found.setdefault(image[0], []).append(image)
        else:
            skipped.add("not in a class folder", root.joinpath(*image))
    for folder in sorted(root.iterdir()):
        if folder.is_dir() and not is_hidden_or_tool(folder.name) and folder.name not in found:
            skipped.add("a folder without images", folder)
    return found
