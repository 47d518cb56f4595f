"""Whatever ``nn.BatchNorm2d`` survives: every scenario runs on it and on ours, and what happens is compared.

A scenario takes a maker of layers and gives what it saw, in names and yes or no (no numbers, which differ). The last
test holds what is different, and why.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint

from helpers import relative_error
from wellcond.nn import DecorrelatedBatchNorm2d, IterNorm2d, convert_sync, replace_batchnorm, update_statistics

C = 3
OURS = {"decorrelated": DecorrelatedBatchNorm2d, "relative": DecorrelatedBatchNorm2d, "iterated": IterNorm2d}
OPTIONS = {"relative": {"relative": True, "eps": 1e-2}}
Maker = Callable[..., Any]
SCENARIOS: dict[str, Callable[[Maker], Any]] = {}


def scenario(function: Callable[[Maker], Any]) -> Callable[[Maker], Any]:
    SCENARIOS[function.__name__.replace("_", " ")] = function
    return function


def batch(number: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    mix = torch.eye(C) + torch.rand(C, C, generator=generator)
    return torch.einsum("cd,ndhw->nchw", mix, torch.randn(8, C, 4, 4, generator=generator)).to(dtype) + 1


def trained(make: Maker, *numbers: int, **options: Any) -> Any:
    layer = make(**options)
    for number in numbers or (1, 2, 3, 4, 5):
        layer(batch(number))
    return layer


def as_saved(layer: Any, make: Maker, **options: Any) -> bool:
    """Whether the layer evaluates as a new one does that was given its state."""
    fresh = make(**options)
    fresh.load_state_dict(layer.state_dict())
    x = batch(9)
    return layer.training is False and relative_error(layer(x), fresh.eval()(x)) < 1e-5


def same_state(a: Any, b: Any, tolerance: float = 0.0) -> bool:
    pairs = zip(tensors(a), tensors(b), strict=True)
    return all(relative_error(one, other) <= tolerance for one, other in pairs)


def tensors(layer: Any) -> list[torch.Tensor]:
    """Of its state, less what says how to read it: an exported program has tensors alone."""
    return [value for name, value in layer.state_dict().items() if not name.endswith("_extra_state")]


def outcome(function: Callable[[], Any]) -> str:
    """``"fine"``, or the name of the error."""
    try:
        function()
    except Exception as error:
        return type(error).__name__
    return "fine"


# ---------------------------------------------------------------------------------------- state dicts and copies


@scenario
def partial_states_keep_the_rest(make: Maker) -> Any:
    layer = trained(make)
    before = copy.deepcopy(layer)
    layer.load_state_dict({}, strict=False)
    untouched = same_state(layer, before)
    layer.load_state_dict({"weight": torch.full((C,), 2.0)}, strict=False)
    mean = {"running_mean": torch.ones(C)}
    layer.load_state_dict(mean, strict=False)
    versioned = before.state_dict()
    del versioned["num_batches_tracked"]
    missing = layer.load_state_dict(versioned, strict=False).missing_keys
    return untouched, int(layer.num_batches_tracked), layer.weight.tolist(), missing


@scenario
def a_strict_load_names_what_is_missing(make: Maker) -> Any:
    model = nn.Sequential(make())
    try:
        model.load_state_dict({})
    except RuntimeError as error:
        return str(error).split(":", 1)[1].replace("running_cov", "running_var")


@scenario
def a_state_of_an_old_version_or_none_keeps_the_count(make: Maker) -> Any:
    counts = []
    for version in (1, None):
        layer, state = trained(make), trained(make, 1).state_dict()
        del state["num_batches_tracked"]
        if version is None:
            state = dict(state)
        else:
            state._metadata[""]["version"] = version
        layer.load_state_dict(state, strict=True)
        counts.append(int(layer.num_batches_tracked))
    return counts


@scenario
def assigned_states_are_the_tensors_themselves(make: Maker) -> Any:
    layer, source = make().eval(), trained(make)
    layer(batch())
    layer.load_state_dict(source.state_dict(), assign=True)
    return layer.running_mean.data_ptr() == source.running_mean.data_ptr(), as_saved(layer, make)


@scenario
def from_meta_by_assigning(make: Maker) -> Any:
    with torch.device("meta"):
        layer = make()
        shapes = layer(batch().to("meta")).shape, layer.eval()(batch().to("meta")).shape
    layer.train().load_state_dict(trained(make).state_dict(), assign=True)
    layer(batch())
    left = [name for name, tensor in (*layer.named_buffers(), *layer.named_parameters()) if tensor.is_meta]
    return shapes, left, outcome(lambda: layer.to("cpu").double()), as_saved(layer.float().eval(), make)


@scenario
def from_meta_by_filling(make: Maker) -> Any:
    with torch.device("meta"):
        layer = make()
    layer.to_empty(device="cpu").reset_parameters()
    return same_state(layer, make()), as_saved(layer.eval(), make)


@scenario
def shapes_of_fake_tensors(make: Maker) -> Any:
    with torch._subclasses.FakeTensorMode():
        layer, x = make(), torch.randn(4, C, 5, 5)
        return layer(x).shape, layer.eval()(x).shape


@scenario
def a_state_of_nan_loads_in_evaluation(make: Maker) -> Any:
    layer = make().eval()
    bad = {
        name: value * torch.nan
        for name, value in layer.state_dict().items()
        if name not in ("num_batches_tracked", "_extra_state")
    }
    first = outcome(lambda: layer.load_state_dict(bad, strict=False)), outcome(layer.eval)
    layer.load_state_dict(trained(make).state_dict())
    return first, as_saved(layer, make)


@scenario
def deep_copies_and_pickles(make: Maker) -> Any:
    layer = trained(make).eval()
    layer(batch())
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    copies = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)
    for other in copies:
        other.running_mean += 1
        other.load_state_dict(trained(make, 7).state_dict())
    return as_saved(layer, make), [as_saved(other, make) for other in copies]


# ------------------------------------------------------------------------- writes that leave no trace in a tensor


@scenario
def writes_through_data(make: Maker) -> Any:
    layer, other = trained(make).eval(), trained(make, 6, 7).eval()
    layer(batch())
    for mine, theirs in zip(layer.state_dict().values(), other.state_dict().values(), strict=True):
        mine.data.copy_(theirs.data)
    copied = as_saved(layer, make)
    matrix = layer.running_cov if hasattr(layer, "running_cov") else layer.running_var
    before = layer(batch())
    matrix.data.mul_(100)
    return copied, as_saved(layer, make), (layer(batch()).std() / before.std()).item() < 0.2


@scenario
def writes_through_numpy_and_shared_memory(make: Maker) -> Any:
    layer = trained(make).eval()
    layer(batch())
    layer.share_memory()
    shared = all(tensor.is_shared() for tensor in (*layer.buffers(), *layer.parameters()))
    for tensor in layer.state_dict().values():
        tensor.numpy()[...] = tensor.numpy() * 4
    return shared, as_saved(layer, make)


@scenario
def every_buffer_overwritten(make: Maker) -> Any:
    """As by an average of all buffers, or a broadcast of them."""
    layer = trained(make).eval()
    layer(batch())
    state = copy.deepcopy(layer.state_dict())
    for tensor in layer.buffers():
        tensor.data.fill_(3)
    layer.load_state_dict(state)
    loaded = as_saved(layer, make)
    for name, tensor in layer.named_buffers():
        if name not in state:
            tensor.data.fill_(3)
    return loaded, as_saved(layer, make), as_saved(layer.train().eval(), make)


@scenario
def options_changed_under_it(make: Maker) -> Any:
    layer = trained(make).eval()
    layer(batch())
    layer.eps = 3.0
    return as_saved(layer, make, eps=3.0)


@scenario
def buffers_passed_to_functional_call(make: Maker) -> Any:
    layer, other = trained(make).eval(), trained(make, 6, 7).eval()
    want = other(batch())
    got = torch.func.functional_call(layer, dict(other.state_dict()), (batch(),))
    return relative_error(got, want) < 1e-5, as_saved(layer, make)


@scenario
def conversions_and_inference_mode(make: Maker) -> Any:
    layer = trained(make).eval()
    with torch.inference_mode():
        layer(batch())
    x = batch().requires_grad_()
    layer(x).sum().backward()
    layer.to(memory_format=torch.channels_last).double()
    wide = layer(batch(dtype=torch.float64)).dtype
    return wide, as_saved(layer.float(), make)


# ------------------------------------------------------------------------------------------------ moving averages


def average_by_torch(average: Any, model: Any) -> None:
    average.update_parameters(model)


def average_of_state_dicts(average: Any, model: Any) -> None:
    for mine, theirs in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        mine.copy_(0.5 * mine + 0.5 * theirs)


def average_by_data(average: Any, model: Any) -> None:
    own = dict(model.named_buffers()) | dict(model.named_parameters())
    for name, mine in (*average.named_buffers(), *average.named_parameters()):
        mine.data.copy_(own[name].data)


@scenario
def three_moving_averages(make: Maker) -> Any:
    seen = []
    for step in (average_by_torch, average_of_state_dicts, average_by_data):
        model = nn.Sequential(make())
        multi = {"multi_avg_fn": get_ema_multi_avg_fn(0.5), "use_buffers": True}
        average = AveragedModel(model, **multi) if step is average_by_torch else copy.deepcopy(model)
        average.eval()
        for number in (1, 2, 3):
            model(batch(number))
            if number == 2:
                model.eval()(batch(number))
                model.train()
            with torch.no_grad():
                step(average, model)
            norm = (average.module if step is average_by_torch else average)[0]
            seen.append(as_saved(norm, make))
    return seen


@scenario
def statistics_by_update_bn(make: Maker) -> Any:
    model = nn.Sequential(nn.Conv2d(C, C, 1), make()).eval()
    model[1](batch())
    data = [batch(number) for number in range(4)]
    update_bn(data, model)
    mean = torch.cat([model[0](x) for x in data]).mean((0, 2, 3))
    norm = model[1]
    return int(norm.num_batches_tracked), norm.momentum, relative_error(norm.running_mean, mean) < 1e-5, norm.training


@scenario
def frozen_as_fine_tuning_does(make: Maker) -> Any:
    layer = trained(make)
    norms = [m for m in nn.Sequential(layer).modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.track_running_stats = False
    before = copy.deepcopy(layer)
    layer(batch())
    return len(norms), same_state(layer, before)


# ------------------------------------------------------------------------------------------ graphs and transforms


@scenario
def training_export(make: Maker) -> Any:
    layer, x = make(), batch()
    eager, given = copy.deepcopy(layer), x.clone()
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},)).module()
    y = program(x)
    right = relative_error(y, eager(given)) < 1e-4, same_state(program, eager, 1e-5)
    return torch.equal(x, given), right, program(batch(1)[:5]).shape


@scenario
def evaluation_export(make: Maker) -> Any:
    layer, x = trained(make).eval(), batch()
    before, given = copy.deepcopy(layer), x.clone()
    sizes = {axis: torch.export.Dim(name, min=2) for axis, name in ((0, "n"), (2, "h"), (3, "w"))}
    program = torch.export.export(layer, (x,), dynamic_shapes=(sizes,)).module()
    same = relative_error(program(x), before(x)) < 1e-5
    return torch.equal(x, given), same, same_state(layer, before), program(batch()[:3, :, :2]).shape


@scenario
def compiled_autograd(make: Maker) -> Any:
    layer, x = make(), batch().requires_grad_()
    plain, z = copy.deepcopy(layer), batch().requires_grad_()
    with torch._dynamo.compiled_autograd._enable(lambda graph: graph):
        layer(x).pow(3).sum().backward()
    plain(z).pow(3).sum().backward()
    return relative_error(x.grad, z.grad) < 1e-5, relative_error(layer.weight.grad, plain.weight.grad) < 1e-5


@scenario
def symbolic_tracing(make: Maker) -> Any:
    model = nn.Sequential(nn.Conv2d(C, C, 1), trained(make), nn.ReLU()).eval()
    graph = torch.fx.symbolic_trace(model)
    nodes = [(node.op, node.target) for node in graph.graph.nodes]
    return nodes, torch.equal(graph(batch()), model(batch())), outcome(lambda: torch.fx.symbolic_trace(make()))


@scenario
def tracing_by_example(make: Maker) -> Any:
    layer = trained(make).eval()
    return relative_error(torch.jit.trace(layer, batch())(batch(1)), layer(batch(1))) < 1e-5


@scenario
def transforms_of_torch_func(make: Maker) -> Any:
    layer, x = trained(make), torch.stack([batch(1), batch(2)])
    training = outcome(lambda: torch.func.vmap(layer)(x))
    layer.eval()
    want = torch.stack([layer(one) for one in x])
    evaluated = relative_error(torch.func.vmap(layer)(x), want) < 1e-5
    model = nn.Sequential(make())
    torch.func.replace_all_batch_norm_modules_(model)
    return training, evaluated, torch.func.vmap(model)(x).shape


@scenario
def activation_checkpointing(make: Maker) -> Any:
    seen = []
    for reentrant in (True, False):
        layer, x = make(), batch().requires_grad_()
        plain, z = copy.deepcopy(layer), batch().requires_grad_()
        checkpoint(layer, x, use_reentrant=reentrant).pow(3).sum().backward()
        plain(z).pow(3).sum().backward()
        seen += [int(layer.num_batches_tracked), relative_error(x.grad, z.grad) < 1e-5]
    return seen


# ----------------------------------------------------------------------------------------------- forward in corners


@scenario
def few_values(make: Maker) -> Any:
    layer = make()
    single = outcome(lambda: layer(torch.randn(1, C, 1, 1)))
    wrong = outcome(lambda: layer(torch.randn(2, C, 4)))
    layer.eval()
    return single, wrong, layer(torch.randn(1, C, 1, 1)).shape, layer(torch.empty(0, C, 4, 4)).shape


@scenario
def statistics_taken_away(make: Maker) -> Any:
    layer = trained(make)
    layer.running_mean = layer.running_var = layer.num_batches_tracked = None
    x = batch()
    return relative_error(layer.eval()(x), make(track_running_stats=False)(x)) < 1e-5


@cache
def of_batch_norm(name: str) -> Any:
    return SCENARIOS[name](lambda **options: nn.BatchNorm2d(C, **options))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.filterwarnings("ignore")
def test_ours_does_what_batch_norm_does(name, kind):
    def make(**options):
        return OURS[kind](C, **{**OPTIONS.get(kind, {}), **options})

    assert SCENARIOS[name](make) == of_batch_norm(name)


@pytest.mark.parametrize("momentum", [0.0, 1.0, 0.1, None])
def test_the_momenta_weigh_batches_as_in_batch_norm(momentum):
    ours = trained(DecorrelatedBatchNorm2d, 1, 2, 3, num_features=C, momentum=momentum)
    theirs = trained(nn.BatchNorm2d, 1, 2, 3, num_features=C, momentum=momentum)
    assert ours.num_batches_tracked == theirs.num_batches_tracked == 3
    # Sums of 128 values in single precision.
    assert relative_error(ours.running_mean, theirs.running_mean) < 1e-5
    assert relative_error(ours.running_var, theirs.running_var) < 1e-5
    ours.running_var = theirs.running_var.new_full((C,), 3.0)
    assert torch.equal(ours.running_cov[0], 3.0 * torch.eye(C))


@pytest.mark.parametrize("groups", [1, C])
def test_the_running_variance_is_a_copy_that_can_be_assigned(groups):
    layer = trained(DecorrelatedBatchNorm2d, num_features=C, groups=groups)
    before = layer.running_cov.clone()
    variance = layer.running_var.fill_(4.0)
    assert torch.equal(layer.running_cov, before)
    layer.running_var = variance
    assert torch.equal(layer.running_var, variance)
    assert torch.equal(layer.running_cov, 4.0 * torch.eye(C // groups).expand_as(before))


def test_what_differs_from_batch_norm_and_says_so():
    model = nn.Sequential(DecorrelatedBatchNorm2d(C), nn.BatchNorm2d(C))
    # An empty batch has no covariance: batch norm counts it as a step, and a batch of one value too, which it refuses.
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model[0](torch.empty(0, C, 4, 4))
    # A plain SyncBatchNorm would forget the covariance.
    with pytest.raises(RuntimeError, match=r"convert_sync\(model, batchnorm=True\)"):
        nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert convert_sync(model, batchnorm=True) is model
    assert model[0].sync and isinstance(model[1], nn.SyncBatchNorm)
    assert isinstance(convert_sync(nn.BatchNorm2d(C), batchnorm=True), nn.SyncBatchNorm)
    # Nor is one of ours taken for a batch norm that could be replaced.
    with pytest.raises(ValueError, match=r"holds no nn\.BatchNorm1d, 2d, 3d or SyncBatchNorm to replace$"):
        replace_batchnorm(nn.Sequential(DecorrelatedBatchNorm2d(C)))


def fuse_conv_and_bn(conv, bn):
    """As YOLO has it."""
    return conv.weight * (bn.weight / torch.sqrt(bn.eps + bn.running_var)).view(-1, 1, 1, 1)


@pytest.mark.parametrize("groups", [1, C])
@pytest.mark.parametrize("fuse", [nn.utils.fuse_conv_bn_eval, nn.utils.fuse_linear_bn_eval, fuse_conv_and_bn])
def test_what_fuses_a_batch_norm_by_its_variance_is_sent_to_fold(fuse, groups):
    layer = nn.Linear(3, C) if fuse is nn.utils.fuse_linear_bn_eval else nn.Conv2d(3, C, 1)
    fuse(layer.eval(), nn.BatchNorm2d(C).eval())
    with pytest.raises(RuntimeError, match=r"take wellcond\.nn\.fold\(model\)"):
        fuse(layer.eval(), DecorrelatedBatchNorm2d(C, groups=groups).eval())


def convert_splitbn_model(norm):
    """What timm's function of that name reads of a batch norm, before it makes one that splits the batch."""
    return norm.running_mean, norm.running_var


def test_what_puts_another_batch_norm_in_its_place_is_refused():
    convert_splitbn_model(nn.BatchNorm2d(C))
    with pytest.raises(RuntimeError, match="convert the model first"):
        convert_splitbn_model(DecorrelatedBatchNorm2d(C))


@pytest.mark.parametrize("options", [{"running": "whitening"}, {"track_running_stats": False}, {}])
def test_statistics_can_be_kept_on_the_cpu_until_they_are_used(options):
    layer = nn.Sequential(DecorrelatedBatchNorm2d(C, **options))
    layer(batch(0))
    state, y = layer.state_dict(), layer.eval()(batch(1))
    kept = cpu_offload(layer, execution_device="cpu", offload_buffers=True)
    torch.testing.assert_close(kept(batch(1)), y)
    assert list(state) == list(layer.state_dict())


def test_update_statistics_does_for_both_kinds_what_update_bn_does():
    data = [batch(number) for number in range(4)]
    models = [nn.Sequential(DecorrelatedBatchNorm2d(C), nn.Dropout(0.0), nn.BatchNorm2d(C)) for _ in range(2)]
    update_bn(data, models[0])
    update_statistics(models[1], data)
    assert same_state(*models)


def test_averaging_by_buffer_name_leaves_a_synchronised_layer_as_it_is():
    """``distribute_bn`` of timm sums buffers with ``running_mean`` or ``running_var`` in the name over the processes,
    and divides. The covariance has another name, so its rule is harmless where all processes have the same statistics,
    and would mix those of several where they have not."""

    def distribute(models):
        for name, buffer in models[0].named_buffers():
            if "running_mean" in name or "running_var" in name:
                mean = sum(dict(model.named_buffers())[name] for model in models) / len(models)
                buffer.copy_(mean)

    one = trained(DecorrelatedBatchNorm2d, num_features=C).eval()
    same = [copy.deepcopy(one), copy.deepcopy(one)]
    distribute(same)
    assert relative_error(same[0](batch()), one(batch())) < 1e-6
    different = [copy.deepcopy(one), trained(DecorrelatedBatchNorm2d, 8, num_features=C).eval()]
    distribute(different)
    assert torch.equal(different[0].running_cov, one.running_cov)
    assert not torch.equal(different[0].running_mean, one.running_mean)
