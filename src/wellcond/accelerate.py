"""Treatments and condition monitor for training loops on Hugging Face Accelerate."""

try:
    import accelerate  # noqa: F401
except ImportError as error:
    raise ImportError("wellcond.accelerate needs Accelerate: pip install 'wellcond[huggingface]'") from error

from .integrations.accelerate_attach import attach_monitor, attach_treatment

__all__ = ["attach_monitor", "attach_treatment"]
