"""A solver: the product-free iteration of Denman and Beavers (1976), X ← (X + Y⁻¹)/2, Y ← (Y + X⁻¹)/2."""

import torch

from wellcond.linalg.solvers import LyapunovSolver
from wellcond.linalg.solvers.eigh import Eigh


class DenmanBeavers(LyapunovSolver):
    name = "denman_beavers"

    def forward(self, P, roots, eps):
        eye = torch.eye(P.shape[-1], dtype=P.dtype)
        X, Y = P + eps * eye, eye.expand_as(P)
        for _ in range(20):
            X, Y = (X + torch.linalg.inv(Y)) / 2, (Y + torch.linalg.inv(X)) / 2
        values = {"sqrt": X, "invsqrt": Y}
        return tuple((values[root] + values[root].mH) / 2 for root in roots), tuple(torch.linalg.eigh(X))

    def lyapunov(self, Q, G, root, done):
        return Eigh().lyapunov(Q, G, root, done)
