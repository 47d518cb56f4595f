"""The conditioning of a network, layer by layer, on images of any data set: what `wellcond inspect` prints.

The covariances are those of batches in training mode, which the solver of a spectral layer sees in training; no step
is taken. Each file imports only from those before it:

- ``found``: what was found, as data and as a table;
- ``spectra``, ``look``: the whole spectra; which layers are looked at, and the batches through them;
- ``models``: any model that can be imported;
- ``runs``: the network of a run.
"""

from .found import Inspection, LayerSpectrum, WeightSpectrum
from .models import inspect_model
from .runs import inspect, newest_run

__all__ = [
    "Inspection",
    "LayerSpectrum",
    "WeightSpectrum",
    "inspect",
    "inspect_model",
    "newest_run",
]
