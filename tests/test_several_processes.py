"""Two processes that share the work take the steps of one process with the joined batch: DDP, FSDP2, tensor parallel.

Everything is in float64: the mean of two halves differs from the whole by eps64 = 2e-16, which the polar factor
magnifies by its condition number, here below 1e5, and four steps add up. So 1e-9 is ample, and float32 anywhere on
the way (1e-7) would be noticed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from group_work import leave
from treatment_models import batches, orthogonality_gap, polar_reference, small_net
from wellcond.orthogonality import (
    NearestOrthogonalGradient,
    OptimalLearningRate,
    Treatment,
    orthogonal_weight,
    pre_spectral_layers,
    spectral_norm,
    treat,
)

BOUND = 1e-9
WEIGHT_TREATMENTS = {"ow": orthogonal_weight, "sn": spectral_norm}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.4, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.02),
    "steep": lambda parameters: torch.optim.SGD(steep_first(parameters), lr=0.02),
}
DDP = [(names, when) for names in ("nog+olr", "nog+ow+olr", "sn+ol+nog") for when in ("before", "after")]
DDP_OPTIONS: dict[str, dict[str, Any]] = {
    "static graph": {"static_graph": True},
    "gradients as views of the buckets": {"gradient_as_bucket_view": True},
    "unused parameters looked for": {"find_unused_parameters": True},
    "accumulated without synchronisation": {},
}
FSDP = [
    ("nog", "sgd", {}),
    ("olr", "steep", {"olr": {"rule": "exact"}}),
    ("nog+olr+ol", "adamw", {}),
    ("nog+olr", "sgd", {"nog": {"on": "update"}, "olr": {"direction": "update"}}),
    ("ow+nog+olr", "sgd", {}),
    ("sn+nog+ol", "sgd", {}),
]
OFFLOADED = [("nog+olr+ol", "adamw", {}), ("ow+nog+olr", "sgd", {})]  # by a policy the shards stay on the CPU
SHARDED = FSDP + OFFLOADED
MESHES = ["tensor parallel", "fully sharded and tensor parallel", "replicated and sharded"]
PLACEMENTS = ["shard 0", "shard 1", "replicate", "partial"]
GRADIENT = torch.randn(1, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))[0]


def steep_first(parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """The treated weight in a group whose rate is far above what its gradient asks for."""
    first, *others = parameters
    return [{"params": [first], "lr": 1e3}, {"params": others}]


def net(seed: int = 0) -> nn.Sequential:
    """Five output channels, which two processes cannot share evenly; evaluation, so that the batch may be split."""
    torch.manual_seed(seed)
    return small_net(5).double().eval()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, treatment: Treatment, rank: int = 0, size: int = 1):
    for x, y in batches(4):
        optimizer.zero_grad()
        x, y = x.double().chunk(size)[rank], y.chunk(size)[rank]
        (nn.functional.cross_entropy(model(x), y) + treatment.loss()).backward()
        optimizer.step()


def split_names(names: str) -> tuple[list[str], str]:
    """What is put on the weight, and what acts in the step."""
    parts = names.split("+")
    return [n for n in parts if n in WEIGHT_TREATMENTS], "+".join(n for n in parts if n not in WEIGHT_TREATMENTS)


def one_process(names: str, optimizer: str = "sgd", options: Any = None) -> tuple[nn.Module, Treatment]:
    model = net()
    stepper = OPTIMIZERS[optimizer](model.parameters())
    treatment = treat(model, stepper, names, options=options)
    train(model, stepper, treatment)
    return model, treatment


# In each of the two processes ------------------------------------------------------------------------------------


def ddp(rank: int, names: str, when: str) -> dict[str, Any]:
    model = net(seed=rank)  # DDP sends the weights of rank 0
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    if when == "before":
        treatment = treat(model, optimizer, names)
        wrapped = nn.parallel.DistributedDataParallel(model)
    else:
        wrapped = nn.parallel.DistributedDataParallel(model)
        treatment = treat(wrapped, optimizer, names)
    train(wrapped, optimizer, treatment, rank, 2)
    return {
        "layers": list(treatment.layers),
        "weights": model.state_dict(),
        "rates": treatment.rates(),
        "gap": orthogonality_gap(model[0]),
    }


def ddp_with(rank: int, kind: str) -> dict[str, Any]:
    model = net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    treatment = treat(model, optimizer, "nog+olr")
    wrapped = nn.parallel.DistributedDataParallel(model, **DDP_OPTIONS[kind])
    if not kind.startswith("accumulated"):
        train(wrapped, optimizer, treatment, rank, 2)
    else:
        for x, y in batches(4):
            optimizer.zero_grad()
            parts = [(x.double().chunk(4)[i], y.chunk(4)[i]) for i in (rank, rank + 2)]
            with wrapped.no_sync():
                (nn.functional.cross_entropy(wrapped(parts[0][0]), parts[0][1]) / 2).backward()
            (nn.functional.cross_entropy(wrapped(parts[1][0]), parts[1][1]) / 2).backward()
            optimizer.step()
    return {"weights": model.state_dict(), "rates": treatment.rates(), "counts": treatment.nog.counts()}


def half_precision_shards(rank: int, mesh: Any) -> dict[str, Any]:
    """Forward and backward in bfloat16 of a weight kept in float32: the step is orthogonal all the same."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = net().float()
    half = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
    fully_shard(model[0], mesh=mesh, mp_policy=MixedPrecisionPolicy(**half))
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(**half, output_dtype=torch.float32))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    treatment = treat(model, optimizer, "nog")
    before = model[0].weight.full_tensor().detach().clone()
    (x, y), *_ = batches(1)
    nn.functional.cross_entropy(model(x.float().chunk(2)[rank]), y.chunk(2)[rank]).backward()
    optimizer.step()
    return {"step": (before - model[0].weight.full_tensor()).detach() / 0.5, "counts": treatment.nog.counts()}


def fsdp(rank: int, names: str, optimizer: str, options: Any, **sharding: Any) -> dict[str, Any]:
    from torch.distributed.fsdp import fully_shard

    model = net()
    on_weight, in_step = split_names(names)
    for name in on_weight:
        WEIGHT_TREATMENTS[name](model[0])
    fully_shard(model[0], **sharding)
    fully_shard(model, **sharding)
    stepper = OPTIMIZERS[optimizer](model.parameters())
    treatment = treat(model, stepper, in_step, options=options)  # the layer is found by tracing
    parameter = next(iter(treatment._targets.values())).parameter
    train(model, stepper, treatment, rank, 2)
    return {
        "layers": list(treatment.layers),
        "rows": len(parameter.to_local()),
        "weights": {name: value.full_tensor() for name, value in model.named_parameters()},
        "rates": treatment.rates(),
        "state": str(treatment.state_dict()),
        "summary": treatment.summary(),
        "weight": model[0].weight.full_tensor().detach(),  # from the shards, outside of a forward pass
    }


def tensor_parallel(rank: int, placement: str, mesh: Any) -> dict[str, Any]:
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    kind = {"shard 0": Shard(0), "shard 1": Shard(1), "replicate": Replicate(), "partial": Replicate()}[placement]
    parameter = nn.Parameter(distribute_tensor(torch.eye(4, 6, dtype=torch.float64), mesh, [kind]))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    nog = NearestOrthogonalGradient(optimizer, {"w": parameter})
    olr = OptimalLearningRate(optimizer, {"w": parameter})
    if placement == "partial":  # each process has a summand of the gradient
        summand = GRADIENT * (0.25 if rank else 0.75)
        parameter.grad = DTensor.from_local(summand, mesh, [Partial()])
    else:
        parameter.grad = distribute_tensor(GRADIENT, mesh, [kind])
    optimizer.step()
    found = {"weight": parameter.full_tensor().detach(), "rate": olr.rates()["w"]}
    for bad in (torch.zeros(4, 6), torch.full((4, 6), float("-inf")), torch.full((4, 6), 1e-320)):
        parameter.grad = distribute_tensor(bad.double(), mesh, [Shard(1)])
        before = parameter.grad.full_tensor()
        nog._pre(optimizer, (optimizer,), {})
        assert torch.equal(parameter.grad.full_tensor(), before)
    return found | {"counts": nog.counts()["w"]}


INPUTS = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5)).double()


def three_steps(model: nn.Sequential, x: Tensor) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    NearestOrthogonalGradient(optimizer, list(model))
    olr = OptimalLearningRate(optimizer, list(model))
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return [rate.item() for rate in olr.rates().values()]


def on_mesh(rank: int, kind: str) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model, x = two_layers(), INPUTS
    plan = {"0": ColwiseParallel(), "1": RowwiseParallel()}
    if kind == "tensor parallel":
        parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
    elif kind == "replicated and sharded":
        fully_shard(model, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard")))
    else:
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data", "tensor"))
        parallelize_module(model, mesh["tensor"], plan)
        fully_shard(model, mesh=mesh["data"])
    rates = three_steps(model, x if kind == "tensor parallel" else x.chunk(2)[rank])
    placements = [str(layer.weight.placements) for layer in model]
    return {"rates": rates, "placements": placements, "weights": [p.full_tensor().detach() for p in model.parameters()]}


def refusals(mesh: Any) -> dict[str, str]:
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    said = {}
    for name in WEIGHT_TREATMENTS:
        model = net()
        fully_shard(model, mesh=mesh)
        try:
            treat(model, OPTIMIZERS["sgd"](model.parameters()), f"nog+{name}")
        except ValueError as error:
            said[name] = str(error)
    model = net()
    treatment = treat(model, OPTIMIZERS["sgd"](model.parameters()), "ow")
    fully_shard(model, mesh=mesh)
    for time in ("once", "twice"):
        with pytest.raises(RuntimeError) as refused:
            treatment.remove()
        said[f"remove {time}"] = str(refused.value)
    flattened = FullyShardedDataParallel(net(), use_orig_params=True, device_id=torch.device("cpu"))
    try:
        treat(flattened, OPTIMIZERS["sgd"](flattened.parameters()), "nog", layers="_fsdp_wrapped_module.0")
    except ValueError as error:
        said["flattened"] = str(error)
    return said


def example_input(mesh: Any) -> list[str]:
    from torch.distributed.fsdp import fully_shard

    model = net()
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return list(pre_spectral_layers(model, batches(1)[0][0].double()))


def work(rank: int, folder: str) -> None:
    from torch.distributed.fsdp import CPUOffloadPolicy

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    found: dict[str, Any] = {"ddp": [ddp(rank, *case) for case in DDP]}
    found["ddp options"] = {kind: ddp_with(rank, kind) for kind in DDP_OPTIONS}
    found["half precision"] = half_precision_shards(rank, mesh)
    found["fsdp"] = [fsdp(rank, *case, mesh=mesh) for case in FSDP]
    offload = CPUOffloadPolicy(pin_memory=False)
    found["fsdp"] += [fsdp(rank, *case, mesh=mesh, offload_policy=offload) for case in OFFLOADED]
    found["tensor parallel"] = [tensor_parallel(rank, placement, mesh) for placement in PLACEMENTS]
    found["meshes"] = [on_mesh(rank, kind) for kind in MESHES]
    found["refusals"], found["example input"] = refusals(mesh), example_input(mesh)
    torch.save(found, f"{folder}/{rank}.pt")
    leave()


# What they found -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process found; all is done in one start of the processes, which is what takes the time."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def assert_close(mine: dict[str, Tensor], reference: dict[str, Tensor]) -> None:
    assert {*mine} <= {*reference}
    for name, value in mine.items():
        assert (value - reference[name]).abs().max() < BOUND, name


@pytest.mark.parametrize("case", range(len(DDP)), ids=["-".join(case) for case in DDP])
def test_ddp_is_one_process_with_the_whole_batch(case: int, ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["ddp"][case] for rank in ranks)
    names, _ = DDP[case]
    assert first["layers"] == ["0"]  # whether treated before or after wrapping
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())
    assert first["rates"] == second["rates"]
    model, treatment = one_process(names)
    assert_close(first["weights"], model.state_dict())
    for mine, reference in zip(first["rates"].values(), treatment.rates().values(), strict=True):
        assert mine.item() == pytest.approx(reference.item(), rel=BOUND)
    if "ow" in names:
        assert first["gap"] < 1e-14  # 5 products of eps64


@pytest.mark.parametrize("kind", DDP_OPTIONS)
def test_every_way_of_ddp_is_one_process_with_the_whole_batch(kind: str, ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["ddp options"][kind] for rank in ranks)
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())
    assert first["rates"] == second["rates"] and first["counts"]["0"]["treated"] == 4  # steps, not backward passes
    model, treatment = one_process("nog+olr")
    assert_close(first["weights"], model.state_dict())
    assert first["rates"]["0"].item() == pytest.approx(treatment.rates()["0"].item(), rel=BOUND)


def test_a_weight_sharded_in_mixed_precision_takes_orthogonal_steps(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["half precision"] for rank in ranks)
    assert torch.equal(first["step"], second["step"]) and first["counts"]["0"]["treated"] == 1
    step = first["step"].flatten(1)
    # Read from the move of weights of order 0.3 in float32.
    assert (step @ step.mT - torch.eye(5)).abs().max() < 1e-5


@pytest.mark.parametrize(
    "case",
    range(len(SHARDED)),
    ids=[f"{names}-{optimizer}" + "-offloaded" * (i >= len(FSDP)) for i, (names, optimizer, _) in enumerate(SHARDED)],
)
def test_fully_sharded_weights_are_treated_as_whole_ones(case: int, ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["fsdp"][case] for rank in ranks)
    assert first["layers"] == ["0"]
    assert (first["rows"], second["rows"]) == (3, 2)  # they were sharded indeed
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())
    assert first["rates"] == second["rates"]
    assert first["state"] == second["state"]
    assert "5 × 27" in first["summary"]
    model, treatment = one_process(*SHARDED[case])
    assert_close(first["weights"], dict(model.named_parameters()))
    for mine, reference in zip(first["rates"].values(), treatment.rates().values(), strict=True):
        assert mine.item() == pytest.approx(reference.item(), rel=BOUND)
    assert (first["weight"] - model[0].weight).abs().max() < BOUND
    if (
        treatment.olr is not None and SHARDED[case][1] != "adamw"
    ):  # whose rate is a small cap: here the rates are its own
        assert treatment.olr.counts()["0"]["shortened"] > 0


@pytest.mark.parametrize("case", range(len(PLACEMENTS)), ids=PLACEMENTS)
def test_however_a_weight_is_spread_the_step_is_that_of_the_whole(case: int, ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["tensor parallel"][case] for rank in ranks)
    assert torch.equal(first["weight"], second["weight"])
    factor = polar_reference(nn.Linear(6, 4), GRADIENT)
    W = torch.eye(4, 6, dtype=torch.float64)
    product = (W * factor).sum()  # eq. (20) of orthogonal W and L, whose squared norms are 4
    rate = (4 * product / (16 + 2 * product**2)).item()
    rate = rate if 0 < rate < 1 else 1.0
    assert first["rate"].item() == second["rate"].item() == pytest.approx(rate, rel=BOUND)
    assert (first["weight"] - (W - rate * factor)).abs().max() < BOUND
    assert first["counts"] == {"treated": 1, "zero": 2, "nonfinite": 1}


@pytest.mark.parametrize("case", range(len(MESHES)), ids=MESHES)
def test_on_every_mesh_the_steps_are_those_of_one_process(case: int, ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["meshes"][case] for rank in ranks)
    assert len({*first["placements"]}) == (1 if MESHES[case] == "replicated and sharded" else 2)
    model = two_layers()
    rates = three_steps(model, INPUTS)
    assert first["rates"] == second["rates"] == pytest.approx(rates, rel=BOUND)
    assert all(0 < rate < 0.3 for rate in rates)
    for mine, theirs, reference in zip(first["weights"], second["weights"], model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert (mine - reference).abs().max() < BOUND


def test_what_cannot_be_done_to_sharded_weights_is_refused_early(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "orthogonal weight of layer '0'" in rank["refusals"]["ow"]
        assert "call orthogonal_weight(layer) before fully_shard" in rank["refusals"]["ow"]
        assert "call spectral_norm(layer) before fully_shard" in rank["refusals"]["sn"]
        assert "was sharded since" in rank["refusals"]["remove once"]
        assert rank["refusals"]["remove twice"] == rank["refusals"]["remove once"]
        assert "layer '_fsdp_wrapped_module.0'" in rank["refusals"]["flattened"]
        assert "shard with torch.distributed.fsdp.fully_shard instead" in rank["refusals"]["flattened"]


def test_the_layers_of_a_sharded_model_are_found_by_running_it_too(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["example input"] == ranks[1]["example input"] == ["0"]
