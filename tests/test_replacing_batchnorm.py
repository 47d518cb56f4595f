"""Decorrelated batch norm takes the place of batch norm in any model, and starts where that one was."""

import pytest
import torch
from torch import nn

from wellcond.experiments.run.models import build_model
from wellcond.nn import (
    DecorrelatedBatchNorm1d,
    DecorrelatedBatchNorm2d,
    DecorrelatedBatchNorm3d,
    convert_sync,
    replace_batchnorm,
)

KINDS = [
    (nn.BatchNorm1d, DecorrelatedBatchNorm1d, (16, 4)),
    (nn.BatchNorm2d, DecorrelatedBatchNorm2d, (8, 4, 3, 3)),
    (nn.BatchNorm3d, DecorrelatedBatchNorm3d, (4, 4, 3, 3, 3)),
]


def names(model, kind=DecorrelatedBatchNorm2d):
    return [name for name, module in model.named_modules() if isinstance(module, kind)]


@pytest.mark.parametrize("running", ["covariance", "whitening"])
@pytest.mark.parametrize(("batch", "decorrelated", "shape"), KINDS)
def test_evaluation_is_unchanged_until_the_first_training_step(batch, decorrelated, shape, running):
    model = nn.Sequential(batch(4, eps=1e-3, momentum=0.3, dtype=torch.float64), nn.Tanh())
    nn.init.normal_(model[0].weight)
    nn.init.normal_(model[0].bias)
    for _ in range(3):
        model(3 + 2 * torch.randn(shape, dtype=torch.float64))
    x = torch.randn(shape, dtype=torch.float64)
    expected = model.eval()(x)
    weight, count = model[0].weight, model[0].num_batches_tracked
    assert replace_batchnorm(model, groups=2, running=running) == ["0"]
    norm = model[0]
    assert type(norm) is decorrelated
    assert (norm.groups, norm.eps, norm.momentum, norm.training) == (2, 1e-3, 0.3, False)
    assert norm.weight is weight
    assert norm.num_batches_tracked == count
    torch.testing.assert_close(model(x), expected)


def test_first_all_or_chosen():
    model = build_model("resnet8", num_classes=3)
    assert replace_batchnorm(model) == ["norm1"] == names(model)
    assert replace_batchnorm(model, lambda name, module: name.endswith("bn2") and module.num_features == 32) == [
        "stage2.0.bn2"
    ]
    rest = replace_batchnorm(model, "all", groups=4)
    assert "stage1.0.bn1" in rest and "norm1" not in rest
    assert not [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert model(torch.randn(8, 3, 16, 16)).isfinite().all()


def test_a_synchronised_norm_stays_synchronised():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4, momentum=0.3), nn.ReLU())
    assert replace_batchnorm(model) == ["1"]
    norm = model[1]
    assert type(norm) is DecorrelatedBatchNorm2d
    assert (norm.sync, norm.momentum, norm.process_group) == (True, 0.3, None)
    assert model(torch.randn(8, 3, 6, 6)).isfinite().all()  # one process: the batch's own statistics


def test_a_norm_with_two_names_stays_one():
    shared = nn.BatchNorm2d(4)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": shared})
    assert replace_batchnorm(model) == ["a.0"]
    assert model["a"][0] is model["b"]
    assert isinstance(model["b"], DecorrelatedBatchNorm2d)


def test_a_lazy_norm_is_replaced_once_it_knows_its_channels():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LazyBatchNorm2d(), nn.BatchNorm2d(4))
    with pytest.warns(UserWarning, match="LazyBatchNorm2d has no channels yet: run one forward pass"):
        assert replace_batchnorm(model, "all") == ["2"]
    model(torch.randn(8, 3, 6, 6))
    assert replace_batchnorm(model) == ["1"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("running", ["covariance", "whitening"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_is_replaced_without_a_warning(dtype, running):
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())
    model(torch.tensor([1.0, 2.0, 3.0, 100.0]).view(4, 1, 1) * torch.randn(8, 4, 6, 6))
    model.eval().to(dtype)
    x = torch.randn(8, 4, 6, 6, dtype=dtype)
    expected = model(x)
    replace_batchnorm(model, running=running)
    assert (model[0].weight.dtype, model[0].running_mean.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(model(x), expected)  # the rounding of the output


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}, {"momentum": None}])
def test_what_the_batch_norm_lacks_the_new_one_lacks(options):
    model = nn.Sequential(nn.BatchNorm2d(4, **options))
    replace_batchnorm(model)
    (key, value), norm = next(iter(options.items())), model[0]
    assert getattr(norm, key) is value
    assert (norm.weight is None) == (options == {"affine": False})
    assert (norm.running_mean is None) == (options == {"track_running_stats": False})


@pytest.mark.parametrize("synchronised", [False, True])
def test_hooks_go_on_and_are_removed_by_their_handles(synchronised):
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Identity())
    seen = []
    handles = [
        model[0].register_forward_pre_hook(lambda module, *given: seen.append(("before", module)), with_kwargs=True),
        model[0].register_forward_hook(lambda module, args, y: y.relu()),
        model[0].register_full_backward_hook(lambda module, *grads: seen.append(("backward", module))),
    ]
    x = torch.randn(8, 4, 3, 3, requires_grad=True)
    expected = model.eval()(x)
    if synchronised:
        convert_sync(model, batchnorm=True)
    else:
        replace_batchnorm(model)
    seen.clear()
    y = model(x)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert seen == [("before", model[0]), ("backward", model[0])]
    for handle in handles:
        handle.remove()
    assert (model(x) < 0).any() and len(seen) == 2


def test_a_norm_whose_instance_has_a_forward_function_is_left():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    model[0].forward = lambda x: x.relu()
    with pytest.warns(UserWarning, match="not replaced: '0': the forward function of this BatchNorm2d is its own"):
        assert replace_batchnorm(model, "all") == ["1"]


class ActivatedNorm(nn.BatchNorm2d):
    """A batch norm with the activation inside, as some libraries have it."""

    def forward(self, x):
        return super().forward(x).relu()


@pytest.mark.parametrize(
    ("model", "which", "message"),
    [
        (
            lambda: nn.Sequential(nn.Conv2d(3, 4, 1)),
            "first",
            "Sequential holds no nn.BatchNorm1d, 2d, 3d or SyncBatchNorm",
        ),
        (lambda: nn.Sequential(ActivatedNorm(4)), "all", "'0': ActivatedNorm is a batch norm that may do more"),
        (lambda: nn.Sequential(nn.LazyBatchNorm2d()), "first", r"'0': LazyBatchNorm2d .*: run one forward pass [^;]*$"),
        (lambda: nn.Sequential(nn.BatchNorm2d(4)), lambda *_: False, "chose none of the batch norms 0"),
        (lambda: nn.Sequential(nn.BatchNorm2d(4)), "last", "unknown which 'last', which may also be a function"),
        (lambda: nn.BatchNorm2d(4), "first", "is a batch norm itself"),
        (lambda: torch.compile(nn.BatchNorm2d(4), backend="eager"), "first", "BatchNorm2d is a batch norm itself"),
    ],
)
def test_nothing_to_replace_is_an_error_that_says_why(model, which, message):
    with pytest.raises(ValueError, match=message):
        replace_batchnorm(model(), which)


def test_a_norm_that_is_compiled_itself_is_replaced_with_what_compiles_it(fresh_compiler):
    called = []
    compiled = torch.compile(nn.BatchNorm2d(8), backend="eager")
    compiled.register_forward_hook(lambda *_: called.append("around"))
    compiled._orig_mod.register_forward_hook(lambda *_: called.append("inside"))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), compiled, nn.Sequential(compiled))
    x = torch.randn(16, 3, 8, 8)
    model(x)  # compiled before, too
    called.clear()
    assert replace_batchnorm(model, "all") == ["1"] == names(model)
    assert type(model[1]) is DecorrelatedBatchNorm2d and model[2][0] is model[1]
    assert not [name for name in model.state_dict() if "_orig_mod" in name]
    cov = torch.cov(model[:2](x).detach().transpose(0, 1).flatten(1), correction=0)
    torch.testing.assert_close(cov, torch.eye(8), rtol=0, atol=1e-2)
    assert called == ["inside", "around"]


def test_a_compiled_norm_is_synchronised_too(fresh_compiler):
    model = nn.Sequential(torch.compile(nn.BatchNorm2d(4), backend="eager"))
    assert isinstance(convert_sync(model, batchnorm=True)[0], nn.SyncBatchNorm)
    assert isinstance(convert_sync(torch.compile(nn.BatchNorm2d(4)), batchnorm=True), nn.SyncBatchNorm)
