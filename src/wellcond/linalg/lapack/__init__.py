"""Decompositions that do not crash: failures go down a fall-back chain and are counted, and batches use all cores.

Everything that touches LAPACK, or the threads it runs on, is in this folder.
"""

from ._batches import in_threads
from ._eigh import eigh, nan_for_failures
from ._solve import solve
from ._svd import thin_svd
from ._switch import parallel_batches_enabled, set_parallel_batches

__all__ = [
    "eigh",
    "in_threads",
    "nan_for_failures",
    "parallel_batches_enabled",
    "set_parallel_batches",
    "solve",
    "thin_svd",
]
