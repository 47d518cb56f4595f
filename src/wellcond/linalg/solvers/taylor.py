"""The Taylor polynomial of √(1 − x) (MTP; Song, Sebe and Wang, ICLR 2022): cheaper than Padé and less accurate."""

from __future__ import annotations

from torch import Tensor

from ._series import SeriesSolver, evaluate_polynomial
from ._solver import Root


class Taylor(SeriesSolver):
    """The Taylor polynomial of √(1 − x) on I − P/‖P‖_F, of degree ``order``, by matrix products only; a damped root.

    Args:
        order: of the polynomial; 10 in the published layer.
        backward_steps: Newton–Schulz steps for the Lyapunov equation of the derivative.
        tolerance: warn once if the relative residual exceeds it (``None``: never); checked when values are.

    Raises:
        ValueError: an order or a number of steps below 1.

    Complexity: ``order`` products of d × d matrices forward, five products per step backward.
    Source: MTP, Song, Sebe and Wang, ICLR 2022.

    Example:
        >>> import torch
        >>> from wellcond.linalg import sqrtm
        >>> sqrtm(torch.diag(torch.tensor([4.0, 9.0])), solver=Taylor(order=40)).round(decimals=2)
        tensor([[2., 0.],
                [0., 3.]])
    """

    name = "taylor"
    default_order = 10

    def expand(self, Z: Tensor, root: Root) -> Tensor:
        return evaluate_polynomial(taylor_coefficients(0.5 if root == "sqrt" else -0.5, self.order), Z)


def taylor_coefficients(power: float, order: int) -> list[float]:
    """The coefficients of (1 − x)^power: c_k = c_{k−1} (k − 1 − power)/k."""
    coefficients = [1.0]
    for k in range(1, order + 1):
        coefficients.append(coefficients[-1] * (k - 1 - power) / k)
    return coefficients
