"""Decompositions as they are made here: with a fall-back chain instead of a crash, counted, and a batch on all cores.

Everything that touches LAPACK, or the threads that it runs on, is in this folder.
"""

from ._batches import in_threads
from ._eigh import eigh, nan_for_failures
from ._solve import solve
from ._svd import thin_svd

__all__ = ["eigh", "in_threads", "nan_for_failures", "solve", "thin_svd"]
