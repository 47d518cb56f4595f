"""Condition numbers, ranks and solver failures of the spectral layers of a model in training."""

from ._monitor import ConditionMonitor
from ._probe import observed as observed_features
from ._record import MEASURES, ConditionRecord, medians
from ._writers import CSVWriter, JSONLinesWriter, TensorBoardWriter, as_writers

__all__ = [
    "MEASURES",
    "CSVWriter",
    "ConditionMonitor",
    "ConditionRecord",
    "JSONLinesWriter",
    "TensorBoardWriter",
    "as_writers",
    "medians",
    "observed_features",
]
