"""wellcond: spectral layers in PyTorch, exact, fast and well-conditioned.

The parts, in the order in which data flows through them:

- :mod:`wellcond.linalg`: differentiable functions of covariance matrices;
- :mod:`wellcond.nn`: layers built on them;
- :mod:`wellcond.orthogonality`: treatments of the layer before a spectral layer;
- :mod:`wellcond.monitor`: condition numbers, ranks and solver failures of a model in training.
"""

__version__ = "0.1.0.dev0"
