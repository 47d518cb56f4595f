"""Rescaling of features whose variances leave the range of the dtype.

With a relative ε the output does not depend on the scale of the features, so each group is multiplied by the power of
two that brings its largest deviation to about 1; this is exact. Variances near the ends of the range are rescaled too,
since the derivative of an inverse root divides by their square.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from wellcond._shared.checks import readable
from wellcond._shared.errors import NonFiniteMatrixError
from wellcond._shared.precision import working_dtype
from wellcond._shared.torch_internals import is_compiling


def leaves_range(P: Tensor) -> bool:
    """Whether the variances of some group of P (G, d, d) do; False where values are not read."""
    if is_compiling() or torch.jit.is_tracing() or not readable(P):
        return False
    largest, limit = P.detach().diagonal(dim1=-2, dim2=-1).abs().amax(-1), torch.finfo(P.dtype).max ** 0.5
    return not ((largest < limit) & (largest > 1 / limit)).all()


def require_squares(x: Tensor, P: Tensor, describe: Callable[[], str]) -> None:
    """Raise if the covariance of finite features is not finite."""
    if not P.isfinite().all() and x.isfinite().all():
        raise NonFiniteMatrixError(
            f"the covariance of the input exceeds {P.dtype} in {describe()}: scale the features down, or take float64; "
            "relative=True with track_running_stats=False takes any scale"
        )


def unit_of_features(x: Tensor, mean: Tensor) -> Tensor:
    """Powers of two c (G, 1, 1) with max |c (x − mean)| in [1/2, 1) in each group; 1 for 0, inf and NaN.

    To be applied by :func:`by_channel`.
    """
    largest = (x.detach() - mean.detach().view(-1, *(1,) * (x.dim() - 2))).abs().transpose(0, 1).flatten(1).amax(1)
    return _reciprocal_power(largest.view(len(mean), -1).amax(1), 1).view(-1, 1, 1)


def unit_of_covariances(P: Tensor) -> Tensor:
    """Powers of two c (G, 1, 1) for which the largest variance of c² P is about 1."""
    return _reciprocal_power(P.detach().diagonal(dim1=-2, dim2=-1).amax(-1), 2).view(-1, 1, 1)


def by_channel(x: Tensor, unit: Tensor) -> Tensor:
    """x (N, C, *spatial) times the factor (G, 1, 1) of its group."""
    channels = unit.flatten().repeat_interleave(x.shape[1] // len(unit))
    return x * channels.to(x.dtype).view(-1, *(1,) * (x.dim() - 2))


def _reciprocal_power(size: Tensor, root: int) -> Tensor:
    """2^-⌊e/root⌋ for sizes in [2^(e−1), 2^e); 1 if 0 or not finite."""
    size = size.to(working_dtype(size.dtype))
    exponent = torch.frexp(torch.where(size.isfinite() & (size > 0), size, 0.5)).exponent // root
    # Beyond 2^127 the reciprocal of a subnormal float32 would be infinite.
    return torch.ldexp(torch.ones_like(size), -exponent.clamp_min(-126))
