"""Callbacks for the Hugging Face ``Trainer``: watch the conditioning, and treat the layers before spectral layers."""

try:
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError("wellcond.transformers needs transformers: pip install 'wellcond[huggingface]'") from error

from .integrations.transformers_monitor import ConditionMonitorCallback
from .integrations.transformers_treatment import TreatmentCallback

__all__ = ["ConditionMonitorCallback", "TreatmentCallback"]
