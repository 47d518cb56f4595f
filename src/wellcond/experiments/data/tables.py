"""Labelled splits from Hugging Face `datasets` tables: finding image and label columns, and numbering classes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from wellcond._shared.names import did_you_mean, listed
from wellcond.experiments.data.encoded import EncodedImages
from wellcond.experiments.data.images import ImageSet
from wellcond.experiments.data.splits import by_split, split_of
from wellcond.experiments.errors import DataError

if TYPE_CHECKING:
    import datasets

COLUMNS: dict[str, tuple[str, ...]] = {
    "image": ("image", "img", "images"),
    "label": ("label", "labels", "fine_label", "target", "class"),
}
"""Column names of images and labels without a declared type, most likely first."""


@dataclass(frozen=True)
class Source:
    """Labelled splits of a source, before anything is held out: some of "train", "validation" and "test"."""

    name: str
    splits: dict[str, ImageSet]
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()


def holds_images(features: Mapping[str, Any]) -> bool:
    """Whether a table has an image column."""
    import datasets

    return bool(_columns("image", features, datasets.Image))


def from_tables(place: str, tables: Mapping[Any, Any], name: str) -> Source:
    """Labelled splits from `datasets.Dataset`s by split name, without decoding; `place` is for messages.

    Raises:
        DataError: no training split, an empty split, no image or label column, or a missing or unknown label.
    """
    import datasets

    keys = {str(key): table for key, table in tables.items()}
    splits = {split: keys[key] for split, key in by_split(place, keys).items()}
    if "train" not in splits:
        raise DataError(f"{place} has no split 'train', only: {', '.join(keys) or 'none'}")
    notes = [f"split '{key}' is not used" for key in keys if split_of(key) is None]
    for split, table in splits.items():
        if not isinstance(table, datasets.Dataset):
            raise DataError(f"{place}, split '{split}': expected a datasets.Dataset, got {type(table).__name__}")
        if not len(table):
            raise DataError(f"{place}, split '{split}' is empty")
    features = splits["train"].features
    image = _column(place, "image", features, datasets.Image)
    label = _column(place, "label", features, datasets.ClassLabel)
    values = _label_values(place, splits, label, notes)
    if isinstance(feature := features[label], datasets.ClassLabel):
        classes = tuple(feature.names)
        labels = {split: torch.from_numpy(found.astype(np.int64)) for split, found in values.items()}
        for split, codes in labels.items():
            if splits[split].features[label] != feature:
                raise DataError(f"{place}: the classes of split '{split}' are not those of 'train'")
            if wrong := sorted({*codes.tolist()} - {*range(len(classes))}):
                raise DataError(f"{place}, split '{split}': label {wrong[0]} is outside the {len(classes)} classes")
        if missing := sorted({*range(len(classes))} - {*labels["train"].tolist()}):
            notes.append(f"classes without training images: {listed(classes[i] for i in missing)}")
    else:
        labels, classes = classes_of(place, values)
    notes += _similar_names(classes)
    sets = {}
    for split, codes in labels.items():
        if image not in splits[split].column_names:
            raise DataError(f"{place}, split '{split}' has no column '{image}', which 'train' has")
        table = splits[split].select_columns([image]).cast_column(image, datasets.Image(decode=False))
        table = table.with_format("arrow")
        encoded = EncodedImages(table, image, torch.arange(len(table)), f"{place}, split '{split}'")
        sets[split] = ImageSet(encoded, codes)
    return Source(name, sets, classes, tuple(notes))


def _label_values(
    place: str, splits: Mapping[str, datasets.Dataset], label: str, notes: list[str]
) -> dict[str, np.ndarray]:
    """The labels of each split that has them, with a note on the others."""
    values: dict[str, np.ndarray] = {}
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
            refuse_no_labels(f"{place}, split '{split}'", found)
            values[split] = found
    return values


def refuse_no_labels(place: str, values: np.ndarray) -> None:
    """Reject negative numbers and empty strings, which mark rows without a label."""
    absent = values < 0 if values.dtype.kind in "if" else np.array([str(value).strip() == "" for value in values])
    if absent.any():
        raise DataError(
            f"{place}: {absent.sum()} rows have the label '{values[absent][0]}', which means no label; "
            "remove them, or number the classes from 0"
        )


def classes_of(place: str, values: Mapping[str, np.ndarray]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Labels 0, 1, … for the sorted values in the training split, and the class names."""
    values = {split: v.astype(str) if v.dtype.kind == "O" else v for split, v in values.items()}
    known = np.unique(values["train"])
    strings = known.dtype.kind == "U"
    for split, found in values.items():
        if len(unknown := np.setdiff1d(found, known)):
            raise DataError(
                f"{place}, split '{split}' has classes that training lacks: {listed(map(str, unknown[:5]))}"
                f"{did_you_mean(unknown[0], known.tolist()) if strings else ''}; rename them, or remove the rows"
            )
    codes = {split: torch.from_numpy(np.searchsorted(known, v).astype(np.int64)) for split, v in values.items()}
    return codes, tuple(str(v) if strings else f"class {v}" for v in known)


def _similar_names(classes: Iterable[str]) -> list[str]:
    """Notes on class names of several letters that differ only in case or surrounding spaces."""
    groups: dict[str, list[str]] = {}
    for name in classes:
        groups.setdefault(name.strip().casefold(), []).append(f"'{name}'")
    return [
        f"classes that differ in case or spaces only: {', '.join(names)}"
        for key, names in groups.items()
        if len(names) > 1 and len(key) > 1
    ]


def _may_be(what: str, feature: Any) -> bool:
    """Whether a column without a declared type may hold images (encoded bytes, also with a path) or labels."""
    kind = getattr(feature, "dtype", "")
    if what == "label":
        return bool(re.match(r"u?int|bool|(large_)?string", kind))
    return kind in ("binary", "large_binary") or (isinstance(feature, Mapping) and {"bytes", "path"} <= set(feature))


def _columns(what: str, features: Mapping[str, Any], kind: type) -> list[str]:
    """The columns of this type or, if there are none, plausible columns with a known name."""
    found = [name for name, feature in features.items() if isinstance(feature, kind)]
    return found or [name for name, feature in features.items() if name in COLUMNS[what] and _may_be(what, feature)]


def _column(place: str, what: str, features: Mapping[str, Any], kind: type) -> str:
    """The image or label column; of several, the one with the most likely name."""
    names, found = COLUMNS[what], _columns(what, features, kind)
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
