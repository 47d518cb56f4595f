"""Does a model with these layers compile whole, stay compiled when the batch changes, and run faster?

Each layer stands between a convolution and an activation; two whole networks have one of them. Counted are the graphs
that ``torch.compile`` makes of it (breaks are one fewer, as ``torch._dynamo.explain`` counts them), and how many of the
further batch sizes it compiles again for. Wanted are at most one break where LAPACK is called, none with the solvers of
products, and one recompilation, the one that makes the batch a variable. The largest differences to the model that is
not compiled are those of output and gradients, relative, in float64.

With ``--time`` the default backend compiles the same in float32, at the shape that is given, and whole steps of both
take turns; the ratio is compiled over plain. The first two rows have hardly any work in the place of the layer: what
compiling costs or saves there, with and without a break, is due to the compiler and to all that stands around a layer.

    python benchmarks/how_does_it_compile.py
    python benchmarks/how_does_it_compile.py --time --batch 64 --size 32 --channels 64
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from wellcond.bench.gauges import take_turns
from wellcond.bench.ratios import add_ratios_option, write_ratios
from wellcond.experiments.run.models import build_model
from wellcond.linalg import Minimax, NewtonSchulz, Pade, Taylor, covariance_sqrtm, whiten
from wellcond.nn import (
    DecorrelatedBatchNorm1d,
    DecorrelatedBatchNorm2d,
    GlobalCovariancePool1d,
    GlobalCovariancePool2d,
    GlobalCovariancePool3d,
    IterNorm2d,
    SkewOrthogonalConv2d,
    SpectralLayer,
    TokenCovariancePool,
    WhiteningColoring,
)
from wellcond.orthogonality import treat

BATCHES = (8, 6, 5, 9)


class Sandwich(nn.Module):
    """A convolution, the layer on what ``view`` makes of its output, and an activation, in one forward function."""

    def __init__(self, channels: int, layer: nn.Module, view: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.convolution, self.layer, self.view = nn.Conv2d(3, channels, 3, padding=1), layer, view

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(*self.view(self.convolution(x))).sin()


class Network(nn.Module):
    """A residual network whose forward function calls one layer after another, as those that people have do."""

    def __init__(self, width: int, **options: str) -> None:
        super().__init__()
        self.parts = build_model("resnet18", num_classes=10, width=width, **options)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.parts
        x = parts.relu(parts.norm1(parts.conv1(x)))
        x = parts.stage4(parts.stage3(parts.stage2(parts.stage1(x))))
        return parts.classifier(parts.flatten(parts.pool(x)))


class Function(nn.Module):
    """A function in the place of a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@dataclass(frozen=True)
class Case:
    """What is compiled.

    Attributes:
        make: the layer, for so many channels.
        lapack: whether it calls LAPACK, which is worth one break.
        view: what the layer takes of feature maps (N, C, H, W).
        train: in training, or in evaluation.
        treatments: of the convolution before it.
        network: whether what is made is a whole network.
    """

    make: Callable[[int], nn.Module]
    lapack: bool = False
    view: Callable[[Tensor], tuple[Tensor, ...]] = lambda x: (x,)
    train: bool = True
    treatments: str = ""
    network: bool = False

    def model(self, channels: int) -> nn.Module:
        torch.manual_seed(0)
        if self.network:
            return self.make(channels)
        model = Sandwich(channels, self.make(channels), self.view).train(self.train)
        if self.treatments:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            treat(model, optimizer, self.treatments, layers=[model.convolution])
        return model


class Counted(NamedTuple):
    """What was found.

    Attributes:
        graphs: of the first batch.
        recompiled: for how many of the other batch sizes anything was compiled again.
        output_off, gradient_off: the largest relative differences to what is not compiled.
    """

    graphs: int
    recompiled: int
    output_off: float
    gradient_off: float

    @property
    def breaks(self) -> int:
        return max(self.graphs - 1, 0)


STEPS = NewtonSchulz(5, tolerance=None)


def flat(x: Tensor) -> tuple[Tensor, ...]:
    return (x.flatten(2),)


def tokens(x: Tensor) -> tuple[Tensor, ...]:
    return (x.flatten(2).transpose(1, 2),)


def volume(x: Tensor) -> tuple[Tensor, ...]:
    return (x.unsqueeze(2),)


def of_positive_matrices(x: Tensor) -> tuple[Tensor, ...]:
    X = x.flatten(2)
    return (X @ X.mT + torch.eye(X.shape[1], dtype=X.dtype, device=X.device),)


def with_style(x: Tensor) -> tuple[Tensor, ...]:
    return x, 2 * x.detach().flip(0)


def beyond_its_bound(channels: int) -> nn.Module:
    """With a weight that is scaled down. At the bound, where it starts, rounding picks one of two gradients."""
    layer = SkewOrthogonalConv2d(channels, channels)
    with torch.no_grad():
        layer.weight.mul_(1.2)
    return layer


def few(x: Tensor) -> Tensor:
    """A small part of the input: hardly any work, so that what compiling costs and saves is all around it."""
    return x[:, :, :32].clone()


CASES: dict[str, Case] = {
    "no layer": Case(lambda _: Function(few), view=flat),
    "no layer, outside the graph": Case(lambda _: Function(torch.compiler.disable(few)), lapack=True, view=flat),
    "BatchNorm2d": Case(nn.BatchNorm2d),
    "DecorrelatedBatchNorm2d": Case(DecorrelatedBatchNorm2d, lapack=True),
    "DecorrelatedBatchNorm2d, 2 groups": Case(lambda C: DecorrelatedBatchNorm2d(C, groups=2), lapack=True),
    "DecorrelatedBatchNorm2d, cholesky": Case(lambda C: DecorrelatedBatchNorm2d(C, method="cholesky"), lapack=True),
    "DecorrelatedBatchNorm2d, pca": Case(lambda C: DecorrelatedBatchNorm2d(C, method="pca"), lapack=True),
    "DecorrelatedBatchNorm2d, eval": Case(DecorrelatedBatchNorm2d, train=False),
    "DecorrelatedBatchNorm1d": Case(DecorrelatedBatchNorm1d, lapack=True, view=flat),
    "IterNorm2d": Case(IterNorm2d),
    "DecorrelatedBatchNorm2d, minimax": Case(lambda C: DecorrelatedBatchNorm2d(C, solver=Minimax(tolerance=None))),
    "GlobalCovariancePool1d": Case(GlobalCovariancePool1d, lapack=True, view=flat),
    "GlobalCovariancePool2d": Case(GlobalCovariancePool2d, lapack=True),
    "GlobalCovariancePool2d, reduction": Case(lambda C: GlobalCovariancePool2d(C, reduction=C // 2), lapack=True),
    "GlobalCovariancePool2d, log": Case(lambda C: GlobalCovariancePool2d(C, function="log", eps=0.1), lapack=True),
    "GlobalCovariancePool2d, newton_schulz": Case(lambda C: GlobalCovariancePool2d(C, solver=STEPS)),
    "GlobalCovariancePool2d, pade": Case(lambda C: GlobalCovariancePool2d(C, solver=Pade(tolerance=None))),
    "GlobalCovariancePool2d, taylor": Case(lambda C: GlobalCovariancePool2d(C, solver=Taylor(tolerance=None))),
    "GlobalCovariancePool3d": Case(GlobalCovariancePool3d, lapack=True, view=volume),
    "GlobalCovariancePool3d, newton_schulz": Case(lambda C: GlobalCovariancePool3d(C, solver=STEPS), view=volume),
    "TokenCovariancePool": Case(TokenCovariancePool, lapack=True, view=tokens),
    "SpectralLayer, invsqrt": Case(
        lambda _: SpectralLayer("invsqrt", "covariance"), lapack=True, view=of_positive_matrices
    ),
    "SpectralLayer, invsqrt, newton_schulz": Case(
        lambda _: SpectralLayer("invsqrt", "covariance", solver=STEPS), view=of_positive_matrices
    ),
    "WhiteningColoring": Case(lambda _: WhiteningColoring(1e-3), lapack=True, view=with_style),
    "whiten": Case(lambda _: Function(partial(whiten, eps=0.1)), lapack=True, view=flat),
    "whiten, newton_schulz": Case(lambda _: Function(partial(whiten, eps=0.1, solver=STEPS)), view=flat),
    "covariance_sqrtm": Case(lambda _: Function(covariance_sqrtm), lapack=True, view=flat),
    "SkewOrthogonalConv2d": Case(beyond_its_bound),
    "BatchNorm2d, treated sn": Case(nn.BatchNorm2d, treatments="sn"),
    "BatchNorm2d, treated ow": Case(nn.BatchNorm2d, treatments="ow"),
    "DecorrelatedBatchNorm2d, treated nog+ow+olr": Case(DecorrelatedBatchNorm2d, lapack=True, treatments="nog+ow+olr"),
    "ResNet-18": Case(Network, network=True),
    "ResNet-18, whitening first norm": Case(lambda width: Network(width, norm="zca"), lapack=True, network=True),
    "ResNet-18, covariance head": Case(lambda width: Network(width, head="gcp"), lapack=True, network=True),
}


@contextmanager
def double_precision() -> Iterator[None]:
    """New tensors are of float64; what is converted later keeps the rounding of float32 in all that derives from it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output, and the gradients of input and parameters of a sum of it with unequal weights."""
    x = x.clone().requires_grad_()
    y = model(x)
    weights = torch.linspace(-1.0, 2.0, y.numel(), dtype=y.dtype, device=y.device).cos().view(y.shape)
    grads = torch.autograd.grad((weights * y).sum(), (x, *model.parameters()), allow_unused=True)
    return y.detach(), [grad for grad in grads if grad is not None]


def off(got: Tensor, truth: Tensor) -> float:
    return (torch.linalg.vector_norm(got - truth) / torch.linalg.vector_norm(truth).clamp_min(1e-30)).item()


def count(case: Case, channels: int = 8, size: int = 6) -> Counted:
    """Compile forward and backward for one batch size after another, without generating code."""
    graphs: list[int] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        if any(node.op.startswith("call") for node in graph.graph.nodes):
            graphs.append(len(graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    with double_precision():
        plain = case.model(channels)
    model = copy.deepcopy(plain)
    compiled = torch.compile(model, backend=keep)
    made, output_off, gradient_off = [], 0.0, 0.0
    for batch in BATCHES:
        graphs.clear()
        x = torch.randn(batch, 3, size, size, dtype=torch.float64)
        (got, got_grads), (truth, true_grads) = gradients(compiled, x), gradients(plain, x)
        made.append(len(graphs))
        output_off = max(output_off, off(got, truth))
        # Of a bias before a norm the gradient is 0 and its rounding: differences count beside the largest gradient.
        largest = max(torch.linalg.vector_norm(grad).item() for grad in true_grads)
        pairs = zip(got_grads, true_grads, strict=True)
        gradient_off = max(gradient_off, *((torch.linalg.vector_norm(g - t) / largest).item() for g, t in pairs))
    torch._dynamo.reset()
    return Counted(made[0], sum(number > 0 for number in made[1:]), output_off, gradient_off)


def times_of(case: Case, options: argparse.Namespace) -> tuple[float, float]:
    """Seconds that a step (forward and backward) of the plain and of the compiled model takes."""
    device = torch.device(options.device)
    torch._dynamo.reset()
    plain = case.model(options.channels).to(device)
    compiled = torch.compile(copy.deepcopy(plain))
    x = torch.randn(options.batch, 3, options.size, options.size, device=device)
    calls = {"plain": lambda: gradients(plain, x), "compiled": lambda: gradients(compiled, x)}
    for call in 3 * [*calls.values()]:
        call()
    times = take_turns(calls, device, seconds=options.seconds, rounds=(3, 100))
    return times["plain"].minimum, times["compiled"].minimum


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="cases whose name contains one of these (default: all)")
    parser.add_argument("--time", action="store_true", help="time compiled and plain steps, too")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=16, help="of the images that are timed")
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=3.0, help="of timing, for each layer")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="three layers")
    add_ratios_option(parser)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.quick:
        options.names = options.names or ["BatchNorm2d, 2 groups", "IterNorm2d", "GlobalCovariancePool2d, newton"]
        options.seconds = min(options.seconds, 0.5)
    found = {name: case for name, case in CASES.items() if not options.names or any(n in name for n in options.names)}
    heads = ["layer", "breaks", "wanted", "recompiled", "output off", "gradient off"]
    heads += ["plain, ms", "compiled, ms more", "compiled / plain"] * options.time
    print(f"| {' | '.join(heads)} |\n|---|{'---:|' * (len(heads) - 1)}", flush=True)
    ratios: dict[str, float] = {}
    for name, case in found.items():
        counted = count(case)
        cells = [name, str(counted.breaks), f"≤ {int(case.lapack)}", f"{counted.recompiled} of {len(BATCHES) - 1}"]
        cells += [f"{counted.output_off:.0e}", f"{counted.gradient_off:.0e}"]
        ratios[f"{name}, graphs"] = max(counted.graphs, 1)
        if options.time:
            plain, compiled = times_of(case, options)
            ratios[f"{name}, compiled of plain"] = ratio = compiled / plain
            cells += [f"{1e3 * plain:.2f}", f"{1e3 * (compiled - plain):+.2f}", f"{ratio:.2f}"]
        print(f"| {' | '.join(cells)} |", flush=True)
    write_ratios(options.ratios, ratios)


if __name__ == "__main__":
    main()
