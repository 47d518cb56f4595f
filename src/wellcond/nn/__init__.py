"""Spectral layers, in the manner of ``torch.nn``."""

from ._base import Observation, SpectralModule
from .covariance_pool import GlobalCovariancePool2d, TokenCovariancePool
from .decorrelated_batchnorm import DecorrelatedBatchNorm1d, DecorrelatedBatchNorm2d, DecorrelatedBatchNorm3d
from .spectral_layer import SpectralLayer

__all__ = [
    "DecorrelatedBatchNorm1d",
    "DecorrelatedBatchNorm2d",
    "DecorrelatedBatchNorm3d",
    "GlobalCovariancePool2d",
    "Observation",
    "SpectralLayer",
    "SpectralModule",
    "TokenCovariancePool",
]
