"""A spectral layer: the mark, and what it decomposes."""

from torch import nn

from wellcond.linalg import covariance_logm


class LogPool(nn.Module):
    is_spectral_layer = True

    def forward(self, x):
        return covariance_logm(x.flatten(2), eps=1e-3).flatten(1)

    def observed_features(self, x):
        return x.flatten(2), 1e-3
