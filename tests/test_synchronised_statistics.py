"""Statistics over a process group: every share sees what one process with the joined batch sees, forward and backward.

Four gloo processes, started once; groups of the first two, three and four of them run the cases.
"""

from __future__ import annotations

import copy
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing import spawn

from group_work import leave
from helpers import relative_error
from wellcond.linalg import NewtonSchulz
from wellcond.nn import DecorrelatedBatchNorm1d, DecorrelatedBatchNorm2d, IterNorm2d, convert_sync

SHARES = {2: (7, 4), 3: (5, 6, 0), 4: (1, 0, 8, 2)}
CHANNELS = 6
CASES = {
    "zca": (DecorrelatedBatchNorm2d, {}, torch.float64, 1.0),
    "groups": (DecorrelatedBatchNorm2d, {"groups": 2, "momentum": None}, torch.float64, 1.0),
    "cholesky": (DecorrelatedBatchNorm2d, {"method": "cholesky", "relative": True}, torch.float64, 1.0),
    "running whitening": (DecorrelatedBatchNorm2d, {"running": "whitening"}, torch.float64, 1.0),
    "iterated": (DecorrelatedBatchNorm2d, {"solver": NewtonSchulz(5, tolerance=None)}, torch.float64, 1.0),
    "far from zero": (DecorrelatedBatchNorm2d, {}, torch.float32, 1e3),
    "channels last": (DecorrelatedBatchNorm2d, {}, torch.float64, 1.0),
}
RESULTS = ("y", "grad", "weight", "bias", "mean", "second", "count")


def joined_batch(name):
    dtype, offset = CASES[name][2:]
    generator = torch.Generator().manual_seed(len(name))
    x, weights = (
        torch.randn(2, sum(SHARES[2]), CHANNELS, 3, 2, generator=generator, dtype=torch.float64) for _ in "xw"
    )
    mix = torch.randn(CHANNELS, CHANNELS, generator=generator, dtype=torch.float64)
    x = torch.einsum("cd,snd...->snc...", mix, x) + offset * torch.arange(1.0, CHANNELS + 1).view(-1, 1, 1)
    # Half the channels share a mean over the batch, the others drift from image to image, so that shares differ.
    x[:, :, ::2] += torch.arange(x.shape[1], dtype=x.dtype).view(-1, 1, 1, 1)
    return x.to(dtype), weights.to(dtype)


def two_steps(layer, x, weights, name):
    """Two training steps' outputs and gradients, and the running statistics after them."""
    outputs, grads = [], []
    for batch, weight in zip(x, weights, strict=True):
        if name == "channels last":
            batch = batch.contiguous(memory_format=torch.channels_last)
        batch.requires_grad_()
        y = layer(batch)
        # A loss that is not linear in y, of which each process has a part.
        (weight * y + y.pow(3) / 10).sum().backward()
        outputs.append(y.detach())
        grads.append(batch.grad)
    second = layer.running_cov if layer.running_cov is not None else layer.running_whitening
    values = (torch.stack(outputs), torch.stack(grads), layer.weight.grad, layer.bias.grad, layer.running_mean, second)
    return dict(zip(RESULTS, (*values, layer.num_batches_tracked), strict=True))


def layer_of(name, **options):
    kind, arguments, dtype, _ = CASES[name]
    layer = kind(CHANNELS, **arguments, **options, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.5, 2.0, CHANNELS))
    return layer


def distributed_model():
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(2, 4, 3), DecorrelatedBatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3)).double()


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4, timeout=timedelta(seconds=120)
    )
    results = {}
    for world, shares in SHARES.items():
        group = dist.new_group(list(range(world)))
        if rank >= world:
            continue
        start = sum(shares[:rank])
        mine = slice(start, start + shares[rank])
        for name in CASES:
            x, weights = joined_batch(name)
            layer = layer_of(name, sync=True, process_group=group)
            results[world, name] = two_steps(layer, x[:, mine], weights[:, mine], name)
        if world == 2:
            model = nn.parallel.DistributedDataParallel(convert_sync(distributed_model(), group), process_group=group)
            x = torch.linspace(-1, 1, 4 * 2 * 4 * 4, dtype=torch.float64).sin().view(4, 2, 4, 4)
            model(x[2 * rank : 2 * rank + 2]).square().mean().backward()
            results["ddp"] = {name: p.grad for name, p in model.module.named_parameters()}
            del model  # before its group, whose last holder's destructor may deadlock
            try:
                DecorrelatedBatchNorm1d(2, sync=True, process_group=group)(torch.ones(1 - rank, 2))
            except ValueError as error:
                results["one sample"] = str(error)
    torch.save(results, f"{folder}/{rank}.pt")
    leave()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    spawn(worker, (str(folder),), nprocs=4)
    return [torch.load(folder / f"{rank}.pt") for rank in range(4)]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("world", SHARES)
def test_shares_see_what_one_process_with_the_joined_batch_sees(results, world, name):
    parts = [results[rank][world, name] for rank in range(world)]
    x, weights = joined_batch(name)
    want = two_steps(layer_of(name), x, weights, name)
    # Rounding, amplified by √κ of the inverse root and once more by its derivative: κ of these batches is below 1e4.
    # In float32 the mean, 1e3 to 6e3 times the deviation, is itself rounded to 6e-8 of that.
    tolerance = 1e-11 if CASES[name][2] == torch.float64 else 2e-2
    got = {key: torch.cat([part[key] for part in parts], 1) for key in ("y", "grad")}
    got |= {key: sum(part[key] for part in parts) for key in ("weight", "bias")}
    for key, value in got.items():
        assert relative_error(value, want[key]) < tolerance, key
    for part in parts:
        assert relative_error(part["mean"], want["mean"]) < (1e-6 if tolerance > 1e-6 else 1e-13)
        assert relative_error(part["second"], want["second"]) < (1e-4 if tolerance > 1e-6 else 1e-11)
        assert part["count"] == want["count"] == 2
        assert torch.equal(part["second"], parts[0]["second"])


def test_under_ddp_the_gradients_are_those_of_the_joined_batch(results):
    model = distributed_model()
    x = torch.linspace(-1, 1, 4 * 2 * 4 * 4, dtype=torch.float64).sin().view(4, 2, 4, 4)
    model(x).square().mean().backward()
    for name, parameter in model.named_parameters():
        # The bias of the convolution has no effect, hence a gradient of rounding only.
        want = parameter.grad
        for rank in range(2):
            assert (results[rank]["ddp"][name] - want).abs().max() < 1e-12, name


def test_one_sample_over_all_processes_is_refused_in_each(results):
    for rank in range(2):
        assert "more than 1 value per channel" in results[rank]["one sample"]


def test_without_a_process_group_the_statistics_are_local():
    x = joined_batch("zca")[0][0]
    layer = DecorrelatedBatchNorm2d(CHANNELS, dtype=torch.float64)
    torch.testing.assert_close(convert_sync(copy.deepcopy(layer))(x), layer(x), rtol=0, atol=0)


def test_conversion_finds_every_layer_and_changes_no_other():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Sequential(IterNorm2d(4)), DecorrelatedBatchNorm2d(4))
    assert convert_sync(model, process_group="group") is model
    assert model[1][0].sync and model[2].sync and model[2].process_group == "group"
    assert type(model[0]) is nn.BatchNorm2d and model[1][0].solver.steps == 5
