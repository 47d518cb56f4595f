"""States, wrappers and callbacks with ``map="soc"``: what is saved loads where it means the same, or is refused."""

from __future__ import annotations

import copy
import warnings

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

import test_huggingface as hugging_face
from lightning_task import Task, fit
from small_runs import differences_of_runs, small
from test_skew_orthogonal_weight import SOC, net, stored
from treatment_models import assert_same_weights, batches, same, sgd, tiny_net, train
from wellcond.experiments.inspect import inspect
from wellcond.experiments.run.train import run
from wellcond.lightning import TreatmentCallback
from wellcond.nn import DecorrelatedBatchNorm2d, SkewOrthogonalConv2d, fold, to_plain
from wellcond.orthogonality import orthogonal_weight, treat, treat_like


def trained(steps: int = 3, treatments: str = "nog+ow+olr") -> tuple[nn.Sequential, torch.optim.Optimizer, object]:
    model = net()
    optimizer = sgd(model)
    handle = treat(model, optimizer, treatments, options=SOC)
    train(model, optimizer, batches(steps))
    return model, optimizer, handle


def outputs(model: nn.Module) -> torch.Tensor:
    return copy.deepcopy(model).eval()(batches(1, seed=1)[0][0]).detach()


def test_a_resumed_training_is_an_uninterrupted_one_bit_for_bit():
    whole, _, _ = trained(6)
    model, optimizer, handle = trained(3)
    again = net()
    other = sgd(again)
    resumed = treat(again, other, "nog+ow+olr", options=SOC)
    again.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed.load_state_dict(handle.state_dict())
    train(again, other, batches(6)[3:])
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))
    assert resumed.nog.counts()["0"]["treated"] == 6


def test_treat_like_reads_the_map_from_the_file(tmp_path):
    model, _, _ = trained()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    fresh = net()
    optimizer = sgd(fresh)
    fresh.load_state_dict(treat_like(fresh, load_file(tmp_path / "model.safetensors")))
    torch.testing.assert_close(outputs(fresh), outputs(model), rtol=0, atol=0)
    train(fresh, optimizer, batches(1))
    assert stored(fresh[0]) in optimizer.state  # it held the right parameter already


def test_an_untreated_state_becomes_what_treating_it_gives():
    plain, model = net(), trained()[0]
    with torch.no_grad():
        plain[0].weight.mul_(3).add_(0.1)
    model.load_state_dict(plain.state_dict())
    orthogonal_weight(plain[0], map="soc")
    assert torch.equal(stored(model[0]), stored(plain[0]))
    assert_same_weights(plain, model, bound=0)


def test_states_of_other_layers_and_maps_are_refused_and_change_nothing():
    model, _, _ = trained()
    gray = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1))  # whose filter is 8 × 8 too
    state = {name: value for name, value in model.state_dict().items() if name.startswith("0.")}
    for target in (
        gray,
        orthogonal_weight(copy.deepcopy(gray)[0], map="soc"),
        nn.Sequential(orthogonal_weight(net()[0])),
    ):
        target = target if isinstance(target, nn.Sequential) else nn.Sequential(target)
        before = copy.deepcopy(target.state_dict())
        with pytest.raises((ValueError, RuntimeError), match=r"channels (were|=)|map='soc'"):
            target.load_state_dict(treat_like(target, state) if target is gray else state)
        after = target.state_dict()
        assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    with pytest.raises(RuntimeError, match=r"saved shape is \(8, 1, 3, 3\), here it is \(8, 3, 3, 3\)"):
        model[0].load_state_dict(gray[0].state_dict())


@pytest.mark.filterwarnings("ignore:.*no layer before that the whitening folds into:UserWarning")
def test_plain_copies_hold_a_layer_of_the_library_and_say_so():
    model, _, _ = trained()
    expected = outputs(model)
    with pytest.warns(UserWarning, match="'0': a convolution of torch.nn is not skew-orthogonal"):
        plain = to_plain(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folded = fold(model)
    for other in (plain, folded):
        assert isinstance(other[0], SkewOrthogonalConv2d)
        torch.testing.assert_close(other(batches(1, seed=1)[0][0]), expected, rtol=1e-4, atol=1e-5)
    again = copy.deepcopy(plain)
    nn.init.zeros_(again[0].weight)
    again.load_state_dict(plain.state_dict())
    torch.testing.assert_close(outputs(again), outputs(plain), rtol=0, atol=0)
    assert isinstance(fold(model[0]), SkewOrthogonalConv2d)  # the layer is the whole model
    exported = torch.export.export(plain, (batches(1, seed=1)[0][0],))
    torch.testing.assert_close(exported.module()(batches(1, seed=1)[0][0]), expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_under_ddp_it_is_treated_before_and_refused_after(one_process):
    expected, _, _ = trained()
    model = net()
    optimizer = sgd(model)
    treat(model, optimizer, "nog+ow+olr", options=SOC)
    wrapped = nn.parallel.DistributedDataParallel(model)
    train(wrapped, optimizer, batches(3))
    assert_same_weights(model, expected)
    del wrapped
    late = net()
    before = copy.deepcopy(late.state_dict())
    wrapped, optimizer = nn.parallel.DistributedDataParallel(late), sgd(late)
    with pytest.raises(ValueError, match=r"'ow' \(map=soc\) gives layer '0' another parameter than Distributed"):
        treat(wrapped, optimizer, "ow", options=SOC)
    with pytest.raises(ValueError, match=r"layer '0' .* awaited by DistributedDataParallel"):
        treat(late, optimizer, "ow", options=SOC)  # which does not know that it is wrapped
    assert all(torch.equal(value, before[name]) for name, value in late.state_dict().items())
    train(wrapped, optimizer, batches(1))
    del wrapped


def padded() -> nn.Sequential:
    """The network of those tests, for images of 6 × 6, with a padded convolution."""
    torch.manual_seed(0)
    layers = tiny_net()
    layers[0], layers[4] = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.Linear(216, 2)
    return layers


class SameTask(Task):
    """The task of the other tests with a padded convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.net = padded()


def test_the_callback_of_lightning_trains_and_resumes(tmp_path):
    def part(epochs: int, ckpt=None) -> SameTask:
        torch.manual_seed(0)
        task = SameTask()
        trainer = fit(task, TreatmentCallback("nog+ow+olr", options=SOC), ckpt=ckpt, max_epochs=epochs)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return task

    whole = part(2)
    assert stored(whole.net[0]).shape[0] == stored(whole.net[0]).shape[1]
    part(1)
    again = part(2, tmp_path / "1.ckpt")
    assert_same_weights(whole, again)


def test_the_callback_of_lightning_refuses_processes_that_end_with_the_fit(tmp_path):
    """Asked where the fit itself runs, as Lightning does: here no process is made."""
    callback, task = TreatmentCallback("ow", options=SOC), SameTask()
    trainer = pl.Trainer(accelerator="cpu", strategy="ddp_fork", devices=1, logger=False, enable_progress_bar=False)
    with pytest.raises(ValueError, match=r"net\.0: the untreated module cannot hold the treated weight"):
        callback.setup(trainer, task, "fit")
    treated = SameTask()
    orthogonal_weight(treated.net[0], map="soc")
    TreatmentCallback("ow", options=SOC).setup(trainer, treated, "fit")


class Padded(hugging_face.Model):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.net = padded()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_callback_of_the_hugging_face_trainer_trains_and_resumes(tmp_path):
    def work() -> hugging_face.Trainer:
        callback = hugging_face.TreatmentCallback("nog+ow+olr", options=SOC)
        return hugging_face.trainer(tmp_path, callback, model=Padded(), save_strategy="steps", save_steps=3)

    straight, resumed = work(), work()
    straight.train()
    assert stored(straight.model.net[0]).shape == (6, 6, 3, 3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(straight.model, resumed.model)


OPTIONS = {"treat": "nog+ow+olr", "ow_map": "soc", "epochs": 2}


def test_a_run_of_the_command_resumes_bit_for_bit_and_is_inspected(tmp_path, monkeypatch):
    from test_resume import run_until

    result = run(small(**OPTIONS), tmp_path / "whole")
    assert result.config.label == "zca+nog+ow(soc)+olr"
    run_until(6, result.config, tmp_path / "run", monkeypatch)
    run(result.config, tmp_path / "run", resume=True)
    assert differences_of_runs(tmp_path / "whole", tmp_path / "run") == []
    found = inspect(tmp_path / "run", batches=1)
    (weight,) = found.weights
    # Images of one channel, a kernel of 3 (of 5 for the digits), and the series cut after the power 5.
    assert weight.rows == 8 and weight.columns in (11**2, 21**2)
    assert 0 < weight.smallest <= weight.largest <= 1.1


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped:UserWarning")
def test_sharded_it_trains_as_a_whole(one_process):
    from torch.distributed.fsdp import fully_shard

    expected, _, _ = trained(3)
    model = net()
    orthogonal_weight(model[0], map="soc")
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = sgd(model)
    handle = treat(model, optimizer, "nog+olr", layers=["0"])
    train(model, optimizer, batches(3))
    whole = {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in model.state_dict().items()
    }
    assert_same_weights(whole, expected)
    assert handle.nog.counts()["0"]["treated"] == 3
    with pytest.raises(ValueError, match="sharded over processes already"):
        treat(model, optimizer, "ow", layers=["3"], options=SOC)


def two_layers(second: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    first = (nn.Conv2d(3, 8, 3, padding=1), DecorrelatedBatchNorm2d(8))
    return nn.Sequential(*first, second, DecorrelatedBatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten())


REFUSED_LATE = {
    "the second layer": ("ow", ["0", "2"], SOC),
    "another treatment": ("nog+ow", ["0"], {**SOC, "nog": {"scale": "long"}}),
    "another weight treatment": ("ow+sn", ["0"], SOC),
}


@pytest.mark.parametrize("case", REFUSED_LATE)
@pytest.mark.parametrize("kind", [torch.optim.Adam, sgd])
def test_a_refused_treatment_leaves_gradient_and_optimizer_as_they_were(case, kind):
    treatments, layers, options = REFUSED_LATE[case]
    model = two_layers(nn.Conv2d(8, 8, 2))
    optimizer = kind(model.parameters()) if kind is not sgd else sgd(model)
    train(model, optimizer, batches(2))
    states = copy.deepcopy(optimizer.state_dict())
    held = {p: (p.grad.clone(), dict(optimizer.state[p])) for p in model.parameters() if p.grad is not None}
    with pytest.raises(ValueError):
        treat(model, optimizer, treatments, layers=layers, options=options)
    assert model[0].weight in held and type(model[0]) is nn.Conv2d
    for p, (gradient, state) in held.items():
        assert torch.equal(p.grad, gradient) and list(optimizer.state[p]) == list(state)
    now = optimizer.state_dict()["state"]
    assert set(now) == set(states["state"])
    for index, state in states["state"].items():
        assert all(torch.equal(value, now[index][name]) for name, value in state.items())
    train(model, optimizer, batches(1))


def test_a_refused_callback_leaves_the_gradient():
    model = two_layers(nn.Conv2d(8, 8, 2))
    model(batches(1)[0][0]).sum().backward()
    gradient = model[0].weight.grad.clone()
    callback = hugging_face.TreatmentCallback("ow", layers=["0", "2"], options=SOC)
    with pytest.raises(ValueError, match="odd size"):
        callback.treat_weights(model)
    assert torch.equal(model[0].weight.grad, gradient)


def test_a_removal_that_is_refused_leaves_all_layers_treated():
    model = two_layers(nn.Conv2d(8, 8, 3, padding=1))
    model[2].weight.requires_grad_(False)
    optimizer = sgd(model)
    handle = treat(model, optimizer, "nog+ow", layers=["0", "2"], options=SOC)
    train(model, optimizer, batches(1))
    expected = outputs(model)
    with pytest.raises(RuntimeError, match="layer '0'"):
        handle.remove()
    assert hasattr(model[0], "parametrizations") and hasattr(model[2], "parametrizations")
    assert torch.equal(outputs(model), expected)
    train(model, optimizer, batches(1))
    assert handle.nog.counts()["0"]["treated"] == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_an_unmoved_layer_gets_its_weight_back_in_another_dtype(dtype):
    model = net()
    before = model[0].weight.detach().clone()
    handle = treat(model, sgd(model), "ow", options=SOC)
    model.to(dtype)
    handle.remove()
    assert type(model[0]) is nn.Conv2d and torch.equal(model[0].weight, before.to(dtype))


def test_on_the_meta_device_it_is_a_layer_that_can_be_filled():
    with torch.device("meta"):
        layer = nn.Conv2d(3, 8, 3, padding=1)
    orthogonal_weight(layer, map="soc")
    assert stored(layer).is_meta and stored(layer).shape == (8, 8, 3, 3)
    other, x = orthogonal_weight(nn.Conv2d(3, 8, 3, padding=1), map="soc"), torch.randn(2, 3, 6, 6)
    assert layer(x.to("meta")).shape == (2, 8, 6, 6)
    with pytest.raises(RuntimeError, match=r"its filter is on the meta device, .*; load a state with assign=True"):
        layer(x)
    layer.load_state_dict(other.state_dict(), assign=True)
    torch.testing.assert_close(layer(x), other(x), rtol=0, atol=0)


def test_an_exchange_that_fails_leaves_the_layer_as_it_was(monkeypatch):
    from wellcond.orthogonality import _weight_treatment

    def fail(*_):
        raise RuntimeError("no")

    monkeypatch.setattr(_weight_treatment, "exchange", fail)
    layer = nn.Conv2d(3, 8, 3, padding=1)
    weight, before = layer.weight, copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match="no"):
        orthogonal_weight(layer, map="soc")
    assert type(layer) is nn.Conv2d and layer.weight is weight and list(layer._parameters) == ["weight", "bias"]
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
