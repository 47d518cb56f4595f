"""The layers that hold no state, as functions."""

from ._whitening_coloring import whitening_coloring

__all__ = ["whitening_coloring"]
