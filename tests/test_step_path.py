"""The step path of the treatments: one batch for matrices of one shape, and nothing that waits for the device."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from treatment_models import batches, gaussian, polar_reference, small_net
from wellcond.orthogonality import NearestOrthogonalGradient, OptimalLearningRate, treat
from wellcond.orthogonality import _nearest_orthogonal_gradient as module
from wellcond.orthogonality._polar_factors import solver_for

EPS = torch.finfo(torch.float32).eps


gradient = partial(gaussian, dtype=torch.float32)


# Batches ---------------------------------------------------------------------------------------------------------


def many_layers() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "a": nn.Conv2d(3, 8, 3),
            "b": nn.Conv2d(27, 8, 1),  # the matrix of `a` in another shape of tensor
            "c": nn.ConvTranspose2d(27, 8, 1),
            "d": nn.Conv2d(54, 16, 1, groups=2),
            "e": nn.Linear(27, 9),
            "f": nn.Linear(27, 8).to(torch.bfloat16),
        }
    )


@pytest.mark.parametrize("on", ["gradient", "update"])
def test_layers_with_matrices_of_one_shape_are_one_batch_and_equal_a_loop(on, monkeypatch):
    calls = []
    inner = module.polar_factors
    monkeypatch.setattr(module, "polar_factors", lambda m, *rest: calls.append(tuple(m.shape)) or inner(m, *rest))
    layers = many_layers()
    if on == "update":
        del layers["f"]
    together, singly = layers, copy.deepcopy(layers)
    for i, (layer, twin) in enumerate(zip(together.values(), singly.values(), strict=True)):
        layer.weight.grad = gradient(*layer.weight.shape, seed=i).to(layer.weight.dtype)
        twin.weight.grad = layer.weight.grad.clone()
    together["a"].weight.grad[0] = float("nan")
    singly["a"].weight.grad[0] = float("nan")
    optimizer = torch.optim.SGD(together.parameters(), lr=0.1)
    nog = NearestOrthogonalGradient(optimizer, dict(together), on=on)
    optimizer.step()
    assert calls == [(5, 8, 27), (1, 9, 27)] + ([(1, 8, 27)] if on == "gradient" else [])
    for name, layer in singly.items():
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        one = NearestOrthogonalGradient(optimizer, {name: layer}, on=on)
        optimizer.step()
        assert torch.equal(together[name].weight.nan_to_num(7.0), layer.weight.nan_to_num(7.0)), name
        assert nog.counts()[name] == one.counts()[name]
    if on == "gradient":
        for name in "bcd":
            expected = polar_reference(layers[name], gradient(*layers[name].weight.shape, seed="abcdef".index(name)))
            assert (layers[name].weight.grad - expected).abs().max() < 100 * EPS


# The host never asks the device ----------------------------------------------------------------------------------


class NoWaiting(TorchDispatchMode):
    """Raises where a value goes to the host, where the shape of a result depends on values, or where an algorithm asks
    for its convergence."""

    ASKS = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "unique", "is_nonzero", "item")
    CONVERGES = ("eig", "svd", "matrix_exp", "lstsq", "matrix_rank", "pinv", "check_errors")  # of torch.linalg

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        if any(part in name for part in self.CONVERGES):
            raise AssertionError(f"{func} makes the host wait for its convergence")
        if name in self.ASKS or name.startswith(("_unique", "unique")):
            raise AssertionError(f"{func} makes the host wait for the device")
        if name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1]):
            raise AssertionError(f"{func} with a mask makes the host wait for the device")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_waiting():
    """The dispatcher does not see conversions of CPU tensors to Python and NumPy, so those are closed by name."""

    def refuse(*_, **__):
        raise AssertionError("a value was read on the host")

    with pytest.MonkeyPatch.context() as patch, NoWaiting():
        for name in ("item", "tolist", "numpy", "__array__", "cpu", "__bool__", "__float__", "__int__", "__index__"):
            patch.setattr(Tensor, name, refuse)
        yield


def test_the_guard_itself_catches_what_waits():
    x = torch.ones(3)
    for ask in (
        lambda: x[0].item(),
        lambda: float(x[0]),
        lambda: bool(x[0]),
        lambda: x[x > 0],
        lambda: x.nonzero(),
        lambda: x.tolist(),
        lambda: torch.linalg.eigh(x[:, None] * x),
        lambda: torch.linalg.eigvalsh(x[:, None] * x),
        lambda: torch.linalg.svd(x[:, None]),
        lambda: torch.linalg.matrix_norm(x[:, None], 2),
        lambda: torch.linalg.matrix_exp(x[:, None] * x),
        lambda: torch.linalg.solve(torch.eye(3), x),
        lambda: torch.linalg.inv(torch.eye(3)),
        lambda: torch.linalg.cholesky(torch.eye(3)),
    ):
        with no_waiting(), pytest.raises(AssertionError):
            ask()


@contextmanager
def as_off_the_cpu():
    """The ways that an accelerator goes, on the CPU: the choice by device is what is replaced, nothing else."""
    factors = module.polar_factors
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "polar_factors", lambda matrix, _: factors(matrix, "poles"))
        for name in ("_largest_eigenvalue", "_unit_norm"):
            patch.setattr(f"wellcond.orthogonality.{name}.decomposes", lambda _: False)
        yield


VALUES = {"ordinary": 1.0, "zero": 0.0, "nan": float("nan")}


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (NearestOrthogonalGradient, {}),
        (NearestOrthogonalGradient, {"on": "update", "scale": "rms"}),
        (OptimalLearningRate, {"rule": "paper"}),
        (OptimalLearningRate, {"rule": "exact"}),
        (OptimalLearningRate, {"rule": "exact", "direction": "update"}),
    ],
)
def test_a_step_never_waits(make, options, value):
    layer = nn.Conv2d(6, 9, 3, groups=3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5, momentum=0.9)
    hook = make(optimizer, {"conv": layer}, **options)
    for i in range(2):
        layer.weight.grad = gradient(*layer.weight.shape, seed=i) * VALUES[value]
        with as_off_the_cpu(), no_waiting():
            optimizer.step()
    with no_waiting(), pytest.raises(AssertionError):
        hook.counts()  # reading a counter is what waits


def test_off_the_cpu_the_default_is_a_solver_without_a_decomposition():
    """LAPACK-like routines of an accelerator report convergence to the host. A meta tensor stands for one on it."""

    def chosen(*shape, device, dtype=torch.float32):
        return solver_for(torch.ones(*shape, device=device, dtype=dtype), "auto")

    assert chosen(2, 4, 3, device="cpu") == "svd"
    assert chosen(2, 400, 64, device="meta") == chosen(64, 400, device="meta", dtype=torch.float16) == "poles"
    # Where the solutions are large, or double precision is not enough.
    assert chosen(2, 65, 65, device="meta") == chosen(4, 3, device="meta", dtype=torch.float64) == "minimax"


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        ("nog+ow+olr+ol", {"ow": {"map": "exp"}}),
        ("nog+ow+olr+ol", {"ow": {"map": "cayley"}}),
        ("nog+ow+olr+ol", {"ow": {"map": "householder"}, "ol": {"form": "double_soft"}}),
        ("nog+sn+olr+ol", {"olr": {"rule": "exact"}, "ol": {"form": "srip"}}),
        ("nog+sn+ol", {"nog": {"on": "update"}, "sn": {"of": "operator", "input_size": 8}}),
    ],
)
def test_a_whole_training_step_with_the_treatments_never_waits(spec, options):
    """Forward through the weight, backward and step, of the layer before the spectral layer."""
    conv = small_net()[0]
    optimizer = torch.optim.SGD(conv.parameters(), lr=0.1, momentum=0.9)
    treatment = treat(conv, optimizer, spec, layers=[conv], options=options)
    (x, _), *_ = batches(1)
    before = conv.weight.detach().clone()
    for _ in range(2):
        with as_off_the_cpu(), no_waiting():
            optimizer.zero_grad()
            (conv(x).square().sum() + treatment.loss()).backward()
            optimizer.step()
    assert conv.weight.isfinite().all() and not torch.equal(conv.weight, before)
