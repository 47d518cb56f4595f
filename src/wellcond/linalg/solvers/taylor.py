"""The Taylor polynomial of √(1 − x) (MTP; Song, Sebe and Wang, ICLR 2022): like Padé, cheaper and further off."""

from __future__ import annotations

from torch import Tensor

from ._series import SeriesSolver, evaluate_polynomial
from ._solver import Root


class Taylor(SeriesSolver):
    """The Taylor polynomial of degree ``order``; :class:`SeriesSolver` for the arguments."""

    name = "taylor"
    default_order = 10

    def expand(self, Z: Tensor, root: Root) -> Tensor:
        return evaluate_polynomial(taylor_coefficients(0.5 if root == "sqrt" else -0.5, self.order), Z)


def taylor_coefficients(power: float, order: int) -> list[float]:
    """Of (1 − x)^power: c_k = c_{k−1} (k − 1 − power)/k."""
    coefficients = [1.0]
    for k in range(1, order + 1):
        coefficients.append(coefficients[-1] * (k - 1 - power) / k)
    return coefficients
