"""A compiled norm in evaluation has the whitening matrix of its running covariance, from a buffer; or else NaN."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel

from wellcond.nn import DecorrelatedBatchNorm2d, update_statistics

pytestmark = pytest.mark.usefixtures("fresh_compiler")
X = torch.randn(8, 4, 5, 5, generator=torch.Generator().manual_seed(0))


def trained(scale: float = 1.0, **options) -> nn.Sequential:
    """A model in evaluation, with the statistics of features of this size."""
    norm = DecorrelatedBatchNorm2d(4, momentum=None, **options)
    net = nn.Sequential(nn.Identity(), norm)
    net(scale * X)
    return net.eval()


def compiled(net: nn.Module, backend: str = "eager") -> nn.Module:
    return torch.compile(net, fullgraph=True, backend=backend)


def loaded_in_place(net, tmp_path):
    dcp.save(trained(3.0).state_dict(), checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    dcp.load(net.state_dict(), checkpoint_id=tmp_path / "checkpoint", no_dist=True)


def assigned(net, tmp_path):
    net[1].running_cov = 9 * net[1].running_cov


WRITES = {
    "in place": lambda net, _: net[1].running_cov.mul_(9),
    "through data": lambda net, _: net[1].running_cov.data.mul_(9),
    "assigned": assigned,
    "a distributed checkpoint": loaded_in_place,
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("options", [{}, {"groups": 2}, {"relative": True}, {"method": "pca"}], ids=str)
@pytest.mark.parametrize("write", WRITES)
def test_statistics_written_behind_the_layer_give_nan_until_eval(write, options, tmp_path):
    if options and write == "a distributed checkpoint":
        options = {}
    net = trained(**options)
    ours = compiled(net)
    torch.testing.assert_close(ours(X), net(X))
    WRITES[write](net, tmp_path)
    assert ours(X).isnan().all()
    net.eval()
    assert not net(X).isnan().any()
    torch.testing.assert_close(ours(X), net(X))


def test_an_eager_pass_renews_it_too():
    net = trained()
    ours = compiled(net)
    net[1].running_cov.mul_(9)
    torch.testing.assert_close(net(X), ours(X))


@pytest.mark.parametrize("use_buffers", [True, False])
def test_an_average_that_was_set_to_evaluation_once(use_buffers):
    net = trained().train()
    average = AveragedModel(net, use_buffers=use_buffers).eval()
    for scale in (2.0, 3.0):
        net(scale * X)
        average.update_parameters(net)
    ours = compiled(average)
    assert ours(X).isnan().all()
    average.eval()
    torch.testing.assert_close(ours(X), average(X))


def test_an_average_of_models_that_were_evaluated_before():
    """The average of the whitening matrices is not that of the average, though the buffers belonged together."""
    net = trained().train()
    average = AveragedModel(net, use_buffers=True).eval()
    for scale in (1.0, 4.0, 0.2):
        net.train()
        net(scale * X)
        average.update_parameters(net.eval())
    ours = compiled(average)
    assert ours(X).isnan().all()
    average.eval()
    torch.testing.assert_close(ours(X), average(X))


def test_a_module_that_was_pickled_without_the_mark(tmp_path):
    for options in ({}, {"running": "whitening"}, {"track_running_stats": False}):
        net = trained(**options)
        del net[1]._buffers["evaluation_mark"]
        net[1]._non_persistent_buffers_set.discard("evaluation_mark")
        torch.save(net, tmp_path / "net.pt")
        loaded = torch.load(tmp_path / "net.pt", weights_only=False)  # a module as a whole, pickled the line before
        assert set(loaded.state_dict()) == set(trained(**options).state_dict())
        if not options:
            assert compiled(loaded)(X).isnan().all()
        torch.testing.assert_close(loaded(X), net(X))
        if options != {"track_running_stats": False}:
            torch.testing.assert_close(compiled(loaded.eval())(X), loaded(X))


def test_lent_statistics_leave_no_autograd_graph_behind():
    net = trained()
    lent = {
        name: value.double().requires_grad_() for name, value in net.state_dict().items() if value.is_floating_point()
    }
    functional_call(net, lent, X.double())
    assert not any(buffer.requires_grad for buffer in net.buffers())
    copy.deepcopy(net)


def test_statistics_given_by_functional_call():
    net, other = trained(), trained(3.0)
    run = torch.compile(lambda state: functional_call(net, state, X), fullgraph=True, backend="eager")
    own, others = dict(net.state_dict()), dict(other.state_dict())
    torch.testing.assert_close(run(own), net(X))
    assert run(others).isnan().all()
    # With the buffers of the other, which are not in a state dict, they are whole.
    torch.testing.assert_close(run(dict(other.named_buffers())), other(X))


WAYS = {
    "as made": lambda net: net,
    "double": lambda net: net.double(),
    "there and back": lambda net: net.double().float(),
    "half": lambda net: net.half().float(),
    "a copy": copy.deepcopy,
    "trained on": lambda net: (net.train()(3 * X), net.eval())[1],
    "loaded": lambda net: (net.load_state_dict(trained(3.0).state_dict()), net)[1],
    "loaded by assignment": lambda net: (net.load_state_dict(trained(3.0).state_dict(), assign=True), net)[1],
    "reset": lambda net: (net[1].reset_running_stats(), net)[1],
    "statistics anew": lambda net: (update_statistics(net, [3 * X]), net)[1],
    "a variance assigned": lambda net: (setattr(net[1], "running_var", torch.full((4,), 3.0)), net)[1],
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("way", WAYS)
def test_what_the_layer_sees_is_never_nan(way):
    net = WAYS[way](trained())
    x = X.to(next(net.parameters()).dtype)
    ours = compiled(net)
    result = ours(x)
    assert not result.isnan().any()
    # Cast to double, the matrix in the buffer keeps the rounding of single precision; κ is below 10 here.
    torch.testing.assert_close(result, net(x), rtol=0, atol=1e2 * torch.finfo(torch.float32).eps)


def test_built_on_meta():
    with torch.device("meta"):
        net = nn.Sequential(nn.Identity(), DecorrelatedBatchNorm2d(4))
    state = trained(3.0).state_dict()
    assert compiled(net.eval())(X.to("meta")).shape == X.shape
    net.load_state_dict(state, assign=True)
    torch.testing.assert_close(compiled(net)(X), trained(3.0)(X))


def test_a_covariance_that_is_not_finite():
    net = trained()
    ours = compiled(net)
    net[1].running_cov.fill_(torch.nan)
    net.eval()
    assert ours(X).isnan().all()


def test_by_the_default_backend():
    net = trained()
    ours = compiled(net, "inductor")
    torch.testing.assert_close(ours(X), net(X))
    net[1].running_cov.mul_(9)
    assert ours(X).isnan().all()
    net.eval()
    torch.testing.assert_close(ours(X), net(X))


def test_an_exported_program_holds_the_statistics_as_they_were():
    net = trained()
    wanted = net(X)
    program = torch.export.export(net, (X,))
    assert not any("where" in str(node.target) for node in program.graph.nodes)
    net[1].running_cov.mul_(9)
    torch.testing.assert_close(program.module()(X), wanted)


def test_nothing_more_is_saved():
    assert not {"evaluation_whitening", "evaluation_mark"} & {
        name.rsplit(".", 1)[-1] for name in trained().state_dict()
    }
