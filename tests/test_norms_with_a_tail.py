"""Batch norms that go on after they have normalised are replaced with their tail, and none is skipped in silence."""

from __future__ import annotations

import copy
import sys
import types

import pytest
import torch
from torch import nn

from wellcond.nn import DecorrelatedBatchNorm2d, convert_sync, fold, register_batchnorm, replace_batchnorm, to_plain
from wellcond.nn import _batchnorm_classes as classes
from wellcond.orthogonality import treat


class NormAct(nn.BatchNorm2d):
    """As timm's: the norm, then dropout, then an activation, which may have weights."""

    def __init__(self, channels, act=None, drop=None):
        super().__init__(channels)
        self.drop = nn.Identity() if drop is None else drop
        self.act = nn.PReLU(channels) if act is None else act

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class Untold(NormAct):
    """A subclass that nobody registered."""


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(classes, "DECORRELATED", {**classes.DECORRELATED})
    monkeypatch.setattr(classes, "_THEN", {})
    monkeypatch.setattr("wellcond.nn._replace_batchnorm.DECORRELATED", classes.DECORRELATED)
    register_batchnorm(NormAct, then=["drop", "act"])


def network(kind=NormAct):
    """Trained for two steps, so that its statistics are no longer those of the start."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), kind(8), nn.Conv2d(8, 12, 3), kind(12), nn.Flatten(), nn.Linear(192, 3)
    )
    for _ in range(2):
        model(torch.randn(16, 3, 8, 8))
    return model


def test_the_tail_stays_and_evaluation_is_unchanged_until_training():
    model, x = network(), torch.randn(4, 3, 8, 8)
    expected = model.eval()(x)
    weight, act = model[1].weight, model[1].act
    assert replace_batchnorm(model, "all", group_size=4) == ["1.norm", "3.norm"]
    norm = model[1].norm
    assert isinstance(norm, DecorrelatedBatchNorm2d) and (norm.groups, model[3].norm.groups) == (2, 3)
    assert norm.weight is weight and model[1].act is act and not norm.training
    torch.testing.assert_close(model(x), expected)
    model.train()
    y = model[1].norm(model[0](torch.randn(16, 3, 8, 8)))
    torch.testing.assert_close(y.mean((0, 2, 3)), norm.bias.detach(), atol=1e-5, rtol=0)


def test_the_whole_chain_holds(tmp_path):
    """Find, treat, train, copy, save, fold, and back to the classes that were there."""
    model, before, x = network(), network(), torch.randn(16, 3, 8, 8)
    replace_batchnorm(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    treatment = treat(model, optimizer, "nog+olr")
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert list(treatment.layers) == ["0"]
    treatment.remove()
    model.eval()
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(x), model(x), rtol=0, atol=0)
    other = network()
    replace_batchnorm(other)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other.eval()(x), model(x), rtol=0, atol=0)
    folded = fold(model)
    assert not [m for m in folded.modules() if isinstance(m, DecorrelatedBatchNorm2d)]
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)
    plain = to_plain(model)
    assert type(plain[1]) is NormAct and list(plain.state_dict()) == list(before.state_dict())
    torch.testing.assert_close(plain(x), model(x), rtol=1e-4, atol=1e-5)
    before.load_state_dict(plain.state_dict())
    torch.testing.assert_close(before.eval()(x), model(x), rtol=1e-4, atol=1e-5)
    torch.save(plain, tmp_path / "plain.pt")
    torch.testing.assert_close(torch.load(tmp_path / "plain.pt", weights_only=False)(x), plain(x))


def test_the_tail_stays_where_a_norm_is_synchronised():
    model, before, x = network(), network(), torch.randn(4, 3, 8, 8)
    expected = model.eval()(x)
    weight, act = model[1].weight, model[1].act
    assert convert_sync(model, batchnorm=True) is model
    assert type(model[1].norm) is nn.SyncBatchNorm and model[1].norm.weight is weight and model[1].act is act
    assert len(list(model.state_dict())) == len(list(before.state_dict()))
    torch.testing.assert_close(model(x), expected)
    model.load_state_dict(before.state_dict())
    assert type(to_plain(model)[1]) is NormAct
    assert type(convert_sync(NormAct(4), batchnorm=True).norm) is nn.SyncBatchNorm
    assert replace_batchnorm(model) == ["1.norm"] and model[1].norm.sync
    torch.testing.assert_close(model(x), expected)


def test_one_that_may_do_more_is_not_synchronised_and_named():
    inheriting = type("Inheriting", (nn.BatchNorm2d,), {})
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Untold(8), inheriting(8), nn.LazyBatchNorm2d())
    with pytest.warns(UserWarning, match="not synchronised: '1': Untold is a batch norm that may do more .*; '3': L"):
        convert_sync(model, batchnorm=True)
    assert type(model[1]) is Untold and type(model[2]) is nn.SyncBatchNorm


def test_hooks_are_called_with_what_comes_out_of_the_tail():
    model, x = network(), torch.randn(4, 3, 8, 8)
    model[1].register_forward_hook(lambda module, args, y: y.clamp(max=0.5))
    expected = model.eval()(x)
    replace_batchnorm(model)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(to_plain(model)(x), expected, rtol=1e-4, atol=1e-5)


def test_a_state_of_the_model_as_it_was_loads():
    model, trained = network(), network()
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        trained[1].act.weight.fill_(0.5)
    replace_batchnorm(model)
    model.load_state_dict(trained.state_dict())
    torch.testing.assert_close(model.eval()(x), trained.eval()(x))


def test_none_is_skipped_in_silence():
    with pytest.raises(
        ValueError, match=r"first norm of Sequential, '1': Untold is a batch norm that may do more .*register"
    ):
        replace_batchnorm(nn.Sequential(nn.Conv2d(3, 8, 3), Untold(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), Untold(8), Untold(8), Untold(8), Untold(8))
    with pytest.warns(UserWarning, match=r"not replaced: '2', '3', '4' and 1 more: Untold"):
        assert replace_batchnorm(model, "all") == ["1"]
    register_batchnorm(Untold, then=["act", "nothing of that name"])
    assert replace_batchnorm(model) == ["2.norm"]
    kind = type("FrozenBatchNorm2d", (nn.Module,), {})
    with pytest.raises(ValueError, match="FrozenBatchNorm2d is frozen"):
        replace_batchnorm(nn.Sequential(kind(), nn.BatchNorm2d(8)))


def test_first_is_that_of_computation_where_an_example_is_given():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.late, self.early = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
            self.unused = nn.BatchNorm2d(4)

        def forward(self, x, scale=1.0):
            return self.late(self.early(x * scale).relu())

    x = torch.randn(2, 4, 3, 3)
    assert replace_batchnorm(Backwards()) == ["late"]
    for example in (x, (x, 2.0), {"x": x}):
        model = Backwards()
        assert replace_batchnorm(model, example_input=example) == ["early"]
        assert model.training and model.late.training and model.late.num_batches_tracked == 0
    with pytest.raises(ValueError, match="could not be run on the example input"):
        replace_batchnorm(Backwards(), example_input=torch.randn(2, 5, 3, 3))


def test_those_of_timm_are_known_where_it_is_in_use(monkeypatch):
    layers = types.ModuleType("timm.layers")
    layers.BatchNormAct2d = type("BatchNormAct2d", (NormAct,), {})
    monkeypatch.setitem(sys.modules, "timm.layers", layers)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), layers.BatchNormAct2d(8))
    assert replace_batchnorm(model) == ["1.norm"]


def test_the_size_of_a_group_is_the_next_divisor():
    model = nn.Sequential(nn.Conv2d(3, 24, 1), nn.BatchNorm2d(24), nn.Conv2d(24, 7, 1), nn.BatchNorm2d(7))
    replace_batchnorm(model, "all", group_size=16)
    assert [model[i].num_features // model[i].groups for i in (1, 3)] == [12, 7]


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: register_batchnorm(nn.ReLU), TypeError, "ReLU is no nn.BatchNorm1d, 2d, 3d or SyncBatchNorm"),
        (lambda: register_batchnorm(NormAct, then=["norm"]), ValueError, "cannot be named 'norm'"),
        (lambda: replace_batchnorm(network(), groups=2, group_size=4), ValueError, "groups or group_size, not both"),
        (lambda: replace_batchnorm(network(), group_size=0), ValueError, "group_size must be at least 1"),
    ],
)
def test_bad_input_says_what_to_do(call, error, says):
    with pytest.raises(error, match=says):
        call()


@pytest.mark.filterwarnings("error")
def test_one_that_is_synchronised_and_does_more_stays_without_a_warning():
    class Rectified(nn.SyncBatchNorm):
        def forward(self, input):
            return super().forward(input).relu()

    model = nn.Sequential(Rectified(4), nn.BatchNorm2d(4))
    convert_sync(model, batchnorm=True)
    assert [type(norm) for norm in model] == [Rectified, nn.SyncBatchNorm]
