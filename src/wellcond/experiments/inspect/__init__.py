"""`wellcond inspect`: the conditioning of the layers of a network on a data set.

The covariances are those of batches in training mode, as seen by spectral layers during training; the weights are not
changed. Each file imports only from those before it:

- ``found``: the result, as data and as a table;
- ``spectra``, ``look``: recording of full spectra; choice of layers, and forward passes;
- ``models``: any importable model;
- ``runs``: the network of a run.
"""

from .found import Inspection, LayerSpectrum, WeightSpectrum
from .models import inspect_model
from .runs import inspect, newest_run

__all__ = ["Inspection", "LayerSpectrum", "WeightSpectrum", "inspect", "inspect_model", "newest_run"]
