"""Labelled splits from tables of Hugging Face `datasets`: their image and label columns, labels as class numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from wellcond.experiments.data.images import EncodedImages, ImageSet
from wellcond.experiments.errors import DataError

if TYPE_CHECKING:
    import datasets

COLUMNS = {
    "image": ("image", "img", "images"),
    "label": ("label", "labels", "fine_label", "target", "class"),
}
"""The names under which a column of undescribed images or labels is looked for, the likeliest first."""

_SPLITS = {"train": "train", "training": "train", "test": "test"} | dict.fromkeys(
    ("validation", "valid", "val", "dev", "eval"), "validation"
)


@dataclass(frozen=True)
class Source:
    """Labelled splits as found, before anything is held out: some of "train", "validation" and "test"."""

    name: str
    splits: dict[str, ImageSet]
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()


def split_of(name: str) -> str | None:
    """The split that a file or folder name stands for: `test-00000-of-00001` for test."""
    return _SPLITS.get(re.split(r"[-_.]", name.lower())[0])


def from_tables(place: str, tables: Mapping[Any, Any], name: str) -> Source:
    """Labelled splits from `datasets.Dataset`s by split name; `place` is for messages. No image is decoded.

    Raises:
        DataError: no split for training, an empty one, no image or label column, a missing or unknown label.
    """
    import datasets

    splits = {known: table for key, table in tables.items() if (known := split_of(str(key)))}
    if "train" not in splits:
        raise DataError(f"{place} has no split 'train', only: {', '.join(map(str, tables)) or 'none'}")
    for split, table in splits.items():
        if not isinstance(table, datasets.Dataset):
            raise DataError(f"{place}, split '{split}': expected a datasets.Dataset, got {type(table).__name__}")
        if not len(table):
            raise DataError(f"{place}, split '{split}' is empty")
    features = splits["train"].features
    image = _column(place, "image", features, datasets.Image)
    label = _column(place, "label", features, datasets.ClassLabel)
    values, notes = _label_values(place, splits, label)
    if isinstance(feature := features[label], datasets.ClassLabel):
        classes = tuple(feature.names)
        labels = {split: torch.from_numpy(found.astype(np.int64)) for split, found in values.items()}
        for split, codes in labels.items():
            if splits[split].features[label] != feature:
                raise DataError(f"{place}: the classes of split '{split}' are not those of 'train'")
            if wrong := sorted({*codes.tolist()} - {*range(len(classes))}):
                raise DataError(f"{place}, split '{split}': label {wrong[0]} is outside the {len(classes)} classes")
    else:
        labels, classes = classes_of(values)
    sets = {}
    for split, codes in labels.items():
        if image not in splits[split].column_names:
            raise DataError(f"{place}, split '{split}' has no column '{image}', which 'train' has")
        table = splits[split].select_columns([image]).cast_column(image, datasets.Image(decode=False))
        encoded = EncodedImages(table, image, torch.arange(len(table)), f"{place}, split '{split}'")
        sets[split] = ImageSet(encoded, codes)
    return Source(name, sets, classes, tuple(notes))


def _label_values(
    place: str, splits: Mapping[str, datasets.Dataset], label: str
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The labels of each split that has them, and notes on those that do not."""
    values: dict[str, np.ndarray] = {}
    notes = []
    for split, table in splits.items():
        if label not in table.column_names:
            raise DataError(f"{place}, split '{split}' has no column '{label}', which 'train' has")
        column = table.select_columns([label]).with_format("arrow")[:][label]
        if column.null_count:
            raise DataError(f"{place}, split '{split}': {column.null_count} rows have no label; remove them")
        found = column.to_numpy()
        if split != "train" and found.dtype.kind == "i" and (found < 0).all():
            notes.append(f"the labels of split '{split}' are withheld (negative): it is not used")
        else:
            values[split] = found
    return values, notes


def classes_of(values: Mapping[str, np.ndarray]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Labels 0, 1, … for the sorted values that occur in any split, and the classes' names."""
    known = np.unique(np.concatenate([v.astype(str) if v.dtype.kind == "O" else v for v in values.values()]))
    codes = {
        split: torch.from_numpy(np.searchsorted(known, v.astype(known.dtype)).astype(np.int64))
        for split, v in values.items()
    }
    return codes, tuple(str(v) if known.dtype.kind == "U" else f"class {v}" for v in known)


def _may_be(what: str, feature: Any) -> bool:
    """Whether an undescribed column may hold images (encoded bytes, or those with a path) or labels."""
    kind = getattr(feature, "dtype", "")
    if what == "label":
        return bool(re.match(r"u?int|bool|(large_)?string", kind))
    return kind in ("binary", "large_binary") or (isinstance(feature, Mapping) and {"bytes", "path"} <= set(feature))


def _column(place: str, what: str, features: Mapping[str, Any], kind: type) -> str:
    """The column of that kind, or without any the one that may be it and is named so; of several the first name."""
    names = COLUMNS[what]
    found = [name for name, feature in features.items() if isinstance(feature, kind)]
    found = found or [name for name, feature in features.items() if name in names and _may_be(what, feature)]
    if chosen := found if len(found) == 1 else [name for name in names if name in found]:
        return chosen[0]
    if found:
        raise DataError(f"{place} has several {what} columns, {', '.join(found)}; rename one to '{what}'")
    columns = ", ".join(f"{name} ({getattr(f, 'dtype', type(f).__name__)})" for name, f in features.items())
    expected = "a ClassLabel, or integers or strings" if what == "label" else "an Image, or encoded bytes"
    raise DataError(
        f"{place} has no {what} column: expected {expected} under one of the names {', '.join(names)}, "
        f"found the columns {columns}; rename the right one to '{what}'"
    )
