"""Orthogonal loss (OL): a term that pulls the weight towards orthogonality, eq. (12), on the smaller Gram side.

Forms: soft and double soft orthogonality, and the spectral restricted isometry property (SRIP), after Bansal, Chen and
Wang, NeurIPS 2018.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from wellcond._shared.exact_products import exactly
from wellcond._shared.names import require_known
from wellcond._shared.precision import full_precision

from ._largest_eigenvalue import largest_singular_value, naming
from ._matrix import Target, Treatables, targets
from ._registry import Applied, TreatmentClass
from ._sharded import whole


class LossTreatment(Applied, TreatmentClass):
    """Base class of treatments in the loss: ``loss + treatment()`` adds the sum of ``term`` over the layers.

    Args:
        layers: layers with a matrix-like ``weight`` (the one in use, if it is parametrised): one, a list, or a dict.

    Raises:
        TypeError: something that is neither a layer nor a parameter.
        ValueError: a layer without a matrix-like weight, or no layer.

    Example:
        >>> import torch
        >>> class Sparse(LossTreatment):  # with name="l1" and about="..." it is registered
        ...     treatment = "sum of absolute weights"
        ...
        ...     def term(self, W):  # (groups, m, n)
        ...         return W.abs().sum()
        >>> Sparse(torch.nn.Linear(3, 2))().shape
        torch.Size([])
    """

    place: ClassVar[int] = 1
    _treated: ClassVar[WeakSet[nn.Module]]
    targets: list[Target]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._treated = WeakSet()

    def __init__(self, layers: Treatables) -> None:
        self.targets = targets(layers)

    def term(self, W: Tensor) -> Tensor:
        """The term of one layer, a scalar, from its weight (groups, m, n) in float32 or better."""
        raise NotImplementedError

    def __call__(self) -> Tensor:
        """The sum of the terms at the current weights, a scalar with a gradient."""
        return torch.stack([self._term(target) for target in self.targets]).sum()

    def _term(self, target: Target) -> Tensor:
        weight: Any = target.parameter if target.layer is None else target.layer.weight  # the one in use
        weight = whole(weight)
        with full_precision(weight), naming(f"{self.treatment} of {target.where}"):
            return exactly(self.term, target.view.matrix(weight.to(torch.promote_types(weight.dtype, torch.float32))))

    @classmethod
    def require_free(cls, layer: nn.Module, target: Target) -> None:
        if layer in cls._treated:
            raise ValueError(f"treatment '{cls.name}' of {target.where} is already on; call .remove() on the first")

    @classmethod
    def apply_to(cls, optimizer: Optimizer, layers: Mapping[str, nn.Module], options: Mapping[str, Any]) -> Applied:
        applied = cls(layers, **options)
        cls._treated.update(layers.values())
        return applied

    def loss(self) -> Tensor:
        return self()

    def remove(self) -> None:
        self._treated.difference_update(target.layer for target in self.targets if target.layer is not None)


def _gap(W: Tensor) -> Tensor:
    """G − I for the smaller Gram matrix G of W; the larger one can only be the identity if W is square.

    It has no gradient where it is within rounding. There the norms have a kink, and zero is one of the subgradients.
    The gradient of the rounding errors has length 2 and would turn an orthogonal weight away.
    """
    G = W.mT @ W if W.shape[-2] >= W.shape[-1] else W @ W.mT
    k = G.shape[-1]
    gap = G - torch.eye(k, dtype=G.dtype, device=G.device)
    # Orthonormal columns from QR or a polar factor are off by up to 2.6 k eps in Frobenius norm, at 2 to 2304 rows.
    rests = torch.linalg.vector_norm(gap.detach(), dim=(-2, -1), keepdim=True) <= 4 * k * torch.finfo(G.dtype).eps
    return torch.where(rests, gap.detach(), gap)


def soft(W: Tensor) -> Tensor:
    """‖WᵀW − I‖_F (or of WWᵀ, the smaller), eq. (12)."""
    return torch.linalg.vector_norm(_gap(W), dim=(-2, -1))


def double_soft(W: Tensor) -> Tensor:
    """‖WᵀW − I‖²_F + ‖WWᵀ − I‖²_F minus its minimum |m − n|, which is twice the square of the smaller side's norm."""
    return 2 * _gap(W).square().sum((-2, -1))


def srip(W: Tensor) -> Tensor:
    """σ_max(WᵀW − I) (or of WWᵀ, the smaller), exactly: the largest deviation of a squared singular value from 1.

    Computed as a largest eigenvalue, which does not make the host wait for a device.
    """
    return largest_singular_value(_gap(W))


_FORMS = {"soft": soft, "double_soft": double_soft, "srip": srip}


class OrthogonalLoss(LossTreatment, name="ol", about="orthogonal loss, eq. (12)"):
    """A term to add to the loss: ``loss + orthogonal_loss()``.

    Args:
        layers: layers with a matrix-like ``weight`` (the one in use, if it is parametrised): one, a list, or a dict.
        form: ``"soft"``, eq. (12); ``"double_soft"``; or ``"srip"``.
        coefficient: multiplies the term; eq. (12) has 1.

    Raises:
        ValueError: a layer without a matrix-like weight, an unknown form, or a negative coefficient.

    The term is summed over layers and groups of a convolution, in float32 or better (autocast does not
    apply), and its gradient at an orthogonal weight, where the norms have a kink, is zero.

    Complexity: O(m n min(m, n)) per layer. Source: eq. (12) of Song, Sebe and Wang, ECCV 2022; Bansal, Chen and Wang,
    NeurIPS 2018.

    Example:
        >>> import torch
        >>> conv = torch.nn.Conv2d(3, 64, 3)
        >>> penalty = OrthogonalLoss(conv)
        >>> penalty().backward()
        >>> torch.nn.init.orthogonal_(conv.weight) is conv.weight and penalty() < 1e-4
        tensor(True)
    """

    treatment = "orthogonal loss"
    form: str
    coefficient: float

    def __init__(self, layers: Treatables, *, form: str = "soft", coefficient: float = 1.0) -> None:
        require_known(form, _FORMS, "form of the orthogonal loss")
        if not coefficient >= 0:
            raise ValueError(f"coefficient of the orthogonal loss must be >= 0, got {coefficient}")
        super().__init__(layers)
        self.form, self.coefficient = form, coefficient

    def term(self, W: Tensor) -> Tensor:
        return _FORMS[self.form](W).sum()

    def __call__(self) -> Tensor:
        return self.coefficient * super().__call__()
