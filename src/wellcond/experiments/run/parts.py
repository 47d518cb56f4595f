"""The norms and heads that the experiment models can have, by name: a new one is one entry here.

``--norm``, ``--head``, the checks of a configuration and the grid of a comparison read these tables. torch is imported
by what builds a part, so that ``wellcond --help`` is quick.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from wellcond._shared.names import require_known
from wellcond.experiments.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

GCP_CHANNELS = 256
"""Channels of which covariance heads take the covariance, after Li et al. (iSQRT-COV, CVPR 2018)."""


class Norm(NamedTuple):
    """A norm after the first convolution: ``build(channels, options)``, whether it is a spectral layer, and whether it
    takes a solver."""

    build: Callable[[int, SpectralOptions], nn.Module]
    spectral: bool = True
    takes_solver: bool = False


class Head(NamedTuple):
    """A pooling before the classifier: ``build(channels, options)`` gives it and the number of its features.

    Spectral heads get the last stage at the size of the one before, as in that literature, for more positions.
    """

    build: Callable[[int, SpectralOptions], tuple[nn.Module, int]]
    spectral: bool = True
    takes_solver: bool = False


class SpectralOptions(NamedTuple):
    """What the spectral layers are made with; each takes what concerns it."""

    groups: int = 1
    eps: float = 1e-5
    solver: str | None = None
    running: str = "covariance"
    norm_weight: str = "ones"


def _batch(channels: int, options: SpectralOptions) -> nn.Module:
    from torch import nn

    return nn.BatchNorm2d(channels)


def _zca(channels: int, options: SpectralOptions) -> nn.Module:
    from wellcond.nn import DecorrelatedBatchNorm2d

    return _started(DecorrelatedBatchNorm2d, channels, options, solver=options.solver or "auto")


def _iter(channels: int, options: SpectralOptions) -> nn.Module:
    from wellcond.nn import IterNorm2d

    return _started(IterNorm2d, channels, options)


def _started(kind: Any, channels: int, options: SpectralOptions, **more: Any) -> nn.Module:
    """A decorrelated norm of that kind, with its weight as the options say."""
    norm = kind(channels, groups=options.groups, eps=options.eps, running=options.running, **more)
    if options.norm_weight == "uniform":
        from torch import nn

        nn.init.uniform_(norm.weight)
    return norm


def _avg(channels: int, options: SpectralOptions) -> tuple[nn.Module, int]:
    from torch import nn

    return nn.AdaptiveAvgPool2d(1), channels


def _gcp(channels: int, options: SpectralOptions) -> tuple[nn.Module, int]:
    from wellcond.nn import GlobalCovariancePool2d

    reduction = min(GCP_CHANNELS, max(1, channels // 2))
    pool = GlobalCovariancePool2d(channels, reduction=reduction, solver=options.solver or "auto")
    return pool, pool.out_features


NORMS = {"batch": Norm(_batch, spectral=False), "zca": Norm(_zca, takes_solver=True), "iter": Norm(_iter)}
HEADS = {"avg": Head(_avg, spectral=False), "gcp": Head(_gcp, takes_solver=True)}


def is_treatable(norm: str, head: str) -> bool:
    """Whether a network of these parts has a spectral layer, before which a treatment acts."""
    require_known(norm, NORMS, "norm", error=ConfigError)
    require_known(head, HEADS, "head", error=ConfigError)
    return NORMS[norm].spectral or HEADS[head].spectral


def takes_solver(norm: str, head: str) -> bool:
    """Whether one of these parts, both of which are known, takes a solver."""
    return NORMS[norm].takes_solver or HEADS[head].takes_solver
