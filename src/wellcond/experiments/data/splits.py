"""The names of splits: what a folder, a file or a key of a table says of what its images are for.

A name counts where it is exactly one of these, whatever its case; `train_station` and `test_tube` may be classes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from wellcond.experiments.errors import DataError

SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"} | dict.fromkeys(
    ("validation", "valid", "val", "dev", "eval"), "validation"
)

_SHARD = r"(?:[-_. ](?:\d+|of|part|shard|[0-9a-f]{16}))*"
"""What may follow in the name of one of several files: `-00000-of-00001`, with a fingerprint or without."""


def split_of(name: str) -> str | None:
    """The split whose exact name this is: "train", "validation" or "test"."""
    return SPLITS.get(name.lower())


def split_of_file(stem: str) -> str | None:
    """The split that a file's name without its ending stands for: `test-00000-of-00001` for test."""
    found = re.fullmatch(f"([a-z]+){_SHARD}", stem.lower())
    return found and SPLITS.get(found[1])


def may_mean_a_split(name: str) -> bool:
    """Whether a word in the name is one of a split: `seg_train`, `test set`, and also `train_station`."""
    return any(word in SPLITS for word in re.split(r"[\W_\d]+", name.lower()))


def by_split(place: str, names: Iterable[str]) -> dict[str, str]:
    """The name of each split among these. Two names of one split are refused: which of them is it?"""
    found: dict[str, str] = {}
    for name in names:
        if split := split_of(name):
            if split in found:
                raise DataError(
                    f"{place} has '{found[split]}' and '{name}', both of which stand for {split}; "
                    "put them together, or take one away"
                )
            found[split] = name
    return found
