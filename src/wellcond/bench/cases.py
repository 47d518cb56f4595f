"""The benchmark cases: a task (a function of an input), a shape, and the input.

Matrices are covariances with condition number 1e4 in random bases (1e2 for the polar factor); features are mixed by a
matrix whose singular values span two decades.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wellcond._shared.names import require_known

Shape = tuple[int, ...]

ON_MATRICES = ("sqrt", "invsqrt", "polar")
ON_FEATURES = ("covariance_sqrt", "pooling_layer", "whitening_layer")
TASKS = (*ON_MATRICES, *ON_FEATURES)
# As in torch.nn.BatchNorm2d.
LAYER_EPS = 1e-5

MATRIX_SHAPES: tuple[Shape, ...] = (
    (64, 16, 16),
    (256, 32, 32),
    (1, 64, 64),
    (128, 64, 64),
    (16, 128, 128),
    (8, 256, 256),
    (1, 512, 512),
)
FEATURE_SHAPES: tuple[Shape, ...] = ((32, 256, 7, 7), (8, 256, 14, 14), (128, 64, 32, 32))
QUICK_SHAPES: tuple[Shape, ...] = ((64, 16, 16), (64, 64, 64), (4, 128, 128), (16, 64, 7, 7))


@dataclass(frozen=True)
class Case:
    """One task on one shape: (batch, d, d) matrices or (N, C, H, W) features."""

    task: str
    shape: Shape

    @property
    def size(self) -> str:
        """The shape in readable form: ``128×64×64``."""
        return "×".join(map(str, self.shape))

    @property
    def channels(self) -> int:
        return self.shape[1]

    @property
    def samples(self) -> int:
        """Samples per covariance: the pixels of one image, or of the batch for a norm layer."""
        pixels = math.prod(self.shape[2:])
        return self.shape[0] * pixels if self.task == "whitening_layer" else pixels


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """Parse shapes such as ``128x64x64,32x256x7x7``; a `ValueError` names the first invalid one."""
    shapes = []
    for part in text.replace("×", "x").split(","):
        try:
            shape = tuple(int(number) for number in part.strip().split("x"))
        except ValueError:
            raise ValueError(f"shape '{part.strip()}' is not of the form 128x64x64 or 32x256x7x7") from None
        if min(shape) < 1 or not (len(shape) == 4 or (len(shape) == 3 and shape[1] == shape[2])):
            raise ValueError(
                f"shape '{part.strip()}' is neither batch x d x d (square) nor N x C x H x W, all positive"
            )
        shapes.append(shape)
    return tuple(dict.fromkeys(shapes))


def cases(tasks: Sequence[str], shapes: Sequence[Shape]) -> list[Case]:
    """Every task on every shape it accepts, task by task; a `ValueError` if there is none."""
    for task in tasks:
        require_known(task, TASKS, "task")
    found = [Case(task, s) for task in tasks for s in shapes if (len(s) == 3) == (task in ON_MATRICES)]
    if not found:
        raise ValueError(
            f"none of the shapes is for {', '.join(tasks)}: {', '.join(ON_MATRICES)} take batch x d x d, "
            f"{', '.join(ON_FEATURES)} take N x C x H x W"
        )
    return found


def make_input(case: Case, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The input of a case, generated on the CPU in float64 and rounded once; identical at every call."""
    generator = torch.Generator().manual_seed(20)
    d, on_matrices = case.channels, case.task in ON_MATRICES
    first = torch.randn(*case.shape, dtype=torch.float64, generator=generator)
    second = torch.randn(*(case.shape if on_matrices else (d, d)), dtype=torch.float64, generator=generator)
    V = torch.linalg.qr(second).Q
    smallest_exponent = -4.0 if on_matrices and case.task != "polar" else -2.0
    spectrum = torch.logspace(0.0, smallest_exponent, d, dtype=torch.float64)
    if not on_matrices:
        return ((V * spectrum) @ first.flatten(2)).reshape(case.shape).to(device, dtype)
    U = torch.linalg.qr(first).Q
    if case.task == "polar":
        return ((U * spectrum) @ V.mT).to(dtype).to(device)
    P = ((U * spectrum) @ U.mT).to(dtype)
    return ((P + P.mT) / 2).to(device)
