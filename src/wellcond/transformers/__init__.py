"""Callbacks for the Hugging Face ``Trainer``: monitor the conditioning, and treat layers before spectral layers."""

try:
    import transformers  # noqa: F401
except ImportError as _error:
    raise ImportError("wellcond.transformers needs transformers: pip install 'wellcond[huggingface]'") from _error

from ._monitor import ConditionMonitorCallback
from ._treatment import TreatmentCallback

__all__ = ["ConditionMonitorCallback", "TreatmentCallback"]
