"""Every layer in evaluation exports: by torch.export for any batch, to ONNX by products alone, or it says why not."""

from __future__ import annotations

import io
import warnings
from contextlib import redirect_stderr, redirect_stdout
from functools import partial

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from helpers import eps_of, relative_error
from wellcond.linalg import SOLVERS
from wellcond.nn import (
    DecorrelatedBatchNorm2d,
    GlobalCovariancePool2d,
    SkewOrthogonalConv2d,
    SpectralLayer,
    TokenCovariancePool,
    WhiteningColoring,
)
from wellcond.orthogonality import orthogonal_weight, spectral_norm

pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings("ignore::wellcond.linalg.ApproximateRootWarning"),
]


class Stylised(nn.Module):
    """Whitening and colouring by a style that is made from the content, so that there is one input."""

    def __init__(self, eps: float, **options) -> None:
        super().__init__()
        self.transfer = WhiteningColoring(eps, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.transfer(x, x.flip(1).tanh())


def convolution(treat, **options):
    return treat(nn.Conv2d(6, 8, 3), **options)


MANY, FEW, TOKENS = (3, 6, 4, 4), (3, 6, 2, 2), (3, 9, 6)  # positions against six channels
GCP = partial(GlobalCovariancePool2d, 6)
LAYERS = {
    **{f"sqrt {solver}": (partial(GCP, solver=solver), MANY) for solver in SOLVERS},
    "sqrt auto": (GCP, MANY),
    "sqrt few": (GCP, FEW),
    "sqrt reduced": (partial(GCP, reduction=4, normalisation="trace", isometric=True), MANY),
    "invsqrt": (partial(GCP, function="invsqrt", eps=1e-3), FEW),
    "log": (partial(GCP, function="log", eps=1e-3), MANY),
    "log few": (partial(GCP, function="log", eps=1e-3), FEW),
    "power": (partial(GCP, function="power", exponent=0.3), FEW),
    "exp": (partial(GCP, function="exp"), MANY),
    "tokens": (partial(TokenCovariancePool, 6), TOKENS),
    "skew": (partial(SkewOrthogonalConv2d, 6, 12, stride=2), MANY),
    "zca of the batch": (partial(DecorrelatedBatchNorm2d, 6, track_running_stats=False), MANY),
    "cholesky of the batch": (partial(DecorrelatedBatchNorm2d, 6, track_running_stats=False, method="cholesky"), MANY),
    "transfer": (partial(Stylised, 1e-2), MANY),
    "transfer pinv": (partial(Stylised, 0.0), FEW),
    "transfer cholesky": (partial(Stylised, 1e-2, method="cholesky"), MANY),
    "orthogonal weight": (partial(convolution, orthogonal_weight), MANY),
    "spectral norm": (partial(convolution, spectral_norm), MANY),
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    make, shape = LAYERS[name]
    return make().eval(), torch.randn(shape)


class Together(nn.Module):
    """All layers of one shape of input, since most of the time of an export does not depend on what is in it."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: make() for name, (make, wanted) in LAYERS.items() if wanted == shape})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {name: layer(x) for name, layer in self.layers.items()}


@pytest.mark.parametrize("shape", [MANY, FEW, TOKENS], ids=str)
def test_exported_layers_are_the_layers_for_any_batch_and_leave_their_input_alone(shape):
    layers, x = Together(shape).eval(), torch.randn(shape)
    kept = x.clone()
    program = torch.export.export(layers, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},)).module()
    for batch in (x, 3 * torch.randn(7, *shape[1:])):
        got, want = program(batch), layers(batch)
        # The same operations; but an exported "minimax_or_eigh" is eigh, and they agree to eps κ, below 1e3 here.
        for name in want:
            units = 1e3 if name == "sqrt minimax_or_eigh" else 50
            assert relative_error(got[name], want[name]) < units * eps_of(torch.float32), name
    torch.testing.assert_close(x, kept, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["log few"])
def test_the_compiler_exports_too(name):
    layer, x = made(name)
    program = torch.export.export(layer, (x,), strict=True).module()
    assert relative_error(program(x), layer(x)) < 50 * eps_of(torch.float32)


def test_an_exported_head_takes_maps_of_other_sizes():
    layer, x = made("sqrt auto")
    sizes = {2: torch.export.Dim("height", min=3, max=64), 3: torch.export.Dim("width", min=3, max=64)}
    program = torch.export.export(layer, (x,), dynamic_shapes=(sizes,)).module()
    larger = torch.randn(3, 6, 9, 5)
    assert relative_error(program(larger), layer(larger)) < 50 * eps_of(torch.float32)


def test_a_map_with_too_few_positions_is_refused_in_export_as_it_is_in_eager():
    layer = GlobalCovariancePool2d(6, function="log").eval()
    with pytest.raises(ValueError, match="singular up to rounding"):
        torch.export.export(layer, (torch.randn(FEW),))


def to_onnx(layer: nn.Module, x: Tensor, path, **options) -> None:
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        torch.onnx.export(layer, (x,), str(path), dynamo=True, optimize=False, verbose=False, **options)


def run_onnx(path, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path))
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def test_onnx_runtime_gives_what_the_layers_give_for_any_batch(tmp_path):
    layers = nn.Sequential(SkewOrthogonalConv2d(6, 8), nn.AvgPool2d(2), GlobalCovariancePool2d(8)).eval()
    x, path = torch.randn(MANY), tmp_path / "layers.onnx"
    to_onnx(layers, x, path, dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    assert all(node.domain in ("", "ai.onnx") for node in onnx.load(str(path)).graph.node)
    # Products in double precision: off by √(2 eps64) where an eigenvalue is null, then rounded to float32; the series
    # of the convolution is rounded at each of its 12 powers.
    for batch in (x, torch.randn(7, *MANY[1:])):
        assert relative_error(run_onnx(path, batch), layers(batch)) < 50 * eps_of(torch.float32)


def test_onnx_resolves_what_single_precision_does_not(tmp_path):
    """Dead and doubled channels after a ReLU, at a condition number of 1e10 along the rest."""
    x = (torch.randn(2, 16, 6, 6) * torch.logspace(0, -5, 16)[:, None, None]).relu()
    x[:, 3], x[:, 7] = 0.0, x[:, 1]
    layer = GlobalCovariancePool2d(16).eval()
    to_onnx(layer, x, tmp_path / "head.onnx")
    assert relative_error(run_onnx(tmp_path / "head.onnx", x), layer(x)) < 4 * eps_of(torch.float32)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("sqrt eigh", "ONNX has no eigendecomposition in layer SpectralLayer.*solver='auto'"),
        ("sqrt pade", "ONNX has no linear solve.*torch.export alone"),
        ("orthogonal weight", r"ONNX has no operator for the orthogonal weight.*to_plain\(model\)"),
    ],
)
def test_what_onnx_cannot_have_is_refused_with_the_way_out(name, says, tmp_path):
    layer, x = made(name)
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match=says):
        to_onnx(layer, x, tmp_path / "layer.onnx")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", ["sqrt auto", "skew", "zca of the batch"])
def test_the_older_exporter_is_refused_by_name(name, tmp_path):
    layer, x = made(name)
    with pytest.raises(NotImplementedError, match="dynamo=True"):
        torch.onnx.export(layer, (x,), str(tmp_path / "layer.onnx"), dynamo=False)


def test_an_export_leaves_no_trace_in_the_layer():
    layer, x = SpectralLayer("sqrt").eval(), torch.randn(2, 5, 9)
    before = layer(x)
    calls = layer.solver_events.calls
    torch.export.export(layer, (x,))
    assert layer.solver_events.calls == calls
    torch.testing.assert_close(layer(x), before, rtol=0, atol=0)
    with pytest.raises(ValueError, match="NaN or infinite"):  # values are read again
        layer(torch.full((2, 5, 9), torch.nan))


@pytest.mark.parametrize("running", ["covariance", "whitening"])
def test_a_norm_exported_in_training_writes_its_statistics_and_not_its_input(running):
    layer, x = DecorrelatedBatchNorm2d(3, running=running), torch.randn(4, 3, 5, 5)
    twin = DecorrelatedBatchNorm2d(3, running=running)
    kept, program = x.clone(), torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(program(x), twin(x))
    torch.testing.assert_close(x, kept, rtol=0, atol=0)
    for name, value in twin.state_dict().items():
        if name == "_extra_state":  # options, of which the program has none
            continue
        torch.testing.assert_close(program.state_dict()[name], value)
