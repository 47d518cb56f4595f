"""Scikit-learn's 1,797 handwritten digits, 1×8×8, their 17 grey levels spread over 0–255."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wellcond.experiments.data.tables import Source

# 8 × 8 images: a small network. The 5 × 5 stem gives a covariance of rank up to 25, so 16 channels can have full rank,
# where a 3 × 3 stem would stop at 9. A second thread gains a tenth on two idle cores, and on busy ones, waiting in a
# loop at every small operation, makes a step 10 to 40 times longer.
SETTINGS = {
    "model": "resnet8",
    "width": 16,
    "stem_kernel": 5,
    "epochs": 5,
    "batch_size": 64,
    "augment": False,
    "threads": 1,
    "monitor_every": 5,
}


def load() -> Source:
    """They come without a test split; a fifth of each digit, always the same images, is one here."""
    import numpy as np
    import torch

    from wellcond.experiments.data.draws import TEST_FRACTION, stratified_split
    from wellcond.experiments.data.images import ImageSet
    from wellcond.experiments.data.tables import Source
    from wellcond.experiments.errors import needs_train_extra

    with needs_train_extra():
        from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    images = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    every, parts = ImageSet(images, labels), stratified_split(labels, TEST_FRACTION, 0)
    splits = {split: every.subset(part) for split, part in zip(("train", "test"), parts, strict=True)}
    return Source("digits", splits, tuple(map(str, range(10))))
