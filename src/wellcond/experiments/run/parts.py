"""The norms and heads of the experiment models, by name; adding one takes one entry here.

``--norm``, ``--head``, the validation of a configuration and the grid of a comparison read these tables. torch is
imported only when a part is built, so that ``wellcond --help`` is fast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from wellcond._shared.names import require_known
from wellcond.experiments.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

GCP_CHANNELS = 256
"""Channels of the covariance in covariance heads, as in Li et al. (iSQRT-COV, CVPR 2018)."""


class Norm(NamedTuple):
    """A norm after the first convolution, built by ``build(channels, options)``."""

    build: Callable[[int, SpectralOptions], nn.Module]
    spectral: bool = True
    takes_solver: bool = False


class Head(NamedTuple):
    """A pooling before the classifier; ``build(channels, options)`` returns it and the number of its features.

    With a spectral head the last stage is not downsampled, as in that literature, for more positions.
    """

    build: Callable[[int, SpectralOptions], tuple[nn.Module, int]]
    spectral: bool = True
    takes_solver: bool = False


class SpectralOptions(NamedTuple):
    """Options of the spectral layers; each layer uses those that apply to it."""

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

    return _initialised(DecorrelatedBatchNorm2d, channels, options, solver=options.solver or "auto")


def _iter(channels: int, options: SpectralOptions) -> nn.Module:
    from wellcond.nn import IterNorm2d

    return _initialised(IterNorm2d, channels, options)


def _initialised(kind: Any, channels: int, options: SpectralOptions, **more: Any) -> nn.Module:
    """A decorrelated norm of that class, with its weight initialised as in the options."""
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
    """Whether a network of these parts has a spectral layer, before which treatments act."""
    require_known(norm, NORMS, "norm", error=ConfigError)
    require_known(head, HEADS, "head", error=ConfigError)
    return NORMS[norm].spectral or HEADS[head].spectral


def takes_solver(norm: str, head: str) -> bool:
    """Whether one of these (known) parts takes a solver."""
    return NORMS[norm].takes_solver or HEADS[head].takes_solver
