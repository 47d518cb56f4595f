"""Hugging Face Transformers: callbacks of the ``Trainer`` that monitor the conditioning and treat the layers before
spectral layers, and the initialisation of what a checkpoint lacks."""

try:
    import transformers  # noqa: F401
except ImportError as _error:
    raise ImportError("wellcond.transformers needs transformers: pip install 'wellcond[huggingface]'") from _error

from ._missing import init_missing
from ._monitor import ConditionMonitorCallback
from ._treatment import TreatmentCallback

__all__ = ["ConditionMonitorCallback", "TreatmentCallback", "init_missing"]
