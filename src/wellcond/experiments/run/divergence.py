"""The condition numbers that preceded a divergence.

RUN/last_condition_numbers.csv    the last 50 records of each observed layer, in the columns of condition.csv
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from wellcond.experiments.files import write_csv
from wellcond.monitor import ConditionRecord

LAST_CONDITION = "last_condition_numbers.csv"
RECORDS_PER_LAYER = 50


def keep_last(records: Sequence[ConditionRecord], folder: Path) -> str:
    """Write the last records of every layer to the run's folder; returns a sentence for the error message."""
    last: list[ConditionRecord] = []
    for layer in dict.fromkeys(record.layer for record in records):
        last += [record for record in records if record.layer == layer][-RECORDS_PER_LAYER:]
    if not last:
        return "No condition number was recorded"
    rows = [record.as_dict() for record in last]
    write_csv(folder / LAST_CONDITION, list(rows[0]), rows)
    newest = max(last, key=lambda record: record.step)
    return (
        f"The last condition numbers (κ of '{newest.layer}' was {newest.kappa:.3g} at step {newest.step}) "
        f"are in '{folder / LAST_CONDITION}'"
    )
