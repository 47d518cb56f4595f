"""Callbacks for Lightning: monitor the conditioning, and treat the layers before spectral layers."""

try:
    import lightning.pytorch  # noqa: F401
except ImportError as _error:
    raise ImportError("wellcond.lightning needs Lightning: pip install 'wellcond[train]'") from _error

from ._monitor import ConditionMonitorCallback
from ._treatment import TreatmentCallback

__all__ = ["ConditionMonitorCallback", "TreatmentCallback"]
