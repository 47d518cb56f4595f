"""Scikit-learn's 1,797 handwritten digits, 1×8×8, with their 17 grey levels scaled to 0–255."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wellcond.experiments.data.tables import Source

# A small network for 8 × 8 images. With a 5 × 5 stem the covariance has rank up to 25, so that 16 channels can have
# full rank; with 3 × 3 it would be 9. A second thread saves 10 % on two idle cores, but on busy ones its busy waiting
# in every small operation makes a step 10 to 40 times slower.
SETTINGS: dict[str, Any] = {
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
    """The digits, with a fixed fifth of each class as the test split."""
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
    digits = ImageSet(images, labels)
    train, test = stratified_split(labels, TEST_FRACTION, 0)
    splits = {"train": digits.subset(train), "test": digits.subset(test)}
    return Source("digits", splits, tuple(map(str, range(10))))
