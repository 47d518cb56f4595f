"""Decompositions that do not crash: each failure goes down a fall-back chain and is counted, and batches use all cores.

Everything that touches LAPACK, or the threads that it runs on, is in this folder.
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
