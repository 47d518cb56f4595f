"""The optimal learning rate (OLR): the η for which W − ηL is nearest to an orthogonal matrix, per layer and step.

Song, Sebe and Wang, "Improving Covariance Conditioning of the SVD Meta-layer by Orthogonality", ECCV 2022, section 5.2.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from wellcond._shared.names import require_known

from ._matrix import Target, Treatables
from ._optimizers import gradient_scale, require_linear_in_lr
from ._rates import RULES
from ._registry import moved_to, on_the_host
from ._step_treatment import StepTreatment


class _Counts(dict):
    """Counts that still act as the number ``shortened``, which they were before 0.2, with a warning."""

    def _shortened(self, stacklevel: int) -> int:
        warnings.warn(
            "counts()[layer] of OptimalLearningRate is a dict now, as that of NearestOrthogonalGradient; "
            "read counts()[layer]['shortened']",
            DeprecationWarning,
            stacklevel=stacklevel,
        )
        return self["shortened"]

    def __int__(self) -> int:
        return self._shortened(3)

    __index__ = __int__

    def __eq__(self, other: object) -> bool:
        return self._shortened(3) == other if isinstance(other, int) else super().__eq__(other)

    def __ne__(self, other: object) -> bool:  # dict's own would call 3 and 3 different
        return self._shortened(3) != other if isinstance(other, int) else super().__ne__(other)

    def __lt__(self, other: int) -> bool:
        return self._shortened(3) < other

    def __le__(self, other: int) -> bool:
        return self._shortened(3) <= other

    def __gt__(self, other: int) -> bool:
        return self._shortened(3) > other

    def __ge__(self, other: int) -> bool:
        return self._shortened(3) >= other

    def __radd__(self, other: int) -> int:  # sum(counts.values())
        return other + self._shortened(3)

    __hash__ = None  # pyright: ignore[reportAssignmentType]


# Applied after the nearest orthogonal gradient, so that it sees the result.
class OptimalLearningRate(StepTreatment, name="olr", about="optimal learning rate, eq. (18)-(21)", order=1):
    """Give selected layers their own learning rate in every step of an optimizer; the training loop does not change.

    The rate of the layer's parameter group is the cap, as in eq. (21): where 0 < η* < lr the step of the layer is
    shortened to η*; otherwise, also where η* is not finite, it stays. The step of each supported optimizer is lr times
    a direction, so a step at rate η is p + (η/lr)(p' − p), with p' the optimizer's result for p. No parameter changes
    its group, learning-rate schedulers and the optimizer's state are not touched, and a step at the cap is the
    optimizer's own bit for bit.

    Attach it after :class:`NearestOrthogonalGradient`, whose gradients it then sees (``treat`` does).

    Args:
        optimizer: one of SGD, Adam, AdamW, NAdam, RAdam, Adamax, RMSprop, Adagrad, Adadelta, Muon; also fused, foreach
            or capturable; wrappers with an ``.optimizer`` are unwrapped.
        params: layers (their ``weight``, with one rate for all groups of a convolution) or raw parameters (as
            ``flatten(1)``), of a real floating dtype: one, a list, or a dict by name. With an orthogonal weight, the
            stored tensor.
        rule: ``"paper"``, eq. (20), or ``"exact"``, the minimiser of eq. (18).
        direction: L is the ``"gradient"``, as in the paper, or the ``"update"``: the direction in which the optimizer
            actually moves the weight, with momentum, Adam's scaling and weight decay.

    Raises:
        ValueError: a layer without a matrix-like weight, a weight that the optimizer does not hold, the treatment twice
            on one weight, an unknown option, or an optimizer whose update direction is unknown.

    Complexity: O(m n) per step for ``"paper"``, three products of O(m n min(m, n)) in float64 for ``"exact"``. Source:
    eq. (18)–(21) of Song, Sebe and Wang, ECCV 2022.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(3, 5)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
        >>> olr = OptimalLearningRate(optimizer, {"layer": layer})
        >>> layer(torch.randn(8, 3)).square().sum().backward()
        >>> optimizer.step()
        >>> 0 < olr.rates()["layer"].item() <= 0.1
        True
    """

    treatment = "optimal learning rate"
    rule: str
    direction: str

    def __init__(
        self, optimizer: Optimizer, params: Treatables, *, rule: str = "paper", direction: str = "gradient"
    ) -> None:
        require_known(rule, RULES, "rule of the optimal learning rate")
        require_known(direction, ("gradient", "update"), "direction of the optimal learning rate")
        self.rule, self.direction = rule, direction
        super().__init__(optimizer, params)
        self._rates: dict[str, Tensor] = {}
        self._taken: dict[str, Tensor] = {}  # in the step that is running
        self._shortened = {t.name: torch.zeros((), dtype=torch.int64, device=t.parameter.device) for t in self.targets}
        self._before: dict[str, tuple[Tensor, Tensor | None]] = {}

    def validate(self) -> None:
        require_linear_in_lr(self.optimizer, self.treatment, self.targets[0])

    def before(self, target: Target, group: dict[str, Any]) -> None:
        gradient = target.parameter.grad
        assert gradient is not None
        rate = None
        if self.direction == "gradient":
            rate = self._optimal(target, target.parameter, -gradient if group.get("maximize") else gradient)
            if (scale := gradient_scale(self.optimizer)) is not None:
                rate = rate * scale.to(rate)  # L is still multiplied by it
        self._before[target.name] = target.parameter.detach().clone(), rate

    def after(self, target: Target, group: dict[str, Any]) -> None:
        if target.name not in self._before:
            return
        start, rate = self._before.pop(target.name)
        parameter, lr = target.parameter, group["lr"]
        if rate is None:
            rate = self._optimal(target, start, start.double() - parameter.double()) * lr  # L = step / lr
        # eq. (21), with the positivity that it lacks; NaN, and rates beyond lr, become lr.
        if isinstance(lr, Tensor):
            lr = lr.to(rate)
            chosen = (rate > 0) & (rate < lr)
            taken = torch.where(chosen, rate, lr)
        else:
            taken = torch.nn.functional.threshold(rate, 0.0, lr).clamp_max(lr).nan_to_num(nan=lr)
            chosen = taken < lr
        work = torch.promote_types(parameter.dtype, torch.float32)
        share = torch.div(taken, lr, out=torch.empty_like(taken, dtype=work))
        shortened = torch.lerp(start.to(work), parameter.to(work), share).to(parameter.dtype)
        torch.where(chosen, shortened, parameter, out=parameter)
        self._taken[target.name] = taken
        count = self._shortened[target.name] = moved_to(chosen.device, self._shortened[target.name])
        count += chosen

    def finish(self) -> None:
        """Before a step there are no rates of it yet, and after it those of the layers that it moved."""
        self._rates, self._taken = self._taken, {}

    def _optimal(self, target: Target, weight: Tensor, direction: Tensor) -> Tensor:
        return RULES[self.rule](target.view.matrix(weight.detach()), target.view.matrix(direction))

    def rates(self) -> dict[str, Tensor]:
        """The rate of each layer in the last step, float64 scalars on its device, without the layers that had no
        gradient; empty before the first step."""
        return dict(self._rates)

    def counts(self) -> dict[str, dict[str, int]]:
        """By layer, as ``shortened``: the number of steps in which η* was below the cap and therefore used."""
        return {name: _Counts(shortened=int(count)) for name, count in self._shortened.items()}

    def state_dict(self) -> dict[str, Any]:
        """The counts and the last rates; the rule itself has no memory."""
        return {
            "shortened": {name: on_the_host(count) for name, count in self._shortened.items()},
            "rates": {name: on_the_host(rate) for name, rate in self._rates.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the counts of a saved run."""
        devices = {target.name: target.parameter.device for target in self.targets}
        for name, count in self._shortened.items():
            count.copy_(state["shortened"][name])
        self._rates = {name: rate.to(devices[name]) for name, rate in state["rates"].items()}
