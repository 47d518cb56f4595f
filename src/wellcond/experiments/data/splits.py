"""The names of splits in folders, files and tables.

Only exact names count, ignoring case: `train_station` and `test_tube` may be classes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from wellcond.experiments.errors import DataError

SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"} | dict.fromkeys(
    ("validation", "valid", "val", "dev", "eval"), "validation"
)

_SHARD = r"(?:[-_. ](?:\d+|of|part|shard|[0-9a-f]{16}))*"
"""The suffix of one of several files: `-00000-of-00001`, optionally with a fingerprint."""


def split_of(name: str) -> str | None:
    """The split with exactly this name: "train", "validation" or "test"."""
    return SPLITS.get(name.lower())


def split_of_file(stem: str) -> str | None:
    """The split of a file, by its name without extension: `test-00000-of-00001` is test."""
    found = re.fullmatch(f"([a-z]+){_SHARD}", stem.lower())
    return found and SPLITS.get(found[1])


def may_mean_a_split(name: str) -> bool:
    """Whether a word in the name is the name of a split: `seg_train`, `test set`, but also `train_station`."""
    return any(word in SPLITS for word in re.split(r"[\W_\d]+", name.lower()))


def by_split(place: str, names: Iterable[str]) -> dict[str, str]:
    """The name of each split among these; two names of the same split raise a `DataError`."""
    found: dict[str, str] = {}
    for name in names:
        if split := split_of(name):
            if split in found:
                raise DataError(
                    f"{place} has '{found[split]}' and '{name}', which both mean {split}; merge them, or remove one"
                )
            found[split] = name
    return found
