"""The norms and heads that the experiment models can have, by name: a new one is one entry here.

``--norm``, ``--head``, the checks of a configuration and the grid of a comparison read these tables. torch is imported
by what builds a part, so that ``wellcond --help`` is quick.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from wellcond._shared.names import require_known
from wellcond.experiments.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

GCP_CHANNELS = 256
"""Channels of which covariance heads take the covariance, after Li et al. (iSQRT-COV, CVPR 2018)."""


class Norm(NamedTuple):
    """A norm after the first convolution: ``build(channels, groups, eps)``, and whether it is a spectral layer."""

    build: Callable[[int, int, float], nn.Module]
    spectral: bool = True


class Head(NamedTuple):
    """A pooling before the classifier: ``build(channels)`` gives it and the number of its features.

    Spectral heads get the last stage at the size of the one before, as in that literature, for more positions.
    """

    build: Callable[[int], tuple[nn.Module, int]]
    spectral: bool = True


def _batch(channels: int, groups: int, eps: float) -> nn.Module:
    from torch import nn

    return nn.BatchNorm2d(channels)


def _zca(channels: int, groups: int, eps: float) -> nn.Module:
    from wellcond.nn import DecorrelatedBatchNorm2d

    return DecorrelatedBatchNorm2d(channels, groups=groups, eps=eps)


def _iter(channels: int, groups: int, eps: float) -> nn.Module:
    from wellcond.nn import IterNorm2d

    return IterNorm2d(channels, groups=groups, eps=eps)


def _avg(channels: int) -> tuple[nn.Module, int]:
    from torch import nn

    return nn.AdaptiveAvgPool2d(1), channels


def _gcp(channels: int) -> tuple[nn.Module, int]:
    from wellcond.nn import GlobalCovariancePool2d

    pool = GlobalCovariancePool2d(channels, reduction=min(GCP_CHANNELS, max(1, channels // 2)))
    return pool, pool.out_features


NORMS = {"batch": Norm(_batch, spectral=False), "zca": Norm(_zca), "iter": Norm(_iter)}
HEADS = {"avg": Head(_avg, spectral=False), "gcp": Head(_gcp)}


def is_treatable(norm: str, head: str) -> bool:
    """Whether a network of these parts has a spectral layer, before which a treatment acts."""
    require_known(norm, NORMS, "norm", error=ConfigError)
    require_known(head, HEADS, "head", error=ConfigError)
    return NORMS[norm].spectral or HEADS[head].spectral
