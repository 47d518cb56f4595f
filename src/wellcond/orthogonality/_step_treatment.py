"""Treatments of the optimizer step, by hooks before and after ``optimizer.step``.

With ``step(closure)`` the gradients exist only after the closure has run, so the closure is wrapped; Lightning's
automatic optimisation steps in this way. With a fused optimizer under ``GradScaler`` the gradients are still scaled
when the step begins, by ``_optimizers.gradient_scale``. ``before`` and ``after`` see a sharded weight as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim import LBFGS, Optimizer

from wellcond._shared.models import unwrapped_optimizer

from ._matrix import Target, Treatables, stored_tensor, targets
from ._optimizers import require_held
from ._registry import Applied, TreatmentClass
from ._sharded import gathered
from ._watch import HOOKS, marks_of, unwatch, watch


def _active(optimizer: Optimizer) -> list[StepTreatment]:
    """The active treatments of ``optimizer``, stored in it (a copy of the optimizer has neither hooks nor list)."""
    return optimizer.__dict__.setdefault(HOOKS, [])


class StepTreatment(Applied, TreatmentClass):
    """Base class of treatments that act in ``optimizer.step``, in ``before``, ``after``, or both.

    Args:
        optimizer: any ``torch.optim`` optimizer except LBFGS; wrappers with an ``.optimizer`` are unwrapped.
        params: layers (their ``weight``) or raw parameters (as ``flatten(1)``): one, a list, or a dict by name.

    Attributes:
        targets: the treated parameters.
        optimizer: the optimizer whose steps are treated.

    Raises:
        TypeError: something that is neither a layer nor a parameter.
        ValueError: LBFGS, a parameter that is not matrix-like or not held by the optimizer, or the treatment twice.

    Example:
        >>> import torch
        >>> class CentralisedGradient(StepTreatment):  # name="gc", about="..." would register it for ``treat``
        ...     treatment = "gradient centralisation"  # its name in messages
        ...
        ...     def before(self, target, group):
        ...         gradient = target.view.matrix(target.parameter.grad)
        ...         centred = gradient - gradient.mean(-1, keepdim=True)
        ...         target.parameter.grad.copy_(target.view.tensor(centred, target.parameter.shape))
        >>> layer = torch.nn.Linear(3, 5)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> gc = CentralisedGradient(optimizer, layer)
        >>> layer(torch.randn(8, 3)).square().sum().backward()
        >>> optimizer.step()
        >>> bool(layer.weight.grad.sum(1).abs().max() < 1e-4)
        True
    """

    place: ClassVar[int] = 2
    optimizer: Optimizer
    targets: list[Target]

    def __init__(self, optimizer: Optimizer, params: Treatables) -> None:
        self.optimizer = unwrapped_optimizer(optimizer)
        self.targets = targets(params)
        if isinstance(self.optimizer, LBFGS):
            raise ValueError(
                f"{self.treatment} of {self.targets[0].where}: LBFGS evaluates the gradient several times a step and "
                "needs it as it is; use a first-order optimizer such as SGD or AdamW"
            )
        others = _active(self.optimizer)
        taken = {id(t.parameter) for other in others if type(other) is type(self) for t in other.targets}
        named: dict[int, str] = {}
        for target in self.targets:
            require_held(self.optimizer, target, self.treatment)
            if id(target.parameter) in taken:
                raise ValueError(
                    f"{self.treatment} of {target.where} is already on in this optimizer; call .remove() on the first"
                )
            if (other := named.setdefault(id(target.parameter), target.where)) is not target.where:
                raise ValueError(f"{self.treatment} of {target.where}: {other} has the same weight; name one of them")
        self.validate()
        self._handles = [
            self.optimizer.register_step_pre_hook(self._pre),
            self.optimizer.register_step_post_hook(lambda *_: self._run(self.after)),
        ]
        for target in self.targets:
            watch(self.treatment, target.where, target.parameter, target.layer)
        others.append(self)

    @classmethod
    def apply_to(cls, optimizer: Optimizer, layers: Mapping[str, nn.Module], options: Mapping[str, Any]) -> Applied:
        return cls(optimizer, layers, **options)

    def validate(self) -> None:
        """Raise for what this treatment cannot do with ``self.optimizer``, before anything is changed."""

    def before(self, target: Target, group: dict[str, Any]) -> None:
        """Act on a parameter with a gradient, after all gradients are there and before it is updated."""

    def after(self, target: Target, group: dict[str, Any]) -> None:
        """Act on the same parameter after the optimizer has updated it."""

    def finish(self) -> None:
        """Act on all of them together, after each has been passed to ``before``, and again after ``after``."""

    def remove(self) -> None:
        """Remove the hooks: later steps are the optimizer's own. May be called twice."""
        for handle in self._handles:
            handle.remove()
        for target in self.targets:
            unwatch(self.treatment, target.parameter, target.layer)
        if self in (others := _active(self.optimizer)):
            others.remove(self)
        if not others:
            del self.optimizer.__dict__[HOOKS]

    def _pre(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._run(self.before)
            return None

        def treated() -> Any:
            loss = closure()
            self._run(self.before)
            return loss

        if len(args) > 1:
            return (args[0], treated, *args[2:]), kwargs
        return args, {**kwargs, "closure": treated}

    def _require_same_weight(self, target: Target) -> None:
        """Raise if the layer has another weight than the treated one, and that is the one that is trained."""
        now = stored_tensor(target.layer) if target.layer is not None else None
        if now is not None and now is not target.parameter and now.grad is not None:
            raise RuntimeError(
                f"{self.treatment} of {target.where}: the layer has another weight than when it was treated "
                "(load_state_dict(assign=True), or one set by hand), which this optimizer does not hold; "
                "build the optimizer again, and treat the model again"
            )

    @torch.no_grad()
    def _run(self, act: Any) -> None:
        groups = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        moving: list[Target] = []
        for target in self.targets:
            if mark := marks_of(target.parameter).get(self.treatment):
                mark["ran"] = True
            if id(target.parameter) not in groups:
                raise RuntimeError(f"{self.treatment} of {target.where}: the optimizer no longer holds its weight")
            if (gradient := target.parameter.grad) is None:
                self._require_same_weight(target)
                continue
            if gradient.layout is not torch.strided:
                raise ValueError(
                    f"{self.treatment} of {target.where}: its gradient is sparse ({gradient.layout}); use a dense one"
                )
            moving.append(target)
        with ExitStack() as sharded:  # changes are written back once all targets are done
            for target in moving:
                act(sharded.enter_context(gathered(target)), groups[id(target.parameter)])
            self.finish()
