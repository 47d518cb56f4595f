"""How far the weights before a watched layer turn in one step: ‖W_new − W_old‖_F/‖W_old‖_F of the weight in use.

Only single steps are looked at, those before a record: the weight is kept at the begin of such a step and compared at
the begin of the next, when optimizer and treatments are done with it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wellcond._shared.exact_products import exact_products
from wellcond._shared.precision import full_precision
from wellcond._shared.skew_convolution import bounded_skew_kernel, skew_orthogonal_convolution
from wellcond._shared.torch_internals import has_values
from wellcond.nn import SkewOrthogonalConv2d
from wellcond.orthogonality import WeightTreatment, layers_before

from ._record import ConditionRecord

MIXTURES = 8
"""Of the channels, by which the rotation of a convolution with a large kernel is estimated, to some 10 % of itself."""
TOO_FAR, IN_A_ROW, SETTLED = 0.1, 3, 20
"""Said when so many records in a row are above the first number, so many steps after the weight first moved.

Measured (docs/treatments.md): sound training stays below 10 % from the first number of steps on, and mostly below 5 %,
while its first steps may turn a short weight by a quarter; full polar factors turn an orthogonal one by 26 % a step.
"""


def _in_use(layer: nn.Module) -> Tensor | None:
    """The weight, where looking at it changes nothing (as in a parametrisation with power iterations), waits for no
    other process (as a sharded one does), and where it has values (not on ``meta``). Of a skew-orthogonal convolution,
    what it makes of some pixels."""
    lists = getattr(layer, "parametrizations", None)
    chain: Any = () if lists is None or "weight" not in lists else lists["weight"]
    if any(hasattr(p, "full_tensor") or not has_values(p) for p in layer.parameters()):
        return None
    if not all(isinstance(one, WeightTreatment) for one in chain):
        return None
    with torch.no_grad():
        if isinstance(layer, SkewOrthogonalConv2d):
            return _responses(layer.kernel(), layer.in_channels * layer.stride**2, layer.out_channels, layer.terms)
        for one in chain:
            if (options := getattr(one, "skew_orthogonal", None)) is not None:
                stored = bounded_skew_kernel(chain.original.detach(), options["max_norm"])
                n = options["in_channels"] * options["stride"] ** 2
                return _responses(stored, n, options["out_channels"], options["terms"])
        weight = layer.weight
        return weight.detach() if isinstance(weight, Tensor) else None


def _responses(L: Tensor, channels: int, out_channels: int, terms: int) -> Tensor:
    """What exp(J) makes of a pixel of each channel, which is the kernel W; or where there are many, of some mixtures of
    them with random signs s, always the same: the expectation of ‖W s‖² is ‖W‖_F² (Hutchinson)."""
    size = [2 * terms * (k // 2) + 1 for k in L.shape[2:]]
    signs = torch.randint(0, 2, (MIXTURES, channels), generator=torch.Generator().manual_seed(0)) * 2 - 1
    mixtures = torch.eye(channels) if channels <= MIXTURES else signs
    pixels = torch.zeros(len(mixtures), channels, *size, dtype=L.dtype, device=L.device)
    pixels[:, :, size[0] // 2, size[1] // 2] = mixtures.to(pixels)
    with full_precision(L), exact_products(convolutions=True):
        return skew_orthogonal_convolution(
            pixels, L, out_channels=out_channels, stride=1, terms=terms, padding_mode="zeros"
        )


class Turning:
    """The weights before one watched layer, by the names of their layers."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.layers = layers
        self._begun: tuple[int, dict[str, Tensor]] | None = None
        self.found = 0.0 if layers else math.nan  # in the last step that was looked at, until a record takes it
        self.where = ""
        self._recent: list[ConditionRecord] = []
        self._moves_since: int | None = None
        self.said = False

    def begin(self, step: int) -> None:
        """Keep the weights as they are in this step."""
        if self._begun is None or self._begun[0] != step:
            weights = {name: _in_use(layer) for name, layer in self.layers.items()}
            self._begun = step, {name: weight.clone() for name, weight in weights.items() if weight is not None}

    def settle(self, step: int) -> None:
        """Compare, if a step has been finished since; of several since then none is known by itself."""
        if self._begun is None or step <= self._begun[0]:
            return
        (begun, weights), self._begun = self._begun, None
        if step == begun + 1:
            moves = {name: _relative_move(weight, _in_use(self.layers[name])) for name, weight in weights.items()}
            moves = {name: move for name, move in moves.items() if not math.isnan(move)}
            self.where = max(moves, key=lambda name: moves[name], default="")
            self.found = moves.get(self.where, math.nan)
            if self._moves_since is None and self.found > 0:
                self._moves_since = begun

    def go_on(self, found: float, said: bool) -> None:
        """As a saved state says; what was begun here is of another model."""
        self.found, self.said, self._begun, self._recent = found, said, None, []

    def take(self) -> float:
        """What was found since the last record; NaN if nothing was."""
        found, self.found = self.found, math.nan
        return found

    def note(self, record: ConditionRecord) -> None:
        """Say once that a weight turns too far, by the last records."""
        self._recent = [*self._recent, record][-IN_A_ROW:]
        settled = math.inf if self._moves_since is None else self._moves_since + SETTLED
        far = [one for one in self._recent if one.step >= settled and one.rotation > TOO_FAR]
        if self.said or len(far) < IN_A_ROW:
            return
        self.said = True
        warnings.warn(
            f"the weight of layer '{self.where}' turns by {record.rotation:.0%} in a step (step {record.step}; more "
            f"than {TOO_FAR:.0%} in {IN_A_ROW} records in a row), so that the layers after it follow another map each "
            "time; lower its learning rate, or with 'nog' the length of the step: options={'nog': {'scale': "
            "'gradient'}}, or {'ow': {'map': 'soc'}}",
            RuntimeWarning,
            stacklevel=2,
        )


def _relative_move(old: Tensor, new: Tensor | None) -> float:
    if new is None or new.shape != old.shape:
        return math.nan
    old, new = old.double(), new.to(old.device, torch.float64)
    move, size = torch.stack([torch.linalg.vector_norm(new - old), torch.linalg.vector_norm(old)]).tolist()
    return move / size if size > 0 else 0.0 if move == 0 else math.nan


def turnings(model: nn.Module, names: Sequence[str]) -> dict[str, Turning]:
    """For every watched layer the weights before it."""
    return {name: Turning(layers) for name, layers in layers_before(model, names).items()}


def pending_of(turnings: Mapping[str, Turning], step: int) -> dict[str, float]:
    """What the next records are going to say, by layer, where it is known already: for a saved state."""
    for turning in turnings.values():
        turning.settle(step)
    return {name: turning.found for name, turning in turnings.items() if not math.isnan(turning.found)}
