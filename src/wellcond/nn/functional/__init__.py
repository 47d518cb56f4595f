"""The layers that hold no state, as functions."""

from ._rigid_align import rigid_align
from ._whitening_coloring import whitening_coloring

__all__ = ["rigid_align", "whitening_coloring"]
