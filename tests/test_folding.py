"""A folded model gives what the model gives in evaluation, and holds no decorrelated batch norm."""

import copy
import warnings
from dataclasses import dataclass
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers import NORMS
from wellcond.experiments.run.models import build_model
from wellcond.monitor import ConditionMonitor
from wellcond.nn import (
    DecorrelatedBatchNorm1d,
    DecorrelatedBatchNorm2d,
    fold,
    replace_batchnorm,
    to_plain,
)
from wellcond.orthogonality import orthogonal_weight, spectral_norm

DECORRELATED = tuple(NORMS.values())


@torch.no_grad()
def trained(model, shape, steps=3):
    """The model after a few passes in training mode: its running statistics are none of the initial ones."""
    for module in model.modules():
        if isinstance(module, DECORRELATED) and module.weight is not None:
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    for _ in range(steps):
        model.train()(torch.randn(shape, dtype=next(model.parameters()).dtype))
    return model


def norms(model):
    return [m for m in model.modules() if isinstance(m, DECORRELATED)]


def pointwise(model):
    """The 1 × 1 convolutions that stand for norms."""
    return [m for m in model.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and max(m.kernel_size) == 1]


def assert_folded(model, shape, unfolded=0, example=False):
    x = torch.randn(shape, dtype=next(model.parameters()).dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folded = fold(model, x[:4] if example else None)
    assert not norms(folded)
    assert not folded.training
    assert len(pointwise(folded)) - len(pointwise(model)) == unfolded
    expected = model.eval()(x)
    # float64: both ways round to eps64 times the condition number of the whitening, below 1e5 (its ε is 1e-5).
    torch.testing.assert_close(folded(x), expected, rtol=1e-9, atol=1e-9)
    return folded


LAYERS = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (8, 4, 11)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), dilation=2, bias=False), (8, 4, 9, 9)),
    "conv2d circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (8, 4, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2), (4, 4, 4, 4, 4)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (8, 4, 6, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), (8, 4, 4, 4)),
    "grouped transposed": (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), (8, 4, 9)),
    "linear": (lambda: nn.Linear(4, 6), (40, 4)),
}


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("groups", [2, 6])
@pytest.mark.parametrize("name", LAYERS)
def test_a_norm_folds_into_every_kind_of_layer(name, groups, affine):
    layer, shape = LAYERS[name]
    model = nn.Sequential(layer(), NORMS[len(shape)](6, groups=groups, affine=affine), nn.ReLU()).double()
    folded = assert_folded(trained(model, shape), shape)
    assert type(folded[0]) is type(model[0])
    assert type(folded[1]) is nn.Identity


@pytest.mark.parametrize("name", ["conv2d", "grouped", "grouped transposed"])
def test_a_norm_that_mixes_the_groups_of_a_convolution_becomes_pointwise(name):
    layer, shape = LAYERS[name]
    model = nn.Sequential(layer(), NORMS[len(shape)](6)).double()
    assert_folded(trained(model, shape), shape, unfolded=0 if name == "conv2d" else 1)


@pytest.mark.parametrize("running", ["covariance", "whitening"])
def test_both_kinds_of_running_statistics_fold(running):
    model = nn.Sequential(nn.Conv2d(3, 6, 3), DecorrelatedBatchNorm2d(6, groups=2, running=running)).double()
    assert_folded(trained(model, (8, 3, 6, 6)), (8, 3, 6, 6))


class Wired(nn.Module):
    """Parts, and how the input goes through them."""

    def __init__(self, wiring, **parts) -> None:
        super().__init__()
        self.wiring = wiring
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x):
        return self.wiring(self, x)


def convolution(size=3):
    return nn.Conv2d(6, 6, size, padding=size // 2)


def opaque(part, x):
    if x.shape[1] != 6:  # which tracing would not enter
        raise ValueError("wrong channels")
    return part.conv(x).relu()


NOT_TO_BE_FOLDED = {
    "the output of the convolution goes past the norm too": lambda m, x: (y := m.conv(x)) + m.norm(y),
    "one convolution, called twice": lambda m, x: m.norm(m.conv(F.relu(m.conv(x)))),
    "one norm after two convolutions": lambda m, x: m.norm(m.conv(x)) * m.norm(m.other(x)),
    "the weight is used in another place too": lambda m, x: m.norm(m.conv(x)) + F.conv2d(x, m.conv.weight, padding=1),
    "the convolution is used once more out of sight": lambda m, x: m.norm(m.part.conv(m.part(x))),
}


class Scaled(nn.Conv2d):
    """A convolution that does more than convolve."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("example", [False, True])
@pytest.mark.parametrize("name", NOT_TO_BE_FOLDED)
def test_where_folding_would_change_another_output_the_norm_becomes_pointwise(name, example):
    part = Wired(opaque, conv=convolution())
    parts = {"conv": convolution(), "other": convolution(), "part": part, "norm": DecorrelatedBatchNorm2d(6)}
    model = Wired(NOT_TO_BE_FOLDED[name], **parts).double()
    assert_folded(trained(model, (8, 6, 6, 6)), (8, 6, 6, 6), unfolded=1, example=example)


SEEN_IN_A_RUN = {
    "it is returned too": (lambda m, x: ((y := m.conv(x)), m.norm(y)), 1),
    "it is changed in place": (lambda m, x: m.norm(m.conv(x).mul_(2)), 1),
    "its values steer": (lambda m, x: m.norm(y) if (y := m.conv(x)).mean() < 1e6 else x, 1),
    "its shape alone is asked for": (lambda m, x: m.norm(y).view(len(x), -1) if (y := m.conv(x)).shape[1] else x, 0),
    "dropout lies between": (lambda m, x: m.norm(m.dropout(m.conv(x))) if x.mean() < 1e6 else x, 0),
}


class Box:
    def __init__(self, content) -> None:
        self.content = content


class Slotted:
    __slots__ = ("content",)

    def __init__(self, content) -> None:
        self.content = content


def in_a_cycle(content):
    box = Box([content])
    box.itself = box
    return box


@dataclass
class Features:
    content: object


def kept_in_a_list(model, content):
    model.seen = [content]
    model.seen.append(model.seen)


ON_TWO_WAYS = {
    "dataclass": lambda m, f: Features({"features": f}),
    "object": lambda m, f: Box(f),
    "object with slots": lambda m, f: [Slotted(Box(f))],
    "cycle": lambda m, f: in_a_cycle(f),
    "set": lambda m, f: {f},
    "attribute": lambda m, f: setattr(m, "last", f),
    "attribute of a part": lambda m, f: setattr(m.norm, "last", {"f": f}),
    "attribute that is a list": kept_in_a_list,
}


@pytest.mark.parametrize("name", ON_TWO_WAYS)
def test_an_output_that_leaves_the_model_in_any_object_is_what_it_was(name):
    out_by = ON_TWO_WAYS[name]
    model = Wired(
        lambda m, x: (m.norm(f := m.conv(x)), out_by(m, f)), conv=convolution(), norm=DecorrelatedBatchNorm2d(6)
    )
    model = model.double()
    x = torch.randn(8, 6, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        model(x)
        model.eval()(x)
        folded = fold(model, x)
        assert len(pointwise(folded)) == 1
        torch.testing.assert_close(folded.conv(x), model.conv(x), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(folded(x)[0], model(x)[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SEEN_IN_A_RUN)
def test_an_example_shows_what_becomes_of_the_output_of_a_convolution(name):
    wiring, unfolded = SEEN_IN_A_RUN[name]
    parts = {"conv": convolution(), "dropout": nn.Dropout(), "norm": DecorrelatedBatchNorm2d(6)}
    model = trained(Wired(wiring, **parts).double(), (8, 6, 6, 6))
    assert_folded(model, (8, 6, 6, 6), unfolded=unfolded, example=True)


@pytest.mark.parametrize(
    "layers",
    [
        lambda norm: (nn.Conv2d(6, 6, 3), nn.ReLU(), norm),
        lambda norm: (Scaled(6, 6, 3), norm),
        lambda norm: (nn.utils.spectral_norm(nn.Conv2d(6, 6, 3)), norm),
        lambda norm: (norm, nn.Conv2d(6, 6, 3)),
    ],
)
def test_after_what_is_no_plain_layer_the_norm_becomes_pointwise(layers):
    model = nn.Sequential(*layers(DecorrelatedBatchNorm2d(6))).double()
    assert_folded(trained(model, (8, 6, 6, 6)), (8, 6, 6, 6), unfolded=1)


class PaddedAsTensorFlow(nn.Conv2d):
    """A convolution that pads by itself, unevenly."""

    def forward(self, x):
        return self._conv_forward(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias)


class Standardised(nn.Conv2d):
    """A convolution by the standardised weight: the rows of the one that it holds may have any length."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias)


class Clipped(nn.Conv2d):
    """A convolution whose output is cut where it is large."""

    def forward(self, x):
        return super().forward(x).clamp(-50, 50)


class InFloat32(nn.Linear):
    """A layer that takes one dtype only."""

    def forward(self, x):
        if x.dtype != torch.float32:
            raise TypeError("float32 only")
        return super().forward(x)


class Tied(nn.Conv2d):
    """A convolution that looks at the weight of another layer."""

    other = None

    def forward(self, x):
        return super().forward(x) + self.other[0].weight.mean()


@pytest.mark.parametrize("example", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_subclass_that_only_convolves_takes_the_norm_and_stays_what_it_is(bias, example):
    model = nn.Sequential(PaddedAsTensorFlow(4, 6, 2, stride=2, bias=bias), DecorrelatedBatchNorm2d(6)).double()
    folded = assert_folded(trained(model, (8, 4, 8, 8)), (8, 4, 8, 8), example=example)
    assert type(folded[0]) is PaddedAsTensorFlow
    x = torch.randn(8, 4, 8, 8, dtype=torch.float64)
    plain = to_plain(model, x if example else None)
    assert [type(layer) for layer in plain] == [PaddedAsTensorFlow, nn.BatchNorm2d]
    torch.testing.assert_close(plain(x), model.eval()(x), rtol=1e-9, atol=1e-9)


class Gated(nn.Conv2d):
    """A convolution that may take a second input."""

    def forward(self, x, gate=None):
        y = super().forward(x)
        return y if gate is None else y * gate


class HalfRectified(nn.Linear):
    """A layer that is linear in its first channel only."""

    def forward(self, x):
        y = super().forward(x)
        return torch.cat([y[:, :1], y[:, 1:].relu()], 1)


class LowRank(nn.Linear):
    """A layer with a small term beside the weight."""

    def forward(self, x):
        return super().forward(x) + 1e-4 * x.flip(1).repeat(1, 2)[:, : self.out_features]


class OfItsOwn(nn.Linear):
    """A layer that computes its weight."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.v = self.weight
        del self.weight

    weight = property(lambda self: 2 * self.v, None, lambda self: None)

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Drawing(nn.Linear):
    """A layer that draws random numbers and does not use them."""

    def forward(self, x):
        return super().forward(x) + 0 * torch.rand(1, dtype=x.dtype)


@pytest.mark.parametrize("example", [False, True])
def test_a_subclass_that_is_called_with_more_than_its_input_is_followed_by_a_pointwise_layer(example):
    parts = {"conv": Gated(6, 6, 3, padding=1), "norm": DecorrelatedBatchNorm2d(6)}
    model = Wired(lambda m, x: m.norm(m.conv(x, x.sigmoid())), **parts).double()
    assert_folded(trained(model, (8, 6, 6, 6)), (8, 6, 6, 6), unfolded=1, example=example)


@pytest.mark.parametrize("example", [False, True])
@pytest.mark.parametrize("kind", [HalfRectified, LowRank, OfItsOwn])
def test_a_linear_subclass_that_does_more_is_followed_by_a_pointwise_layer(kind, example):
    norm = DecorrelatedBatchNorm1d(6, groups=6)
    model = trained(nn.Sequential(kind(4, 6), norm).double(), (40, 4))
    norm.weight.data[0] = 1e4  # one large channel hides nothing of the others
    assert_folded(model, (40, 4), unfolded=1, example=example)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_rounding_hides_a_small_term(dtype):
    model = trained(nn.Sequential(LowRank(4, 6), DecorrelatedBatchNorm1d(6)), (40, 4)).to(dtype)
    assert len(pointwise(fold(model))) == 1


def test_a_forward_function_of_the_instance_is_tried_too():
    layer = nn.Linear(4, 6).double()
    layer.forward = MethodType(lambda self, x: nn.Linear.forward(self, x).relu(), layer)
    model = trained(nn.Sequential(layer, DecorrelatedBatchNorm1d(6)).double(), (40, 4))
    assert_folded(model, (40, 4), unfolded=1)


def test_the_trial_draws_no_random_numbers_and_parameters_keep_what_they_have():
    layer = Drawing(4, 6)
    layer.bias.requires_grad_(False)
    model = trained(nn.Sequential(layer, DecorrelatedBatchNorm1d(6)), (40, 4))
    before = torch.get_rng_state()
    folded = fold(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert type(folded[0]) is Drawing
    assert folded[0].weight.requires_grad
    assert not folded[0].bias.requires_grad


@pytest.mark.parametrize("example", [False, True])
@pytest.mark.parametrize("kind", [Standardised, Clipped])
def test_a_subclass_that_does_more_is_followed_by_a_pointwise_layer(kind, example):
    model = nn.Sequential(kind(4, 6, 3, padding=1), DecorrelatedBatchNorm2d(6)).double()
    assert_folded(trained(model, (8, 4, 8, 8)), (8, 4, 8, 8), unfolded=1, example=example)


def test_a_subclass_that_cannot_be_tried_is_followed_by_a_pointwise_layer():
    model = trained(nn.Sequential(InFloat32(4, 6), DecorrelatedBatchNorm1d(6)), (40, 4))
    x = torch.randn(40, 4)
    folded = fold(model, x)
    assert len(pointwise(folded)) == 1
    torch.testing.assert_close(folded(x), model.eval()(x), rtol=1e-4, atol=1e-4)


def test_a_layer_at_whose_weight_a_subclass_looks_keeps_it():
    tied = Tied(6, 6, 3)
    model = nn.Sequential(nn.Conv2d(4, 6, 3), DecorrelatedBatchNorm2d(6), tied).double()
    tied.other = (model[0],)  # no module of it
    assert_folded(trained(model, (8, 4, 8, 8)), (8, 4, 8, 8), unfolded=1, example=True)


@pytest.mark.parametrize("shape", [(40, 6), (8, 6, 5)])
def test_a_pointwise_layer_takes_both_inputs_of_a_one_dimensional_norm(shape):
    model = nn.Sequential(nn.Tanh(), DecorrelatedBatchNorm1d(6, groups=3, dtype=torch.float64))
    assert_folded(trained(model, shape), shape, unfolded=1)


def test_a_pointwise_layer_has_the_dtype_of_the_norm():
    assert fold(DecorrelatedBatchNorm2d(6, affine=False))(torch.randn(2, 6, 3, 3)).dtype == torch.float32


def test_a_norm_alone_becomes_a_convolution():
    norm = trained(DecorrelatedBatchNorm2d(6, dtype=torch.float64), (8, 6, 4, 4))
    assert isinstance(assert_folded(norm, (8, 6, 4, 4), unfolded=1), nn.Conv2d)


def test_what_does_nothing_in_evaluation_does_not_stand_in_the_way():
    parts = [nn.Conv2d(3, 6, 3), nn.Dropout2d(0.5), nn.Identity(), DecorrelatedBatchNorm2d(6)]
    assert_folded(trained(nn.Sequential(*parts).double(), (8, 3, 6, 6)), (8, 3, 6, 6))


@pytest.mark.parametrize("parametrise", [orthogonal_weight, spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_parametrised_weights_become_plain_in_the_copy_and_stay_in_the_model(parametrise):
    model = nn.Sequential(nn.Conv2d(3, 6, 3), DecorrelatedBatchNorm2d(6)).double()
    parametrise(model[0])
    trained(model, (8, 3, 6, 6))
    before = copy.deepcopy(model.state_dict())
    folded = assert_folded(model, (8, 3, 6, 6))
    assert type(folded[0]) is nn.Conv2d
    assert nn.utils.parametrize.is_parametrized(model[0], "weight")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_the_model_is_left_as_it_was_also_in_training_mode():
    model = trained(nn.Sequential(nn.Conv2d(3, 6, 3), DecorrelatedBatchNorm2d(6), nn.BatchNorm2d(6)), (8, 3, 6, 6))
    before = copy.deepcopy(model.state_dict())
    folded = fold(model.train())
    assert model.training and norms(model)
    assert type(folded[2]) is nn.BatchNorm2d
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_a_norm_without_running_statistics_has_no_fixed_map_and_stays():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), DecorrelatedBatchNorm2d(6, track_running_stats=False))
    folded = fold(model)
    x = torch.randn(8, 3, 6, 6)
    assert len(norms(folded)) == 1
    torch.testing.assert_close(folded(x), model.eval()(x))


def test_a_model_that_cannot_be_traced_gets_pointwise_layers_and_says_so():
    wiring = lambda m, x: m.norm(m.conv(x)) if x.mean() < 1e6 else x  # noqa: E731
    model = Wired(wiring, conv=nn.Conv2d(3, 6, 3), norm=DecorrelatedBatchNorm2d(6)).double()
    trained(model, (8, 3, 6, 6))
    with pytest.warns(UserWarning, match="Wired cannot be traced"):
        folded = fold(model)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    assert not norms(folded)
    torch.testing.assert_close(folded(x), model.eval()(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("head", ["avg", "gcp"])
def test_a_residual_network_of_the_command_line_folds_whole(head):
    model = build_model("resnet8", num_classes=4, norm="zca", head=head, groups=4)
    replace_batchnorm(model.stage2, "all")
    trained(model, (16, 3, 16, 16))
    x = torch.randn(4, 3, 16, 16)
    folded = fold(model)
    assert not norms(folded)
    assert len(pointwise(folded)) == len(pointwise(model))
    torch.testing.assert_close(folded(x), model.eval()(x), rtol=1e-4, atol=1e-4)


def test_in_float32_the_outputs_agree_to_1e_5():
    model = trained(nn.Sequential(nn.Conv2d(3, 16, 5), DecorrelatedBatchNorm2d(16), nn.ReLU()), (32, 3, 12, 12))
    x = torch.randn(8, 3, 12, 12)
    expected = model.eval()(x)
    assert (fold(model)(x) - expected).abs().max() <= 1e-5 * expected.abs().max()


class Rectified(DecorrelatedBatchNorm2d):
    """A norm with the activation inside."""

    def forward(self, x):
        return super().forward(x).relu()


def of_the_instance(norm):
    norm.forward = lambda x: DecorrelatedBatchNorm2d.forward(norm, x).relu()


MORE_THAN_A_NORM = {
    "forward function of its own: a subclass": (Rectified, lambda norm: None),
    "forward function of its own: the instance": (DecorrelatedBatchNorm2d, of_the_instance),
    "hooks: after": (
        DecorrelatedBatchNorm2d,
        lambda norm: norm.register_forward_hook(lambda module, args, y: y.relu()),
    ),
    "hooks: before": (
        DecorrelatedBatchNorm2d,
        lambda norm: norm.register_forward_pre_hook(lambda module, args: args[0].relu()),
    ),
}


@pytest.mark.parametrize("example", [False, True])
@pytest.mark.parametrize("name", MORE_THAN_A_NORM)
def test_a_norm_that_may_do_more_is_kept_by_fold_and_refused_by_to_plain(name, example):
    kind, change = MORE_THAN_A_NORM[name]
    norms = (kind(6), DecorrelatedBatchNorm2d(6))
    model = nn.Sequential(nn.Conv2d(4, 6, 3), norms[0], nn.Conv2d(6, 6, 3), norms[1]).double()
    change(norms[0])
    trained(model, (8, 4, 8, 8)).eval()
    x = torch.randn(8, 4, 8, 8, dtype=torch.float64)
    why = name.partition(":")[0]
    with pytest.warns(UserWarning, match=f"layer '1' has .*{why}, which may do anything, so it is kept"):
        folded = fold(model, x if example else None)
    assert type(folded[1]) is kind and type(folded[3]) is nn.Identity
    torch.testing.assert_close(folded(x), model(x), rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match=rf"layer '1' \({kind.__name__}\) has .*{why}, which no plain layer has"):
        to_plain(model)


@pytest.mark.parametrize("example", [False, True])
@pytest.mark.parametrize("between", [nn.Identity, nn.Dropout, nn.Sequential])
def test_a_hook_between_the_layer_and_the_norm_stands_in_the_way(between, example):
    model = nn.Sequential(nn.Conv2d(4, 6, 3), between(), DecorrelatedBatchNorm2d(6)).double()
    model[1].register_forward_hook(lambda module, args, y: y.relu())
    assert_folded(trained(model, (8, 4, 8, 8)), (8, 4, 8, 8), unfolded=1, example=example)


def test_the_monitor_does_not_stand_in_the_way():
    model = trained(nn.Sequential(nn.Conv2d(4, 6, 3), DecorrelatedBatchNorm2d(6)).double(), (8, 4, 8, 8))
    with ConditionMonitor(model, layers=["0", "1"]):
        assert_folded(model, (8, 4, 8, 8))
        assert type(to_plain(model)[1]) is nn.BatchNorm2d


@pytest.mark.parametrize("plain_copy", [fold, to_plain])
def test_a_convolution_that_becomes_skew_orthogonal_keeps_its_hooks(plain_copy):
    model = nn.Sequential(orthogonal_weight(nn.Conv2d(4, 4, 3, padding=1), map="soc")).eval()
    model[0].register_forward_hook(lambda module, args, y: y.relu())
    x = torch.randn(2, 4, 6, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(plain_copy(model)(x), model(x))
