"""The nearest orthogonal gradient (NOG): the gradient G = U S Vᵀ is replaced by U Vᵀ.

Song, Sebe and Wang, "Improving Covariance Conditioning of the SVD Meta-layer by Orthogonality", ECCV 2022, section 5.1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from wellcond._shared.names import require_known
from wellcond.linalg import Minimax

from ._matrix import Target, Treatables, parametrisations
from ._optimizers import decoupled_decay, gradient_scale, require_linear_in_lr
from ._orthogonal_weight import OrthogonalWeight
from ._polar_factors import KINDS, SOLVERS, norm_ratio, polar_factors
from ._registry import moved_to, on_the_host
from ._step_treatment import StepTreatment

_COUNTS = ("treated", "zero", "nonfinite")
_SHOWN = [KINDS.index(name) for name in _COUNTS]
_Write = Callable[[Tensor, Tensor, Tensor], None]
"""A function of the factor, of whether there is one (groups, 1, 1), and of the original matrices."""


class _Waiting(NamedTuple):
    """A tensor to treat, what to do with its factor, and the unit still on it (a loss scale, or lr)."""

    target: Target
    tensor: Tensor
    write: _Write
    unit: Tensor | float


_SCALES = {
    "paper": lambda m, n: 1.0,
    "rms": lambda m, n: 0.2 * max(m, n) ** 0.5,
    "muon": lambda m, n: max(1.0, m / n) ** 0.5,
}
"""By name: the common singular value that an m × n matrix gets."""


def _keeps_turning(target: Target) -> bool:
    """Whether an orthogonal weight is computed from the tensor by a map under which a long tensor turns as fast."""
    chain = () if target.layer is None else parametrisations(target.layer)
    return any(isinstance(one, OrthogonalWeight) and not one.scale_invariant for one in chain)


class NearestOrthogonalGradient(StepTreatment, name="nog", about="nearest orthogonal gradient, eq. (14)-(17)"):
    """Make the gradient of selected layers orthogonal in every step of an optimizer; the training loop does not change.

    The gradient is replaced in place when the optimizer begins its step: after backward, DDP's all-reduce,
    accumulation, unscaling and clipping (which it undoes for these layers: the norm of U Vᵀ is the square root of the
    rank; to limit the step, lower the learning rate). Matrices of the same shape are decomposed in one batch.

    Args:
        optimizer: any ``torch.optim`` optimizer except LBFGS; wrappers with an ``.optimizer`` are unwrapped.
        params: layers (their ``weight`` as (groups, m, n), one matrix per group of a convolution) or raw parameters (as
            ``flatten(1)``), of a real floating dtype: one, a list, or a dict by name.
        on: ``"gradient"``, as in the paper, or ``"update"``, as in Muon: the step of the optimizer (momentum, Adam's
            scaling, coupled weight decay) is made orthogonal instead; decoupled weight decay is not affected. The
            update is measured by the change of the weight, so its accuracy is eps·|w|/lr.
        scale: ``"paper"``: all singular values 1; ``"gradient"``: all equal, with the Frobenius norm of the gradient;
            ``"rms"``: 0.2·√max(m, n), so that the root mean square entry is 0.2 at full rank, the size of an Adam step,
            and a learning rate tuned for Adam fits; ``"muon"``: √max(1, m/n), the scale of the original Muon. The last
            two are ``match_rms_adamw`` and ``original`` in ``torch.optim.Muon``. ``"auto"``: ``"paper"``, but
            ``"gradient"`` for the stored tensor of an orthogonal weight with a map of matrices. (With steps of constant
            length, a plain weight before a spectral layer grows, as does the filter of ``map="soc"``: both turn more
            and more slowly. With the maps of matrices, the weight turns by the same angle in every step.)
        solver: as in :func:`wellcond.linalg.polar`, which states the error of each: ``"svd"``; ``"minimax"``, matrix
            products only, equal for singular values down to 1e-5 of the largest; ``"muon"``, the five steps of that
            optimizer, whose singular values are 0.68 to 1.14 instead of 1. Or ``"poles"``, one batch of linear solves
            in double precision, as accurate as ``"minimax"`` in a quarter of its kernels, for matrices with up to 64
            rows or columns that are not themselves in double precision (others use ``"minimax"``). ``"auto"``:
            ``"svd"`` on the CPU, ``"poles"`` elsewhere, where the host would wait for a decomposition.

    Raises:
        ValueError: a layer without a matrix-like weight, a weight that the optimizer does not hold, the treatment twice
            on one weight, LBFGS, an unknown option; or, with ``on="update"``, a half-precision weight (whose rounding
            is as large as the update) or an optimizer whose step is not known to be proportional to its learning rate.

    A zero, tiny or non-finite gradient is left unchanged and counted in :meth:`counts`; the host never waits for the
    device, except for ``"svd"``.

    Complexity: one polar factor per matrix and step, O(m n min(m, n)). Source: eq. (14)–(17) of Song, Sebe and Wang,
    ECCV 2022.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(3, 5)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> nog = NearestOrthogonalGradient(optimizer, layer)
        >>> layer(torch.randn(8, 3)).square().sum().backward()
        >>> optimizer.step()
        >>> torch.dist(layer.weight.grad.T @ layer.weight.grad, torch.eye(3)) < 1e-5
        tensor(True)
    """

    treatment = "nearest orthogonal gradient"
    on: str
    scale: str
    solver: str | Minimax

    def __init__(
        self,
        optimizer: Optimizer,
        params: Treatables,
        *,
        on: str = "gradient",
        scale: str = "auto",
        solver: str | Minimax = "auto",
    ) -> None:
        require_known(on, ("gradient", "update"), "place of the nearest orthogonal gradient")
        require_known(scale, ("auto", *_SCALES, "gradient"), "scale of the nearest orthogonal gradient")
        if isinstance(solver, str):
            require_known(solver, SOLVERS, "solver of the nearest orthogonal gradient")
        self.on, self.scale, self.solver = on, scale, solver
        super().__init__(optimizer, params)
        devices = {target.name: target.parameter.device for target in self.targets}
        self._counts = {name: torch.zeros(3, dtype=torch.int64, device=device) for name, device in devices.items()}
        groups = {target.name: target.view.groups for target in self.targets}
        self._ones = {name: torch.ones(groups[name], dtype=torch.int64, device=devices[name]) for name in groups}
        self._before: dict[str, Tensor] = {}
        self._waiting: list[_Waiting] = []

    def validate(self) -> None:
        if self.on == "gradient":
            return
        require_linear_in_lr(self.optimizer, self.treatment, self.targets[0])
        for target in self.targets:
            if torch.finfo(target.parameter.dtype).bits < 32:
                raise ValueError(
                    f"{self.treatment} of {target.where}: on='update' reads the update from the move of the weight, "
                    f"which {target.parameter.dtype} rounds away; keep the weight in float32 (autocast may compute "
                    "in half precision), or use on='gradient'"
                )

    def before(self, target: Target, group: dict[str, Any]) -> None:
        gradient = target.parameter.grad
        assert gradient is not None
        if self.on == "update":
            self._before[target.name] = target.parameter.detach().clone()
            return
        scale = gradient_scale(self.optimizer)

        def write(factor: Tensor, found: Tensor, work: Tensor) -> None:
            if scale is not None:  # the fused optimizer will divide by it
                factor = factor * scale.to(factor)
            gradient.copy_(target.view.tensor(torch.where(found, factor, work), gradient.shape))

        self._waiting.append(_Waiting(target, gradient, write, 1.0 if scale is None else scale))

    def after(self, target: Target, group: dict[str, Any]) -> None:
        if self.on == "gradient" or (start := self._before.pop(target.name, None)) is None:
            return
        parameter, lr = target.parameter, group["lr"]
        decay = decoupled_decay(self.optimizer, group)
        start = start * (1 - (decay.to(start) if isinstance(decay, Tensor) else decay))

        def write(factor: Tensor, found: Tensor, _: Tensor) -> None:
            moved = target.view.matrix(start) - lr * factor
            parameter.copy_(target.view.tensor(torch.where(found, moved, target.view.matrix(parameter)), start.shape))

        self._waiting.append(_Waiting(target, start - parameter, write, lr))

    def finish(self) -> None:
        batches: dict[Any, list[_Waiting]] = {}
        for item in self._waiting:
            matrix = item.target.view.matrix(item.tensor)
            batches.setdefault((matrix.shape[-2:], matrix.dtype, matrix.device), []).append(item)
        self._waiting.clear()
        for batch in batches.values():
            self._treat(batch)

    def _treat(self, batch: list[_Waiting]) -> None:
        """Treat matrices of the same shape at once: fewer calls, and all cores or one kernel for all of them."""
        matrices = [item.target.view.matrix(item.tensor) for item in batch]
        factors, kinds, work = polar_factors(matrices[0] if len(batch) == 1 else torch.cat(matrices), self.solver)
        found = kinds == 1
        if self.scale in ("rms", "muon"):
            factors = factors * _SCALES[self.scale](*factors.shape[-2:])
        parts = [whole.split([len(matrix) for matrix in matrices]) for whole in (factors, kinds, found, work)]
        for (target, _, write, unit), matrix, factor, kind, one, own in zip(batch, matrices, *parts, strict=True):
            # Counted on the device: the host waits only when a counter is read.
            name = target.name
            self._counts[name] = moved_to(kind.device, self._counts[name])
            self._ones[name] = moved_to(kind.device, self._ones[name])
            self._counts[name].index_add_(0, kind.flatten(), self._ones[name])
            if self.scale == "gradient" or (self.scale == "auto" and _keeps_turning(target)):
                ratio = norm_ratio(matrix, factor)
                factor = factor * (ratio if isinstance(unit, float) and unit == 1.0 else ratio / unit)
            write(factor, one, own)

    def counts(self) -> dict[str, dict[str, int]]:
        """By layer, the number of gradient matrices ``treated``, or left unchanged as ``zero`` or as ``nonfinite``."""
        read = {name: dict(zip(KINDS, counts.tolist(), strict=True)) for name, counts in self._counts.items()}
        return {name: {kind: of[kind] for kind in _COUNTS} for name, of in read.items()}

    def state_dict(self) -> dict[str, Any]:
        """The counts, the only state that outlives a step."""
        return {"counts": {name: on_the_host(counts)[_SHOWN] for name, counts in self._counts.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the counts of a saved run."""
        for name, counts in self._counts.items():
            counts.copy_(state["counts"][name][_SHOWN])  # swapping the first two is its own inverse
