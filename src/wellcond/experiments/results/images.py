"""The images of a data set as a table; separate from the tables of runs, which import Lightning."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wellcond.experiments.results.table import Strong, Table

if TYPE_CHECKING:
    from wellcond.experiments.data.overview import Overview


def images_table(found: Overview) -> Table:
    """The number of images per class and split."""
    splits = [split for split in ("train", "validation", "test") if split in found.counts]
    rows = [[name, *(str(found.counts[s][label]) for s in splits)] for label, name in enumerate(found.classes)]
    total = [Strong(f"all {len(found.classes)} classes"), *(Strong(sum(found.counts[s])) for s in splits)]
    return Table(["class", *splits], [*rows, total], title=f"images of {found.name}")
