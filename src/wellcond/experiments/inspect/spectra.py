"""Recording the full spectrum of the covariance at the input of each layer; the monitor keeps only its extremes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from wellcond.experiments.inspect.found import LayerSpectrum
from wellcond.linalg import covariance_spectrum
from wellcond.monitor import observed_features

MAX_MATRICES = 16
"""Per layer, as in the monitor."""


class Spectra:
    """A context manager that records each named layer at its first call in every `batch`, which the caller sets."""

    def __init__(self, root: nn.Module, names: Iterable[str]) -> None:
        self.batch = 0
        self._layers = {name: root.get_submodule(name) for name in names}
        self._last: dict[str, int] = {}
        self._eigvals: dict[str, list[Tensor]] = {}
        self._ranks: dict[str, list[Tensor]] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Spectra:
        for name, layer in self._layers.items():
            self._handles.append(layer.register_forward_pre_hook(self._recorder(name), with_kwargs=True))
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def _recorder(self, name: str) -> Any:
        def record(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._last.get(name) == self.batch:
                return
            self._last[name] = self.batch
            features = observed_features(layer, args, kwargs)[0]
            features = features.reshape(-1, *features.shape[-2:])
            if len(features) > MAX_MATRICES:
                features = features[torch.linspace(0, len(features) - 1, MAX_MATRICES).round().long()]
            spectrum = covariance_spectrum(features)
            finite = torch.isfinite(spectrum.tolerance)
            self._eigvals.setdefault(name, []).append(spectrum.eigvals[finite])
            self._ranks.setdefault(name, []).append(spectrum.numerical_rank[finite])

        return record

    def found(self) -> dict[str, LayerSpectrum]:
        """The medians for all layers with finite features."""
        found = {}
        for name, eigvals in self._eigvals.items():
            if len(together := torch.cat(eigvals)):
                rank = int(torch.cat(self._ranks[name]).median())
                found[name] = LayerSpectrum(tuple(together.median(0).values.tolist()), rank)
        return found
