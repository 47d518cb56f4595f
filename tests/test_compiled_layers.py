"""A compiled model breaks its graph once in a layer that calls LAPACK and nowhere else, is compiled once more for other
batch sizes, and gives what it gives without the compiler. ``benchmarks/how_does_it_compile.py`` counts all layers."""

from __future__ import annotations

import copy
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import wellcond.linalg as wl
from wellcond.nn import DecorrelatedBatchNorm2d, GlobalCovariancePool2d, SpectralLayer

pytestmark = pytest.mark.usefixtures("fresh_compiler")
SCRIPT = Path(__file__).parent.parent / "benchmarks" / "how_does_it_compile.py"
# One of each kind: compiling takes seconds.
HELD = (
    "DecorrelatedBatchNorm2d",
    "DecorrelatedBatchNorm2d, cholesky",
    "DecorrelatedBatchNorm2d, eval",
    "IterNorm2d",
    "GlobalCovariancePool2d, reduction",
    "GlobalCovariancePool2d, newton_schulz",
    "GlobalCovariancePool3d",
    "TokenCovariancePool",
    "SpectralLayer, invsqrt",
    "WhiteningColoring",
    "DecorrelatedBatchNorm2d, treated nog+ow+olr",
)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("how_does_it_compile", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", HELD)
def test_breaks_recompilations_and_values(script, name):
    case = script.CASES[name]
    found = script.count(case, channels=4, size=4)
    assert found.graphs >= 1
    assert found.breaks <= case.lapack
    assert found.recompiled <= 1
    # The same operations in another order: eps64 times the condition number of a covariance of 4 channels.
    assert found.output_off < 1e-12
    assert found.gradient_off < 1e-11


class BreaksTwice(nn.Module):
    def forward(self, x):
        x = x + 1
        torch._dynamo.graph_break()
        x = x * 2
        torch._dynamo.graph_break()
        return x.exp()


class KnowsItsBatch(nn.Module):
    def forward(self, x):
        return x * [*range(2, 30)][x.shape[0]]  # an index is a constant of the graph


def test_the_count_itself(script):
    inside = script.Case(lambda _: BreaksTwice())
    # The convolution and x + 1 are in frames of their own; so are exp and what follows it.
    found = script.count(inside, channels=2, size=2)
    assert found.breaks >= 2 and found.recompiled <= 1
    assert script.count(script.Case(lambda _: nn.Tanh()), channels=2, size=2)[:2] == (1, 1)
    assert script.count(script.Case(lambda _: KnowsItsBatch()), channels=2, size=2)[:2] == (1, 3)


class Doubling(DecorrelatedBatchNorm2d):
    """A layer of somebody else, which calls ours."""

    def forward(self, x):
        return super().forward(2 * x) + 1


class DoublingPool(GlobalCovariancePool2d):
    def forward(self, x):
        return super().forward(2 * x) + 1


@pytest.mark.parametrize("layer", [Doubling, DoublingPool])
def test_what_a_subclass_does_around_it_is_done_once(layer):
    layer = layer(3, eps=0.5).double()
    plain = copy.deepcopy(layer)
    x = torch.randn(4, 3, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(torch.compile(layer, backend="eager")(x), plain(x))


def test_a_compiled_layer_counts_its_decompositions_and_names_itself_in_errors():
    layer = DecorrelatedBatchNorm2d(3)
    layer.layer_name = "stem.norm"
    plain = copy.deepcopy(layer)
    compiled = torch.compile(nn.Sequential(nn.ReLU(), layer), backend="eager")
    for _ in range(2):
        x = torch.randn(4, 3, 4, 4).relu()
        assert torch.equal(compiled(x), plain(x))
        assert layer.solver_events.calls == plain.solver_events.calls
        assert layer.num_batches_tracked == plain.num_batches_tracked
        assert torch.equal(layer.running_cov, plain.running_cov)
    with pytest.raises(wl.NonFiniteMatrixError, match=r"stem\.norm"):
        compiled(torch.full((4, 3, 4, 4), torch.inf))


def test_an_exported_layer_is_not_left_to_python():
    """What breaks a compiled graph is an operation of an exported one."""
    layer = SpectralLayer("sqrt", "covariance").double()
    P = torch.eye(3, dtype=torch.float64).expand(2, 3, 3).contiguous()
    program = torch.export.export(layer, (P,))
    assert any("eigh" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(4 * P), 2 * P)
