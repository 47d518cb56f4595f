"""State dicts of decorrelated batch norm: strict, upgraded from older versions, seeded by batch norm's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from helpers import images_with
from wellcond.nn import DecorrelatedBatchNorm1d, DecorrelatedBatchNorm2d, IterNorm2d

C = 6
SAYS = "_extra_state"  # the method, which the tensors do not tell
KEYS = {"weight", "bias", "running_mean", "running_cov", "num_batches_tracked", SAYS}


def batch(dtype=torch.float64):
    return images_with([4.0, 3.0, 2.0, 1.0, 0.5, 0.2], (8, C, 3, 4), dtype) + 1.0


def trained(layer):
    for _ in range(3):
        layer(batch() + torch.randn(()))
    return layer


@pytest.mark.parametrize("options", [{}, {"groups": 3, "method": "cholesky"}, {"running": "whitening"}])
def test_a_state_dict_carries_everything_that_evaluation_needs(options):
    layer = trained(DecorrelatedBatchNorm2d(C, **options, dtype=torch.float64))
    nn.init.normal_(layer.weight)
    other = DecorrelatedBatchNorm2d(C, **options, dtype=torch.float64).eval()
    other.load_state_dict(layer.state_dict(), strict=True)
    x = batch()
    assert torch.equal(other(x), layer.eval()(x))


def test_the_keys_are_those_of_batch_norm_but_for_the_covariance():
    assert set(DecorrelatedBatchNorm2d(C).state_dict()) == KEYS
    assert set(IterNorm2d(C, running="whitening").state_dict()) == KEYS - {"running_cov"} | {"running_whitening"}
    assert set(DecorrelatedBatchNorm2d(C, affine=False, track_running_stats=False).state_dict()) == {SAYS}


def test_a_checkpoint_without_a_batch_count_leaves_that_of_the_layer():
    state = trained(DecorrelatedBatchNorm2d(C, dtype=torch.float64)).state_dict()
    del state["num_batches_tracked"]
    state._metadata[""]["version"] = 1
    layer = trained(DecorrelatedBatchNorm2d(C, dtype=torch.float64))
    layer.load_state_dict(state, strict=True)
    assert layer.num_batches_tracked == 3


def test_in_a_checkpoint_of_this_version_a_missing_count_is_an_error():
    state = DecorrelatedBatchNorm2d(C).state_dict()
    del state["num_batches_tracked"]
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        DecorrelatedBatchNorm2d(C).load_state_dict(state)


@pytest.mark.parametrize(("mine", "theirs"), [("covariance", "whitening"), ("whitening", "covariance")])
def test_the_other_kind_of_running_statistics_is_refused_with_the_way_out(mine, theirs):
    model = nn.Sequential(DecorrelatedBatchNorm2d(C, running=mine))
    state = nn.Sequential(DecorrelatedBatchNorm2d(C, running=theirs)).state_dict()
    with pytest.raises(RuntimeError, match=f"running={theirs!r}"):
        model.load_state_dict(state)


def test_statistics_of_other_groups_are_refused():
    with pytest.raises(RuntimeError, match="size mismatch for running_cov"):
        DecorrelatedBatchNorm2d(C, groups=2).load_state_dict(DecorrelatedBatchNorm2d(C).state_dict())


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("running", ["covariance", "whitening"])
@pytest.mark.parametrize("relative", [False, True])
def test_a_checkpoint_of_batch_norm_evaluates_as_batch_norm_did(groups, running, relative):
    model = nn.Sequential(nn.BatchNorm2d(C, dtype=torch.float64))
    nn.init.normal_(model[0].weight)
    nn.init.normal_(model[0].bias)
    model(batch())
    eps = 1e-12 if relative else model[0].eps
    ours = nn.Sequential(
        DecorrelatedBatchNorm2d(C, groups=groups, running=running, relative=relative, eps=eps, dtype=torch.float64)
    )
    ours.load_state_dict(model.state_dict(), strict=True)
    assert ours[0].num_batches_tracked == 1
    # The same ε, so the difference is rounding; a relative ε of 1e-12 against an absolute 1e-5 differs by the latter
    # over twice the variance, which is above 0.2.
    rtol = 1e-5 / 0.4 if relative else 1e-12
    x = batch()
    torch.testing.assert_close(ours.eval()(x), model.eval()(x), rtol=rtol, atol=rtol)


def test_a_batch_norm_of_another_width_is_refused():
    with pytest.raises(RuntimeError, match=r"running_var of shape \(4,\).*6 channels"):
        DecorrelatedBatchNorm2d(C).load_state_dict(nn.BatchNorm2d(4).state_dict())


def test_made_from_a_batch_norm_it_takes_over_arguments_statistics_and_mode():
    old = nn.BatchNorm2d(C, eps=1e-3, momentum=None, dtype=torch.float64).eval()
    nn.init.normal_(old.bias)
    old.running_var.uniform_(0.5, 2)
    before = copy.deepcopy(old.state_dict())
    new = DecorrelatedBatchNorm2d.from_batchnorm(old, groups=2)
    assert (new.eps, new.momentum, new.groups, new.training) == (1e-3, None, 2, False)
    x = batch()
    torch.testing.assert_close(new(x), old(x))
    assert all(torch.equal(value, before[name]) for name, value in old.state_dict().items())
    synced = DecorrelatedBatchNorm1d.from_batchnorm(nn.SyncBatchNorm(C, affine=False))
    assert synced.sync and synced.weight is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_statistics_that_were_saved_in_half_precision_load_with_a_warning(dtype):
    layer = trained(DecorrelatedBatchNorm2d(C))
    state = {key: value.to(dtype) if value.is_floating_point() else value for key, value in layer.state_dict().items()}
    fresh = DecorrelatedBatchNorm2d(C)
    with pytest.warns(UserWarning, match=f"running_cov was saved in {dtype}"):
        fresh.load_state_dict(state)
    assert fresh.eval()(batch().float()).isfinite().all()


def test_statistics_in_half_precision_are_not_assigned_as_such():
    state = {key: value.half() for key, value in trained(DecorrelatedBatchNorm2d(C)).state_dict().items()}
    layer = DecorrelatedBatchNorm2d(C)
    with pytest.warns(UserWarning, match="running_cov was saved in torch.float16"):
        layer.load_state_dict(state, assign=True)
    assert layer.running_mean.dtype == layer.running_cov.dtype == torch.float32
    assert layer.weight.dtype == torch.float16
