"""The orthogonal weight of ``map="soc"``: a convolution that is orthogonal as a map on images, with any channels.

This is the skew-orthogonal convolution of Singla and Feizi (ICML 2021), which the authors of the paper used under the
name OW. The parameter becomes its stored filter M (c, c, kh, kw) with c = max(in·stride², out), and the layer's output
exp(J) x, with J the convolution by M − Mᵀ: eq. (13) with the transpose of the map on images in place of the matrix's.
It starts from the skew part of the original filter, padded with zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from wellcond._shared.checks import refuse_in_onnx
from wellcond._shared.precision import working_dtype
from wellcond._shared.skew_convolution import (
    MAX_NORM,
    TERMS,
    at_the_bound,
    bounded_skew_kernel,
    exact_terms,
    filled_up,
    kernel_of_the_exponential,
    skew_half,
    skew_orthogonal_convolution,
    stored_channels,
)
from wellcond._shared.torch_internals import has_values

from ._matrix import Target, parametrisations
from ._orthogonal_weight import LAYER_MAPS, OrthogonalWeight
from ._sharded import whole
from ._weight_treatment import TO_PLAIN, WeightTreatment

SAME = "zeros around the border or circular padding, half of the kernel wide"


class SkewOrthogonalWeight(OrthogonalWeight):
    """The parametrisation from M to the kernel of exp(J) away from the borders, which is the layer's ``weight``.

    The layer itself computes exp(J) x with the series, which is orthogonal at the borders too.

    Args:
        channels, stride: those of the layer that a state was saved from, which must match; its square filter does not
            show them.

    Attributes:
        plain_shape: the shape (out, in, kh, kw) of the original weight.
        skew_orthogonal: the options of the equivalent ``wellcond.nn.SkewOrthogonalConv2d``.
    """

    computes_layer = True
    scale_invariant = True

    def __init__(
        self, target: Target, *, map: str = "soc", channels: Sequence[int] | None = None, stride: int | None = None
    ) -> None:
        WeightTreatment.__init__(self, target)
        self.map = map
        if trouble := _trouble(target.layer):
            raise ValueError(f"{self.treatment} of {target.where}: map='soc' takes {trouble}; choose another map")
        layer = cast(nn.Conv2d, target.layer)
        self.plain_shape, self.channels = layer.weight.shape, (layer.in_channels, layer.out_channels)
        self.stride, self.padding_mode = layer.stride[0], layer.padding_mode
        for saved, own, name in ((channels, list(self.channels), "channels"), (stride, self.stride, "stride")):
            if saved is not None and saved != own:
                raise ValueError(
                    f"{self.treatment} of {target.where}: its {name} were {saved} when it was saved, not {own}"
                )
        c = stored_channels(layer.in_channels, layer.out_channels, self.stride)
        self.stored_shape = torch.Size([c, c, *layer.kernel_size])

    def meaning(self) -> dict[str, Any]:
        """The name and options, with those that the shape of the square filter does not show."""
        return {"treatment": self.name, "map": self.map, "channels": list(self.channels), "stride": self.stride}

    @property
    def skew_orthogonal(self) -> dict[str, Any]:
        options = {"stride": self.stride, "padding_mode": self.padding_mode, "terms": TERMS, "max_norm": MAX_NORM}
        return dict(zip(("in_channels", "out_channels"), self.channels, strict=True)) | {
            "kernel_size": tuple(self.plain_shape[2:]),
            **options,
        }

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The skew half of the filter (c, c, kh, kw) of a plain weight, as long as it can be without being scaled down.

        The symmetric half has no effect, and beside it a small skew half would have few accurate digits.
        """
        if weight.shape != self.plain_shape:
            if weight.shape == self.stored_shape:  # the filter itself, when unpickling
                return weight
            raise ValueError(
                f"{self.treatment} of {self.where}: its weight is of shape {tuple(self.plain_shape)}, "
                f"got {tuple(weight.shape)}"
            )
        if has_values(weight) and not bool(torch.isfinite(weight).all()):
            raise ValueError(f"{self.treatment} of {self.where}: its weight holds NaN or infinite entries")
        with torch.no_grad():
            M = filled_up(weight.detach().to(working_dtype(weight.dtype)), self.stride)
            return skew_half(at_the_bound(M, MAX_NORM)).to(weight.dtype)

    def forward(self, stored: Tensor) -> Tensor:
        kernel = kernel_of_the_exponential(
            bounded_skew_kernel(stored, MAX_NORM),
            in_channels=self.channels[0],
            out_channels=self.channels[1],
            stride=self.stride,
            terms=TERMS,
        )
        return kernel.to(stored.dtype)

    def layer_forward(self, layer: nn.Module, x: Tensor) -> Tensor:
        refuse_in_onnx(f"operator for the {self.treatment} of a layer", TO_PLAIN)
        if x.ndim != 4 or x.shape[1] != self.channels[0]:
            raise ValueError(f"expected 4D input with {self.channels[0]} channels (got shape {tuple(x.shape)})")
        stored, bias = whole(parametrisations(layer).original), layer.bias
        if stored.is_meta and not x.is_meta:
            stored = self._brought(layer)
        y = skew_orthogonal_convolution(
            x,
            bounded_skew_kernel(stored, MAX_NORM),
            out_channels=self.channels[1],
            stride=self.stride,
            terms=TERMS if layer.training else exact_terms(MAX_NORM, x.dtype, TERMS),
            padding_mode=self.padding_mode,
        )
        return y if bias is None else y + cast(Tensor, bias).to(y.dtype).view(-1, 1, 1)

    def _brought(self, layer: nn.Module) -> Tensor:
        """The stored filter of a layer whose tensors are offloaded: hooks bring it while the weight is computed."""
        seen: list[Tensor] = []
        handle = self.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            parametrisations(layer)()
        finally:
            handle.remove()
        if seen[0].is_meta:
            raise RuntimeError(
                f"{self.treatment} of {self.where}: its filter is on the meta device, without values, and its input is "
                "not; load a state with assign=True, or call to_empty and load_state_dict"
            )
        return seen[0]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        return WeightTreatment._apply(self, fn, recurse)  # it has no frame

    def extra_repr(self) -> str:
        return f"map={self.map!r}"


LAYER_MAPS["soc"] = SkewOrthogonalWeight


def _trouble(layer: nn.Module | None) -> str:
    """The requirement that the layer does not meet, for an error message; empty if there is none."""
    kind: Any = type(layer).__bases__[0] if layer is not None and parametrize.is_parametrized(layer) else type(layer)
    if not isinstance(layer, nn.Conv2d) or kind.forward is not nn.Conv2d.forward:
        return f"nn.Conv2d layers only, got {kind.__name__}"
    if kind._conv_forward is not nn.Conv2d._conv_forward or not {"forward", "_conv_forward"}.isdisjoint(vars(layer)):
        return f"the place of nn.Conv2d's forward function, and this {kind.__name__} has its own"
    if parametrize.is_parametrized(layer):
        return "layers without other parametrisations"
    kernel, stride = layer.kernel_size, layer.stride
    if any(k % 2 == 0 for k in kernel):
        return f"kernels of odd size, got {kernel}"
    same = tuple(k // 2 for k in kernel)
    if layer.padding_mode not in ("zeros", "circular") or layer.padding not in ("same", same):
        return f"{SAME}, {same} here, got padding={layer.padding!r}, padding_mode={layer.padding_mode!r}"
    if layer.groups != 1 or any(d != 1 and k > 1 for d, k in zip(layer.dilation, kernel, strict=True)):
        return f"no groups and no dilation, got groups={layer.groups}, dilation={layer.dilation}"
    if stride[0] != stride[1]:
        return f"one stride for rows and columns, got {stride}"
    return ""
