"""Decorrelated batch norm under torch.compile, torch.export and in ONNX: the same values, and no eigendecomposition."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from helpers import NORMS, relative_error
from wellcond.nn import DecorrelatedBatchNorm1d, DecorrelatedBatchNorm2d, GlobalCovariancePool2d, IterNorm2d

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def model():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), DecorrelatedBatchNorm2d(8, groups=2), nn.ReLU(), nn.Flatten(2), DecorrelatedBatchNorm1d(8)
    )
    for _ in range(3):
        net(torch.randn(4, 3, 8, 8))
    return net.eval()


def gradients(layer, x):
    y = layer(x)
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).sin().view(y.shape)
    return y, *torch.autograd.grad((weights * y).sum(), (x, layer.weight, layer.bias))


@pytest.mark.parametrize(
    ("options", "backend"),
    [({}, "aot_eager"), ({"groups": 2, "relative": True}, "eager"), ({"method": "cholesky"}, "aot_eager")],
)
def test_compiled_training_has_the_values_gradients_and_statistics_of_eager(options, backend):
    layer = DecorrelatedBatchNorm2d(4, **options, dtype=torch.float64)
    plain = copy.deepcopy(layer)
    x = torch.randn(8, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    layer.compile(backend=backend)
    for got, want in zip(gradients(layer, x), gradients(plain, x), strict=True):
        assert relative_error(got, want) < 1e-12
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[name], value)


def test_the_iterated_norm_compiles_whole_in_training():
    layer = IterNorm2d(4, dtype=torch.float64)
    plain = copy.deepcopy(layer)
    x = torch.randn(8, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    layer.compile(backend="aot_eager", fullgraph=True)
    for got, want in zip(gradients(layer, x), gradients(plain, x), strict=True):
        assert relative_error(got, want) < 1e-12


def test_compiled_evaluation_is_one_graph_that_follows_training_and_loading():
    layer = DecorrelatedBatchNorm2d(4, dtype=torch.float64).eval()
    plain = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(8, 4, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(compiled(x), plain(x))
    for both in (layer, plain):
        both.train()
        both(3 * x)  # eager, so that the running covariance is not the identity any more
        both.eval()
    torch.testing.assert_close(compiled(x), plain(x))
    state = DecorrelatedBatchNorm2d(4, dtype=torch.float64).state_dict()
    state["running_cov"] *= 9
    layer.load_state_dict(state)
    torch.testing.assert_close(compiled(x), x / 3, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 7), (5, 6, 2, 3), (5, 6, 2, 1, 3)])
@pytest.mark.parametrize("groups", [1, 3])
def test_exported_programs_of_every_rank_equal_evaluation_and_decompose_nothing(shape, groups):
    layer = NORMS[len(shape)](6, groups=groups)
    layer(torch.randn(64, *shape[1:]) + 1)
    layer.eval()
    x = torch.randn(shape)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert not [name for name in names if "linalg" in name or "eigh" in name]
    more = torch.randn(9, *shape[1:])
    for batch in (x, more):
        assert relative_error(program.module()(batch), layer(batch).detach()) < 1e-6


@pytest.mark.parametrize(
    "options",
    [{"running": "whitening"}, {"momentum": None}, {"method": "cholesky"}, {"method": "pca"}, {"relative": True}],
    ids=str,
)
def test_an_exported_training_step_is_that_of_eager_and_leaves_its_input_alone(options):
    """What PyTorch counts to find a buffer includes those that are None: the first of ours are not."""
    layer = DecorrelatedBatchNorm2d(3, **options)
    eager, x = copy.deepcopy(layer), torch.randn(8, 3, 4, 4)
    given = x.clone()
    program = torch.export.export(layer, (x,)).module()
    for _ in range(2):
        assert relative_error(program(x), eager(x)) < 1e-4
    assert torch.equal(x, given)
    for name, value in eager.state_dict().items():
        if name == "_extra_state":  # options, of which the program has none
            continue
        assert relative_error(program.state_dict()[name], value) < 1e-5, name


@pytest.mark.parametrize("size", [2, 6])
@pytest.mark.parametrize("options", [{}, {"function": "log", "eps": 1e-3}, {"solver": "newton_schulz"}], ids=str)
def test_exported_heads_take_any_batch_of_maps_smaller_or_larger_than_the_channels(size, options):
    head = GlobalCovariancePool2d(8, **options).eval()
    dynamic = ({0: torch.export.Dim("batch", min=2)},)
    program = torch.export.export(head, (torch.randn(3, 8, size, size),), dynamic_shapes=dynamic).module()
    x = torch.randn(5, 8, size, size)
    assert relative_error(program(x), head(x)) < 1e-5


@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx_runtime_computes_evaluation_from_convolutions(dynamo, tmp_path):
    net, x = model(), torch.randn(4, 3, 8, 8)
    path = tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters' own deprecations
        torch.onnx.export(net, (x,), str(path), dynamo=dynamo)
    kinds = {node.op_type for node in onnx.load(str(path)).graph.node}
    assert "Conv" in kinds and not kinds & {"Loop", "Det", "Einsum"}
    assert all(node.domain in ("", "ai.onnx") for node in onnx.load(str(path)).graph.node)
    session = onnxruntime.InferenceSession(str(path))
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert np.abs(got - net(x).detach().numpy()).max() < 1e-4


def test_the_evaluation_map_is_the_layer_as_a_convolution():
    layer = DecorrelatedBatchNorm2d(6, groups=2, dtype=torch.float64)
    layer(torch.randn(16, 6, 4, 4, dtype=torch.float64) * torch.arange(1.0, 7).view(-1, 1, 1))
    nn.init.normal_(layer.bias)
    x = torch.randn(3, 6, 4, 4, dtype=torch.float64)
    weight, bias = layer.eval().evaluation_map()
    torch.testing.assert_close(nn.functional.conv2d(x, weight, bias, groups=2), layer(x))
    with pytest.raises(RuntimeError, match="no running statistics"):
        DecorrelatedBatchNorm2d(6, track_running_stats=False).evaluation_map()
