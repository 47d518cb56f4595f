"""The names of the treatments, as the paper's tables write them: ``nog+ow+olr``."""

from __future__ import annotations

from wellcond._shared.names import require_known

TREATMENTS: dict[str, str] = {
    "sn": "spectral norm of the weight, eq. (11)",
    "ol": "orthogonal loss, eq. (12)",
    "ow": "orthogonal weight, eq. (13)",
    "nog": "nearest orthogonal gradient, eq. (14)-(17)",
    "olr": "optimal learning rate, eq. (18)-(21)",
}
"""Every treatment and what it is."""


def parse_treatments(names: str) -> tuple[str, ...]:
    """``"nog+ow+olr"`` as ``("nog", "ow", "olr")``: the order kept, case and blanks ignored.

    Raises:
        TypeError: ``names`` is not a string.
        ValueError: an empty name, an unknown one (with the nearest right one), or the same one twice.

    Example:
        >>> parse_treatments("NOG + OW")
        ('nog', 'ow')
    """
    if not isinstance(names, str):
        raise TypeError(f"treatments are one string such as 'nog+ow+olr', got {type(names).__name__}")
    parsed = tuple(name.strip().lower() for name in names.split("+"))
    for name in parsed:
        require_known(name, TREATMENTS, "treatment", f" in '{names}'")
    twice = sorted({name for name in parsed if parsed.count(name) > 1})
    if twice:
        raise ValueError(f"treatment '{twice[0]}' is named twice in '{names}'; name it once")
    return parsed
