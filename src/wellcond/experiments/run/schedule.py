"""Learning-rate schedules, relative to the length of training: step, cosine, or constant."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from wellcond.experiments.errors import ConfigError

_STEPS = re.compile(r"(\d+(?:,\d+)*)/(\d+)")


@dataclass(frozen=True)
class Schedule:
    """The factor on the initial learning rate at each step.

    It is divided by 10 at each of the ``drops``, given as fractions of the training; or follows a ``cosine`` to zero
    (Loshchilov and Hutter, SGDR, ICLR 2017, without restarts); or is constant.
    """

    drops: tuple[float, ...] = ()
    cosine: bool = False

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Parse ``100,200,300/350``, ``cosine`` or ``constant``; a `ConfigError` for anything else."""
        if text in ("cosine", "constant"):
            return cls(cosine=text == "cosine")
        if (found := _STEPS.fullmatch(text.replace(" ", ""))) is not None:
            epochs, total = [int(epoch) for epoch in found[1].split(",")], int(found[2])
            if all(0 < one < other for one, other in zip(epochs, [*epochs[1:], total], strict=True)):
                return cls(tuple(epoch / total for epoch in epochs))
        raise ConfigError(
            f"schedule must be cosine, constant, or increasing epochs/total such as 100,200,300/350, got {text!r}"
        )

    def factor(self, step: int, total: int) -> float:
        """The factor at ``step`` of ``total`` steps."""
        if self.cosine:
            return (1 + math.cos(math.pi * step / total)) / 2
        return 0.1 ** sum(step >= round(drop * total) for drop in self.drops)
