"""The Trainer and Accelerate in two processes: the steps of one process with the joined batch, and one that writes.

In float64, as in ``test_several_processes``: halves differ from the whole by eps64, which the polar factor magnifies by
its condition number, below 1e5 here, and the steps add up; float32 anywhere on the way (1e-7) would be noticed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments

from group_work import leave
from treatment_models import sgd, tiny_net
from wellcond.accelerate import attach_monitor, attach_treatment
from wellcond.transformers import ConditionMonitorCallback, TreatmentCallback

STEPS, BATCH, BOUND = 5, 8, 1e-9
TRAINER_TREATMENTS = ["nog+olr", "nog+ow+olr+ol"]
ACCELERATE_TREATMENTS = "nog+ow+olr"


class Model(PreTrainedModel):
    """Its norm takes the statistics of both processes, so that two halves of a batch are the batch."""

    config_class = PreTrainedConfig

    def __init__(self) -> None:
        super().__init__(PreTrainedConfig())
        torch.manual_seed(0)
        self.net = tiny_net(sync=True).double()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.cross_entropy(self.net(x), labels)}


class Images(Dataset):
    def __len__(self) -> int:
        return STEPS * BATCH

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        x = torch.randn(3, 6, 6, dtype=torch.float64, generator=generator)
        return {"x": x, "labels": torch.tensor(index % 2)}


def trained(folder: Path, treatments: str, rank: int, size: int) -> dict[str, Any]:
    model = Model()
    optimizer = sgd(model)
    treatment = TreatmentCallback(treatments)
    monitor = ConditionMonitorCallback(every=2, writers=folder / f"{treatments}-{rank}-of-{size}.csv")
    arguments = TrainingArguments(
        str(folder / f"run-{size}"),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH // size,
        max_grad_norm=0.5,
        use_cpu=True,
        ddp_backend="gloo" if size > 1 else None,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
    )
    work = Trainer(
        model,
        arguments,
        train_dataset=Images(),
        callbacks=[treatment, monitor],
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)),
    )
    work.train()
    return {
        "processes": work.args.world_size,
        "weights": {name: value.detach() for name, value in model.named_parameters()},
        "statistics": dict(model.named_buffers()),
        "rates": [line["rate/net.0"] for line in work.state.log_history if "rate/net.0" in line],
        "counts": treatment.treatment.nog.counts(),
        "steps": [record.step for record in monitor.records],
    }


def accelerated(folder: Path, rank: int, size: int) -> dict[str, Any]:
    accelerator = Accelerator(cpu=True)
    model = Model()
    # No shuffling: the processes take batches of half the size in turn, which are the two halves of a whole one.
    loader = DataLoader(Images(), batch_size=BATCH // size)
    model, optimizer, loader = accelerator.prepare(model, sgd(model), loader)
    treatment = attach_treatment(accelerator, model, optimizer, ACCELERATE_TREATMENTS)
    monitor = attach_monitor(accelerator, model, optimizer, every=2, writers=folder / f"own-{rank}-of-{size}.jsonl")
    for batch in loader:
        accelerator.backward(model(**batch)["loss"])
        optimizer.step()
        optimizer.zero_grad()
    monitor.close()
    bare = accelerator.unwrap_model(model)
    return {
        "processes": accelerator.num_processes,
        "weights": {name: value.detach() for name, value in bare.named_parameters()},
        "statistics": dict(bare.named_buffers()),
        "rates": [float(rate) for rate in treatment.rates().values()],
        "counts": treatment.nog.counts(),
        "steps": [record.step for record in monitor.records],
    }


def fresh() -> None:
    """Accelerate keeps how it runs for a whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def everything(folder: Path, rank: int = 0, size: int = 1) -> dict[str, dict[str, Any]]:
    found = {}
    for treatments in TRAINER_TREATMENTS:
        found[treatments] = trained(folder, treatments, rank, size)
        if size == 1:
            fresh()
    found["accelerate"] = accelerated(folder, rank, size)
    if size == 1:
        fresh()
    return found


def work(rank: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.save(everything(Path(folder), rank, 2), f"{folder}/{rank}.pt")
    leave()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]], dict[str, Any]]:
    """The folder, what both processes found in one start, and what one process finds."""
    from torch.distributed.elastic.utils.distributed import get_free_port

    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(work, (str(folder), get_free_port()), nprocs=2)
    ranks = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]
    fresh()
    return folder, ranks, everything(folder)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("case", [*TRAINER_TREATMENTS, "accelerate"])
def test_two_processes_take_the_steps_of_one(case: str, found: Any) -> None:
    folder, ranks, alone = found
    first, second = (rank[case] for rank in ranks)
    reference = alone[case]
    assert first["processes"] == second["processes"] == 2 and reference["processes"] == 1
    for kind in ("weights", "statistics"):
        assert [*first[kind]] == [*reference[kind]]
        for name, value in first[kind].items():
            if name.endswith("evaluation_whitening"):
                continue  # derived, and renewed by eval() only
            assert torch.equal(value, second[kind][name]), name
            assert (value - reference[kind][name]).abs().max() < BOUND, name
    assert first["rates"] == second["rates"] == pytest.approx(reference["rates"], rel=BOUND)
    assert first["counts"] == reference["counts"] == {"net.0": {"treated": STEPS, "zero": 0, "nonfinite": 0}}
    assert first["steps"] == reference["steps"] == [0, 2, 4]
    # One file in each case, of the first process.
    name, ending = ("own", "jsonl") if case == "accelerate" else (case, "csv")
    assert sorted(path.name for path in folder.glob(f"{name}-*-of-2.*")) == [f"{name}-0-of-2.{ending}"]
