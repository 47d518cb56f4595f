"""Treatments of the optimizer step: hooks before and after ``optimizer.step``, and their removal.

With ``step(closure)`` the gradients appear only when the closure runs, so there the closure is wrapped: that is how
Lightning's automatic optimisation steps. With a fused optimizer under ``GradScaler`` the gradients are still scaled
when the step begins; :func:`gradient_scale` tells by how much. ``before`` and ``after`` see a sharded weight whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from wellcond._shared.models import unwrapped_optimizer

from ._matrix import Target, Treatables, stored_tensor, targets
from ._registry import Applied, TreatmentClass
from ._sharded import gathered
from ._watch import HOOKS, marks_of, unwatch, watch


def _of_this_torch(names: str) -> tuple[type[Optimizer], ...]:
    return tuple(getattr(torch.optim, name) for name in names.split() if hasattr(torch.optim, name))


LINEAR_IN_LR = _of_this_torch("SGD Adam AdamW NAdam RAdam Adamax RMSprop Adagrad Adadelta Muon")
"""Optimizers whose step is lr times a direction, with a state that depends on neither lr nor the step taken."""
_DECOUPLED = _of_this_torch("AdamW Muon")


def gradient_scale(optimizer: Optimizer) -> Tensor | None:
    """The factor still on the gradients when a fused optimizer unscales them itself, else None."""
    return getattr(optimizer, "grad_scale", None)


def decoupled_decay(optimizer: Optimizer, group: dict[str, Any]) -> Any:
    """The share by which the step first shrank the weight, apart from the update: lr · weight_decay of AdamW and Muon.

    Zero in a step that ``GradScaler`` let a fused optimizer skip by itself, which leaves all weights as they were.
    """
    if not (isinstance(optimizer, _DECOUPLED) or group.get("decoupled_weight_decay")):
        return 0.0
    share = group["lr"] * group["weight_decay"]
    found_inf = getattr(optimizer, "found_inf", None)
    return share if found_inf is None else torch.where(found_inf == 0, share, 0.0)


def _active(optimizer: Optimizer) -> list[StepTreatment]:
    """The treatments that are on in ``optimizer``, kept with it (a copy of the optimizer has no hooks, and no list)."""
    return optimizer.__dict__.setdefault(HOOKS, [])


def require_held(optimizer: Optimizer, target: Target, treatment: str) -> None:
    """Refuse a parameter that the optimizer will not move."""
    if not any(p is target.parameter for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            f"{treatment} of {target.where}: the optimizer does not hold its weight; add it with "
            "optimizer.add_param_group, or build the optimizer from model.parameters()"
        )


def require_linear_in_lr(optimizer: Optimizer, treatment: str, target: Target) -> None:
    """Refuse an optimizer whose update direction cannot be told from its step."""
    if not isinstance(optimizer, LINEAR_IN_LR):
        known = ", ".join(cls.__name__ for cls in LINEAR_IN_LR)
        raise ValueError(
            f"{treatment} of {target.where}: the update direction of {type(optimizer).__name__} is unknown, because "
            f"its step is not known to be proportional to the learning rate; use one of {known}"
        )


class StepTreatment(Applied, TreatmentClass):
    """Base of the treatments that act in ``optimizer.step``; ``before``, ``after``, or both do the work.

    Args:
        optimizer: any ``torch.optim`` optimizer except LBFGS; a wrapper with an ``.optimizer`` is opened.
        params: layers (their ``weight``) or raw parameters (as ``flatten(1)``): one, a list, or a dict by name.

    Attributes:
        targets: the treated parameters.
        optimizer: the optimizer whose steps are treated.

    A treatment of your own, which ``treat``, the callbacks and the command then know as ``gc``::

        class GradientCentralisation(StepTreatment, name="gc", about="gradient centralisation (Yong et al. 2020)"):
            treatment = "gradient centralisation"  # what messages call it

            def before(self, target, group):
                gradient = target.view.matrix(target.parameter.grad)
                centred = gradient - gradient.mean(-1, keepdim=True)
                target.parameter.grad.copy_(target.view.tensor(centred, target.parameter.shape))
    """

    place: ClassVar[int] = 2

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
        """Refuse what this treatment cannot do with ``self.optimizer``, before anything is changed."""

    def before(self, target: Target, group: dict[str, Any]) -> None:
        """Act on one parameter that has a gradient, when all gradients are there and before it moves."""

    def after(self, target: Target, group: dict[str, Any]) -> None:
        """Act on the same parameter when the optimizer has moved it."""

    def finish(self) -> None:
        """Act on all of them together, once each has been given to ``before``, and again after ``after``."""

    def remove(self) -> None:
        """Take the hooks off: later steps are the optimizer's own. May be called twice."""
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
        """Refuse to go on where the layer has another weight than the one that is treated, and it is that one which
        learns."""
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
        with ExitStack() as sharded:  # whose changes are put back when all targets are done
            for target in moving:
                act(sharded.enter_context(gathered(target)), groups[id(target.parameter)])
            self.finish()
