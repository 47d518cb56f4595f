"""The optimal learning rate (OLR): the η for which W − ηL is nearest to an orthogonal matrix, one per layer and step.

Song, Sebe and Wang, "Improving Covariance Conditioning of the SVD Meta-layer by Orthogonality", ECCV 2022, section 5.2.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ._matrix import Target, Treatable
from ._names import require_known
from ._step_hook import StepHook, gradient_scale, require_dense, require_linear_in_lr


def paper_rate(W: Tensor, L: Tensor) -> Tensor:
    """η* of eq. (20): one truncated step on ‖w − ηl‖⁴, not the minimiser of eq. (18).

    Args:
        W, L: (..., m, n) weight and direction. All matrices of the batch share one rate (the groups of a convolution).

    Returns:
        η* as a float64 scalar, unguarded: negative when ⟨W, L⟩ < 0, NaN when L = 0. A product ⟨W, L⟩ within
        the rounding of W's dtype (as for L in the tangent space of an orthogonal W) counts as zero.
        For orthogonal W and L, |η*| ≤ 1/(2√2).
    """
    w, (l, size) = W.double().flatten(), _unit(L)
    l = l.flatten()
    ww, wl, ll = w @ w, w @ l, l @ l
    wl = torch.where(wl.abs() <= torch.finfo(W.dtype).eps * (ww * ll).sqrt(), 0.0, wl)
    return ww * wl / (ww * ll + 2 * wl * wl) / size


def exact_rate(W: Tensor, L: Tensor) -> Tensor:
    """The real η that minimises eq. (18), ‖(W − ηL)ᵀ(W − ηL) − I‖_F, on the smaller Gram side.

    With A₀ = WᵀW − I, B = WᵀL + LᵀW, C = LᵀL the square of the objective is the quartic
    ‖A₀‖² − 2η⟨A₀,B⟩ + η²(‖B‖² + 2⟨A₀,C⟩) − 2η³⟨B,C⟩ + η⁴‖C‖²; the best of the real roots of its derivative is taken.

    Args:
        W, L: (..., m, n) weight and direction. All matrices of the batch share one rate (the groups of a convolution).

    Returns:
        η as a float64 scalar, unguarded: it may be negative, and is NaN when L = 0.

    Complexity: three products of O(m n min(m, n)) in float64; no host synchronisation.
    """
    w, (l, size) = W.double(), _unit(L)
    if w.shape[-2] < w.shape[-1]:
        w, l = w.mT, l.mT
    A0 = w.mT @ w - torch.eye(w.shape[-1], dtype=w.dtype, device=w.device)
    B = w.mT @ l
    B = B + B.mT
    C = l.mT @ l
    q1, q2, q3, q4 = (A0 * B).sum(), (B * B).sum() + 2 * (A0 * C).sum(), (B * C).sum(), (C * C).sum()
    roots = _cubic_roots(2 * q4, -3 * q3, q2, -q1)
    value = (((q4 * roots - 2 * q3) * roots + q2) * roots - 2 * q1) * roots
    return roots.take(value.argmin()) / size


_RULES = {"paper": paper_rate, "exact": exact_rate}


def _unit(L: Tensor) -> tuple[Tensor, Tensor]:
    """L in float64 with largest entry 1, and that entry: no square of a gradient can over- or underflow."""
    l = L.double()
    size = l.abs().amax()
    return l / size, size


def _cubic_roots(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """(3,) real roots of ax³ + bx² + cx + d with a > 0; a single real root is repeated.

    Closed form (Cardano for one real root, Viète's cosines for three), then Newton steps, because both lose digits
    when roots nearly coincide. No value is read on the host.
    """
    shift = b / (3 * a)
    p = c / a - 3 * shift * shift
    q = 2 * shift**3 - shift * c / a + d / a  # t³ + pt + q = 0 with x = t − shift
    discriminant = (q / 2) ** 2 + (p / 3) ** 3
    # One real root: the cube root with the larger modulus has no cancellation, the other follows from uv = −p/3.
    u = q.abs() / 2 + discriminant.clamp_min(0).sqrt()
    u = -torch.where(q < 0, -1.0, 1.0) * u.pow(1 / 3)
    one = u - torch.where(u == 0, 0.0, p / (3 * u))
    radius = 2 * (-p / 3).clamp_min(0).sqrt()
    cosine = torch.where(radius == 0, 0.0, 3 * q / (p * radius))
    angle = cosine.clamp(-1, 1).acos() / 3
    turns = torch.arange(3, dtype=a.dtype, device=a.device) * (2 * math.pi / 3)
    x = torch.where(discriminant > 0, one, radius * (angle - turns).cos()) - shift
    for _ in range(3):
        residual = ((a * x + b) * x + c) * x + d
        slope = (3 * a * x + 2 * b) * x + c
        moved = x - residual / slope
        better = (((a * moved + b) * moved + c) * moved + d).abs() < residual.abs()
        x = torch.where(better, moved, x)
    return x


class OptimalLearningRate(StepHook):
    """Give chosen layers their own learning rate in every step of an optimizer; the training loop does not change.

    The rate of the layer's parameter group is the cap, as in eq. (21): where 0 < η* < lr the step of the layer is
    shortened to η*, otherwise (and where η* is not finite) it stays. The step of each supported optimizer is lr times a
    direction, so a step at rate η is p + (η/lr)(p' − p), with p' what the optimizer made of p: no parameter
    changes its group, learning-rate schedulers and the optimizer's state are not touched, and a step at the cap
    is the optimizer's own bit for bit.

    Attach it after :class:`NearestOrthogonalGradient`, whose gradients it then sees (``treat`` does).

    Args:
        optimizer: one of SGD, Adam, AdamW, NAdam, RAdam, Adamax, RMSprop, Adagrad, Adadelta, Muon; also
            fused, foreach or capturable; a wrapper with an ``.optimizer`` is opened.
        params: layers (their ``weight``, one rate for all groups of a convolution) or raw parameters (as
            ``flatten(1)``): one, a list, or a dict by name. With an orthogonal weight it is the stored tensor.
        rule: ``"paper"``, eq. (20), or ``"exact"``, the minimiser of eq. (18).
        direction: L is the ``"gradient"``, as in the paper, or the ``"update"``: the direction in which the optimizer
            really moves the weight, with momentum, Adam's scaling and weight decay.

    Raises:
        ValueError: a layer without a matrix-like weight, a weight the optimizer does not hold, the treatment twice on
            one weight, an unknown option, or an optimizer whose update direction is unknown.

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

    def __init__(
        self,
        optimizer: Optimizer,
        params: Treatable | Iterable[Treatable] | Mapping[str, Treatable],
        *,
        rule: str = "paper",
        direction: str = "gradient",
    ) -> None:
        require_known(rule, _RULES, "rule of the optimal learning rate")
        require_known(direction, ("gradient", "update"), "direction of the optimal learning rate")
        self.rule, self.direction = rule, direction
        super().__init__(optimizer, params)
        self._rates: dict[str, Tensor] = {}
        self._shortened = {t.name: torch.zeros((), dtype=torch.int64, device=t.parameter.device) for t in self.targets}
        self._before: dict[str, tuple[Tensor, Tensor | None]] = {}

    def validate(self) -> None:
        require_linear_in_lr(self.optimizer, self.treatment, self.targets[0])

    def before(self, target: Target, group: dict[str, Any]) -> None:
        gradient = target.parameter.grad
        assert gradient is not None
        require_dense(gradient, target, self.treatment)
        rate = None
        if self.direction == "gradient":
            rate = self._optimal(target, target.parameter, -gradient if group.get("maximize") else gradient)
            if (scale := gradient_scale(self.optimizer)) is not None:
                rate = rate * scale.to(rate)  # L was still multiplied by it
        self._before[target.name] = target.parameter.detach().clone(), rate

    def after(self, target: Target, group: dict[str, Any]) -> None:
        if target.name not in self._before:
            return
        start, rate = self._before.pop(target.name)
        parameter = target.parameter
        lr = group["lr"]
        if rate is None:
            rate = self._optimal(target, start, start.double() - parameter.double()) * lr  # L = step / lr
        lr = lr.to(rate) if isinstance(lr, Tensor) else torch.full_like(rate, lr)
        # eq. (21), with the positivity it lacks; a NaN fails both comparisons.
        chosen = (rate > 0) & (rate < lr)
        work = torch.promote_types(parameter.dtype, torch.float32)
        share = torch.where(chosen, rate / lr, 1.0).to(work)
        shortened = torch.lerp(start.to(work), parameter.to(work), share).to(parameter.dtype)
        parameter.copy_(torch.where(chosen, shortened, parameter))
        self._rates[target.name] = torch.where(chosen, rate, lr)
        self._shortened[target.name] += chosen

    def _optimal(self, target: Target, weight: Tensor, direction: Tensor) -> Tensor:
        view = target.view
        return _RULES[self.rule](view.matrix(weight.detach()), view.matrix(direction))

    def rates(self) -> dict[str, Tensor]:
        """The rate of each layer in the last step, float64 scalars on its device; empty before the first step."""
        return dict(self._rates)

    def counts(self) -> dict[str, int]:
        """By layer: in how many steps η* was below the cap and therefore taken."""
        return {name: int(count) for name, count in self._shortened.items()}

    def state_dict(self) -> dict[str, Any]:
        """The counts and the last rates; the rule itself has no memory."""
        return {
            "shortened": {name: count.cpu() for name, count in self._shortened.items()},
            "rates": {name: rate.cpu() for name, rate in self._rates.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the counts of a saved run."""
        devices = {target.name: target.parameter.device for target in self.targets}
        for name, count in self._shortened.items():
            count.copy_(state["shortened"][name])
        self._rates = {name: rate.to(devices[name]) for name, rate in state["rates"].items()}
