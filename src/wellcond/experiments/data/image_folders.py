"""Folders of images: one folder per class, inside one folder per split or not.

    DIR/CLASS/…/file                or                DIR/{train,validation,test}/CLASS/…/file

Which of the two is told by exact names and by where the images lie: a split holds folders, a class holds images, so
that `train` beside `bus` is a class. What can be read both ways is asked about.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wellcond._shared.names import did_you_mean, listed
from wellcond.experiments.data.contents import Skipped, is_a_tools
from wellcond.experiments.data.splits import by_split, may_mean_a_split, split_of
from wellcond.experiments.errors import DataError

if TYPE_CHECKING:
    import datasets

Parts = tuple[str, ...]
"""The path of an image, relative to some folder."""


def from_image_folders(
    path: Path, files: Sequence[Path], skipped: Skipped
) -> tuple[dict[str, datasets.Dataset], list[str]]:
    """The images among `files` below `path` as data sets of paths and labels by split, and notes on them.

    Not `load_dataset("imagefolder")`, which takes a minute to list CIFAR-10's 60,000 files every time.
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
        _classes(path, images, skipped)  # for what lies beside the folders of the splits
    classes = sorted(by_class["train"])
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=classes)})
    tables, notes = {}, []
    for split, found in by_class.items():
        root = path / folders.get(split, "")
        if unknown := sorted(found.keys() - set(classes)):
            raise DataError(
                f"'{root}' has folders of classes that training lacks: {listed(unknown[:5])}"
                f"{did_you_mean(unknown[0], classes)}; take them away, or add them to training"
            )
        if found:
            rows = [(os.path.join(root, *image), c) for c, name in enumerate(classes) for image in found.get(name, ())]
            if odd := next((file for file, _ in rows if re.search("[\ud800-\udfff]", file)), None):
                raise DataError(
                    f"the file name {os.fsencode(odd)!r} is not UTF-8: rename the file, or set PYTHONUTF8=1"
                )
            columns = dict(zip(("image", "label"), zip(*rows, strict=True), strict=True))
            tables[split] = datasets.Dataset.from_dict(columns, features=features)
        else:
            notes.append(f"'{root.name}' has no folders of classes: split '{split}' is not used")
    return tables, notes


def split_folders(path: Path, images: Sequence[Parts]) -> dict[str, str]:
    """The name of each split's folder in `path`; {} where the folders are classes.

    Raises:
        DataError: no images in folders, or folders that can be read as splits as well as as classes.
    """
    folders = sorted({image[0] for image in images if len(image) > 1})
    if not folders:
        inside = listed(sorted(p.name for p in path.iterdir())) or "nothing"
        raise DataError(
            f"'{path}' has neither parquet files (train-*.parquet, test-*.parquet) nor images in one folder per class "
            f"(train/CLASS/*.png, test/CLASS/*.png); it holds: {inside}"
        )
    nested = {image[0] for image in images if len(image) > 2}  # which have folders of images themselves
    named = [name for name in folders if split_of(name)]
    others = [name for name in folders if name not in named]
    as_classes = f"if they are classes, put them all into '{path / 'train'}'"
    if others and nested.intersection(named):
        raise DataError(
            f"'{path}' has splits ({listed(named)}) beside other folders of images ({listed(others)}): "
            f"take the others away; {as_classes}"
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
    """Refuse folders that would be classes and each hold splits, whose images would be mixed."""
    inside: dict[str, set[str]] = {}
    for image in images:
        if len(image) > 1:
            inside.setdefault(image[0], set()).add(image[1] if len(image) > 2 else "")  # an image of its own
    for names in inside.values():
        named = {split_of(name) for name in names} - {None}
        # Beside several splits there may be another folder, such as one of masks.
        if "" in names or not named or (len(named) == 1 and not all(map(split_of, names))):
            return
    first = min(inside)
    raise DataError(
        f"'{path}' has splits inside its folders ({listed(sorted(inside))}): give the folder that holds the splits, "
        f"such as '{path / first}'; if those are classes, put the splits outside, as in train/{first}/…"
    )


def _classes(root: Path, images: Sequence[Parts], skipped: Skipped) -> dict[str, list[Parts]]:
    """The images in `root` by the folder that they are in there."""
    found: dict[str, list[Parts]] = {}
    for image in images:
        if len(image) > 1:
            found.setdefault(image[0], []).append(image)
        else:
            skipped.add("in no folder of a class", root.joinpath(*image))
    for folder in sorted(root.iterdir()):
        if folder.is_dir() and not is_a_tools(folder.name) and folder.name not in found:
            skipped.add("a folder without images", folder)
    return found
