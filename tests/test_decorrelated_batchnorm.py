"""Decorrelated batch norm: its running statistics, its arguments, and what it says of bad input."""

import copy
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from helpers import channels_first
from wellcond.linalg import covariance, invsqrtm
from wellcond.nn import DecorrelatedBatchNorm1d, DecorrelatedBatchNorm2d, IterNorm2d, fold


def correlated(shape, dtype=torch.float64):
    """A batch whose channels are mixed and far from zero mean."""
    mix = torch.randn(shape[1], shape[1], dtype=dtype) + 2 * torch.eye(shape[1], dtype=dtype)
    return torch.einsum("cd,nd...->nc...", mix, torch.randn(shape, dtype=dtype)) + 3


def test_running_statistics_are_those_of_batch_norm_where_the_two_must_agree():
    ours = DecorrelatedBatchNorm2d(6, momentum=0.3, dtype=torch.float64)
    torchs = nn.BatchNorm2d(6, momentum=0.3, dtype=torch.float64)
    for _ in range(3):
        x = correlated((8, 6, 4, 5))
        ours(x)
        torchs(x)
    torch.testing.assert_close(ours.running_mean, torchs.running_mean)
    torch.testing.assert_close(ours.running_cov[0].diagonal(), torchs.running_var)
    assert ours.num_batches_tracked == torchs.num_batches_tracked == 3


def test_cumulative_average_is_the_mean_over_batches():
    layer = DecorrelatedBatchNorm2d(4, momentum=None, dtype=torch.float64)
    batches = [correlated((8, 4, 3, 3)) for _ in range(7)]
    for x in batches:
        layer(x)
    # Rounding of float64: a factor of 1/count in float32 would show.
    expected = torch.stack([torch.cov(channels_first(x)) for x in batches]).mean(0)
    torch.testing.assert_close(layer.running_cov[0], expected, rtol=0, atol=1e-13 * expected.abs().max().item())
    expected = torch.stack([channels_first(x).mean(1) for x in batches]).mean(0)
    torch.testing.assert_close(layer.running_mean, expected, rtol=0, atol=1e-14)


def test_evaluation_follows_statistics_that_change_under_it():
    layer = DecorrelatedBatchNorm2d(3, dtype=torch.float64).eval()
    x = correlated((8, 3, 4, 4))
    before = layer(x)
    with torch.no_grad():
        layer.running_cov.mul_(4.0)
    torch.testing.assert_close(layer(x), before / 2, rtol=1e-5, atol=0)
    layer.load_state_dict(DecorrelatedBatchNorm2d(3, dtype=torch.float64).state_dict())
    torch.testing.assert_close(layer(x), before)


def test_eval_renews_the_matrix_that_graphs_read_whatever_was_written_where():
    layer = DecorrelatedBatchNorm2d(3, eps=1e-12, dtype=torch.float64).eval()
    for write in (
        lambda: layer.running_cov.data[0].copy_(4 * torch.eye(3)),
        lambda: layer.evaluation_whitening.data.fill_(3.0),
    ):
        write()
        torch.testing.assert_close(layer.eval().evaluation_whitening[0], torch.eye(3, dtype=torch.float64) / 2)


def read_as_before(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Its state without what says how to read it, which a layer with other options refuses."""
    return {name: value for name, value in layer.state_dict().items() if name != "_extra_state"}


@pytest.mark.parametrize(
    "option", [{"eps": 3.0}, {"relative": True}, {"method": "cholesky"}, {"solver": "newton_schulz"}]
)
def test_options_changed_under_it_reach_evaluation_and_folding_alike(option):
    layer, x = DecorrelatedBatchNorm2d(3, dtype=torch.float64), correlated((8, 3, 4, 4))
    layer(x)
    before = layer.eval()(x)
    made = DecorrelatedBatchNorm2d(3, **option, dtype=torch.float64)
    made.load_state_dict(read_as_before(layer))
    for name, value in option.items():
        setattr(layer, name, value)
    torch.testing.assert_close(layer(x), made.eval()(x))
    torch.testing.assert_close(fold(layer)(x), made(x))
    assert not torch.allclose(layer(x), before, rtol=1e-6)


def test_a_solver_that_is_set_otherwise_reaches_evaluation():
    layer, x = IterNorm2d(3, dtype=torch.float64), correlated((8, 3, 4, 4))
    layer(x)
    layer.eval()(x)
    layer.solver.steps = 40
    exact = DecorrelatedBatchNorm2d(3, dtype=torch.float64)
    exact.load_state_dict(read_as_before(layer))
    torch.testing.assert_close(layer(x), exact.eval()(x))


def test_without_running_statistics_evaluation_uses_the_batch():
    layer = DecorrelatedBatchNorm2d(3, track_running_stats=False, dtype=torch.float64)
    x = correlated((8, 3, 4, 4))
    assert "running_cov" not in layer.state_dict()
    torch.testing.assert_close(layer.eval()(x), layer.train()(x))


@pytest.mark.parametrize("shape", [(2, 8, 1, 1), (2, 8, 2, 1)])
def test_fewer_samples_than_channels_stays_finite_and_suggests_groups(shape):
    layer = DecorrelatedBatchNorm2d(8)
    x = torch.randn(shape, requires_grad=True)
    with pytest.warns(UserWarning, match="groups="):
        y = layer(x)
    y.square().sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("channels", "groups", "values", "suggested"), [(10, 1, 4, 5), (12, 2, 6, 3), (7, 1, 5, 7), (9, 3, 2, 9)]
)
def test_the_groups_that_are_suggested_divide_the_channels_and_are_enough(channels, groups, values, suggested):
    with pytest.warns(UserWarning, match=f"groups={suggested} or more"):
        DecorrelatedBatchNorm1d(channels, groups=groups)(torch.randn(values, channels))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DecorrelatedBatchNorm1d(channels, groups=suggested)(torch.randn(values, channels))


def test_copies_and_pickles_keep_everything_but_observers():
    layer = DecorrelatedBatchNorm2d(4)
    x = correlated((8, 4, 3, 3), torch.float32)
    layer(x)
    layer.eval()(x)
    for clone in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(clone(x), layer(x))


def test_a_channel_count_that_groups_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="divisible by groups"):
        DecorrelatedBatchNorm2d(10, groups=3)


@pytest.mark.parametrize("layer", [DecorrelatedBatchNorm1d, IterNorm2d])
@pytest.mark.parametrize("arguments", [(64, 1e-3), (64, 1e-3, 0.1), (64, True), (64, 1.0), (64, None)])
def test_what_a_batch_norm_takes_second_is_refused_with_what_to_write(layer, arguments):
    message = f"second argument of {layer.__name__} is groups, an integer, got {arguments[1]}"
    with pytest.raises(TypeError, match=f"{message}.*write eps={arguments[1]}" if 1e-3 in arguments else message):
        layer(*arguments)
    assert layer(64, 4, eps=1e-3).groups == 4


def test_a_layer_made_on_meta_is_the_one_made_on_the_cpu_once_it_is_filled():
    with torch.device("meta"):
        lazy = DecorrelatedBatchNorm2d(4, groups=2, dtype=torch.float64)
    assert all(t.is_meta and t.dtype != torch.float32 for t in (*lazy.parameters(), *lazy.buffers()))
    lazy.to_empty(device="cpu").reset_parameters()
    x = correlated((8, 4, 3, 3))
    for mode in (True, False):
        want = DecorrelatedBatchNorm2d(4, groups=2, dtype=torch.float64).train(mode)(x)
        assert torch.equal(copy.deepcopy(lazy).train(mode)(x), want)


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (DecorrelatedBatchNorm2d, (2, 4, 3), "expected 4D input"),
        (DecorrelatedBatchNorm1d, (2, 4, 3, 3), "expected 2D or 3D input"),
        (DecorrelatedBatchNorm2d, (2, 5, 3, 3), "4 channels"),
        (DecorrelatedBatchNorm2d, (1, 4, 1, 1), "more than 1 value per channel"),
    ],
)
def test_input_of_the_wrong_form_is_refused_in_torchs_words(layer, shape, message):
    with pytest.raises(ValueError, match=message):
        layer(4)(torch.randn(shape))


def test_one_sample_is_fine_in_evaluation():
    assert DecorrelatedBatchNorm2d(4).eval()(torch.randn(1, 4, 1, 1)).isfinite().all()


def test_running_covariance_whitens_what_a_running_whitening_matrix_cannot():
    """Two batches of opposite correlation: their average covariance is white, their average whitening is not."""
    kinds = ("covariance", "whitening")
    layers = [DecorrelatedBatchNorm1d(2, momentum=None, running=kind, dtype=torch.float64) for kind in kinds]
    a = torch.randn(4000, 2, dtype=torch.float64) @ torch.tensor([[1.0, 0.0], [0.99, 0.14]], dtype=torch.float64).T
    b = a * torch.tensor([1.0, -1.0], dtype=torch.float64)
    for layer in layers:
        layer(a)
        layer(b)
        layer.eval()
    both = torch.cat([a, b])
    gaps = [(covariance(layer(both).T) - torch.eye(2, dtype=both.dtype)).abs().max().item() for layer in layers]
    assert gaps[0] < 0.01
    assert gaps[1] > 1.0


def test_inverse_root_of_evaluation_is_that_of_the_running_covariance():
    layer = DecorrelatedBatchNorm2d(3, affine=False, dtype=torch.float64)
    x = correlated((8, 3, 4, 4))
    layer(x)
    layer.eval()
    S = invsqrtm(layer.running_cov[0], eps=layer.eps)
    expected = torch.einsum("cd,ndhw->nchw", S, x - layer.running_mean.view(1, -1, 1, 1))
    torch.testing.assert_close(layer(x), expected)


def test_an_ensemble_evaluates_under_vmap():
    """Stacked states of two models, as ``torch.func.stack_module_state`` gives them."""
    layers = [DecorrelatedBatchNorm2d(3, dtype=torch.float64) for _ in range(2)]
    x = correlated((8, 3, 4, 4))
    for scale, layer in enumerate(layers, start=1):
        layer(scale * x)
        layer.eval()
    state = torch.func.stack_module_state(layers)
    y = torch.func.vmap(lambda p, b: torch.func.functional_call(layers[0], (p, b), (x,)))(*state)
    torch.testing.assert_close(y, torch.stack([layer(x) for layer in layers]))


def test_threads_may_evaluate_one_layer():
    layer, x = DecorrelatedBatchNorm2d(3), correlated((8, 3, 4, 4)).float()
    layer(x)
    wanted = layer.eval()(x)

    def work(_):
        for _ in range(50):
            torch.testing.assert_close(layer.eval()(x), wanted)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def test_eval_does_not_decompose_what_has_not_changed():
    layer, x = DecorrelatedBatchNorm2d(3), correlated((8, 3, 4, 4)).float()
    layer(x)
    buffer = layer.eval().evaluation_whitening
    calls = layer.solver_events.calls
    for _ in range(3):
        layer.eval()(x)
    assert layer.solver_events.calls == calls
    with torch.no_grad():
        layer.running_cov.data.mul_(4)
    layer.eval()
    assert layer.evaluation_whitening is buffer  # where graphs read it
    torch.testing.assert_close(buffer, invsqrtm(layer.running_cov, eps=layer.eps))
