"""The Hugging Face Trainer and Accelerate with treatments and monitor do what a hand-written loop does, and resume."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, cpu_offload, init_empty_weights, load_checkpoint_and_dispatch
from accelerate.state import AcceleratorState, GradientState
from accelerate.tracking import GeneralTracker, on_main_process
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import treatment_models
from treatment_models import assert_same_weights, orthogonality_gap, same, sgd, tiny_net
from wellcond.accelerate import attach_monitor, attach_treatment
from wellcond.orthogonality import orthogonal_weight, spectral_norm, treat_like
from wellcond.transformers import ConditionMonitorCallback, TreatmentCallback

LR, STEPS, BATCH = 0.05, 6, 4
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


class Model(PreTrainedModel):
    """What the Trainer asks for: keywords in, the loss among the outputs."""

    config_class = PreTrainedConfig

    def __init__(self, seed: int = 0) -> None:
        super().__init__(PreTrainedConfig())
        torch.manual_seed(seed)
        self.net = tiny_net()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"logits": logits} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps precision and accumulation for a whole process; each test sets its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Images(IterableDataset):
    """An order that no sampler changes."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(7)
        for _ in range(100):
            x = torch.randn(3, 6, 6, generator=generator)
            yield {"x": x, "labels": torch.randint(0, 2, (), generator=generator)}


def by_hand(treatments: str, *, accumulate: int = 1, **options: Any) -> Model:
    model = Model()
    data = zip(range(STEPS * accumulate), DataLoader(Images(), batch_size=BATCH), strict=False)
    losses = [lambda batch=batch: model(**batch)["loss"] for _, batch in data]
    treatment_models.by_hand(model, treatments, losses, accumulate=accumulate, **options)
    return model


# -- the Trainer --------------------------------------------------------------------------------------------------


def trainer(folder: Path, *callbacks: TrainerCallback, model: nn.Module | None = None, **options: Any) -> Trainer:
    model = model or Model()
    constant = {"max_steps": STEPS, "max_grad_norm": 0.0, "save_strategy": "no", "logging_steps": 2}
    fixed = {"per_device_train_batch_size": BATCH, "use_cpu": True, "report_to": [], "disable_tqdm": True}
    optimizer = sgd(model)
    return Trainer(
        model,
        TrainingArguments(str(folder), **{**constant, **fixed, **options}),
        train_dataset=Images(),
        callbacks=list(callbacks),
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)),
    )


@pytest.mark.parametrize(
    ("treatments", "options", "hand"),
    [
        ("nog+ow+ol+olr", {}, {}),
        ("sn+ol", {"gradient_accumulation_steps": 3}, {"accumulate": 3}),
        ("nog+olr", {"max_grad_norm": 0.1, "gradient_accumulation_steps": 2}, {"clip": 0.1, "accumulate": 2}),
    ],
)
def test_the_trainer_takes_the_steps_of_a_hand_written_loop(treatments, options, hand, tmp_path: Path) -> None:
    callback = TreatmentCallback(treatments)
    work = trainer(tmp_path, callback, **options)
    work.train()
    assert_same_weights(work.model, by_hand(treatments, **hand))
    assert list(callback.layers) == ["net.0"]
    assert "net.0" in callback.summary()


def test_the_trainer_under_autocast_is_the_hand_written_loop(tmp_path: Path) -> None:
    work = trainer(tmp_path, TreatmentCallback("ow+ol"), bf16=True)
    work.train()
    assert orthogonality_gap(work.model.net[0]) < 1e-5
    # The Trainer autocasts the loss too: eps of bfloat16, 8e-3, of gradients of order 1 in each of 6 steps of LR.
    assert_same_weights(work.model, by_hand("ow+ol", autocast=torch.bfloat16), bound=6 * LR * 8e-3)


@pytest.mark.parametrize("treatments", ["nog+ow+olr", "sn+ol+nog"])
def test_a_resumed_training_is_an_uninterrupted_one_bit_for_bit(treatments: str, tmp_path: Path) -> None:
    def callbacks(name: str) -> tuple[TreatmentCallback, ConditionMonitorCallback]:
        return TreatmentCallback(treatments), ConditionMonitorCallback(every=2, writers=tmp_path / f"{name}.csv")

    first = callbacks("straight")
    straight = trainer(tmp_path, *first, save_strategy="steps", save_steps=3)
    straight.train()
    (tmp_path / "resumed.csv").write_text((tmp_path / "straight.csv").read_text())  # of the run that was killed
    second = callbacks("resumed")
    resumed = trainer(tmp_path, *second, model=Model(seed=1))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(straight.model, resumed.model)
    assert str(first[0].treatment.state_dict()) == str(second[0].treatment.state_dict())
    assert second[1].records == first[1].records
    assert [record.step for record in second[1].records] == [0, 2, 4]
    assert (tmp_path / "resumed.csv").read_text() == (tmp_path / "straight.csv").read_text()


def test_resuming_with_other_treatments_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path / "nog", TreatmentCallback("nog"), save_strategy="steps", save_steps=3).train()
    trainer(tmp_path / "none", save_strategy="steps", save_steps=3).train()

    def resume(run: str, callback: TreatmentCallback, late: bool = False) -> None:
        work = trainer(tmp_path, *([] if late else [callback]))
        if late:  # too late to load the checkpoint's weights into treated ones
            work.add_callback(callback)
        work.train(resume_from_checkpoint=str(tmp_path / run / "checkpoint-3"))

    with pytest.raises(ValueError, match=r"a run treated with 'nog', this callback is TreatmentCallback\('nog\+olr"):
        resume("nog", TreatmentCallback("nog+olr"))
    with pytest.raises(
        ValueError, match=r"weights of net\.0 are from a run without this callback, so not treated by 'ow'"
    ):
        resume("none", TreatmentCallback("ow"))
    resume("none", TreatmentCallback("nog"))  # which needs no weight of another name
    trainer(tmp_path / "ow", TreatmentCallback("ow"), save_strategy="steps", save_steps=3).train()
    with pytest.raises(
        RuntimeError, match=r"layer 'net\.0': its weight was treated when it was saved, and is not here"
    ):
        resume("ow", TreatmentCallback("ow"), late=True)
    with pytest.raises(ValueError, match="did you mean 'nog'"):
        TreatmentCallback("nogg")
    with pytest.raises(ValueError, match="unknown treatment 'ol' in options"):
        TreatmentCallback("nog", options={"ol": {}})
    with pytest.raises(ValueError, match=r"no layer 'net\.7'"):
        trainer(tmp_path, TreatmentCallback("nog", layers="net.7"))
    normed = Model()
    nn.utils.parametrizations.weight_norm(normed.net[0])
    for _ in range(2):
        with pytest.raises(ValueError, match=r"net\.0.*remove a parametrisation such as weight norm first"):
            trainer(tmp_path, TreatmentCallback("ow", layers=["net.4", "net.0"]), model=normed)
        assert not nn.utils.parametrize.is_parametrized(normed.net[4])


def test_a_second_training_of_the_same_trainer_is_treated_once(tmp_path: Path) -> None:
    callback, monitor = TreatmentCallback("nog+ow+ol"), ConditionMonitorCallback(every=3)
    work = trainer(tmp_path, callback, monitor)
    work.train()
    work.train()
    assert callback.treatment.nog.counts()["net.0"] == {"treated": STEPS, "zero": 0, "nonfinite": 0}
    assert not work.model.net[1]._forward_pre_hooks
    another = TreatmentCallback("nog+ow")  # finds the weight treated, and leaves it so
    trainer(tmp_path, another, model=work.model).train()
    assert len(work.model.net[0].parametrizations.weight) == 1
    assert another.treatment.nog.counts()["net.0"]["treated"] == STEPS


class Reporter(TrainerCallback):
    """As those of TensorBoard, W&B and MLflow, which the Trainer puts before the callbacks that it is given."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.seen.append(dict(logs))


def test_rates_and_condition_numbers_are_logged_with_the_loss(tmp_path: Path) -> None:
    reporter, heard = Reporter(), []
    work = trainer(tmp_path, reporter)
    treatment = TreatmentCallback("nog+olr").add_to(work)
    monitor = ConditionMonitorCallback(every=1, kappa_above=1.0, on_alarm=lambda record, reason: heard.append(reason))
    monitor.add_to(work)
    work.train()
    lines = [line for line in work.state.log_history if "loss" in line]
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line, seen in zip(lines, reporter.seen, strict=False):
        record = monitor.records[line["step"] - 1]  # of the step that was finished last
        assert line["condition/net.1/kappa"] == line["kappa"] == record.kappa == seen["kappa"]
        assert line["condition/net.1/numerical_rank"] == seen["condition/net.1/numerical_rank"] == 6
        assert 0 < line["rate/net.0"] == seen["rate/net.0"] <= LR
    assert lines[-1]["rate/net.0"] == treatment.treatment.rates()["net.0"].item()
    assert "kappa" not in work.state.log_history[-1]  # the line that sums up
    assert len(heard) == len(monitor.records) == STEPS
    assert all(math.isfinite(record.kappa) for record in monitor.records)


# -- Accelerate ---------------------------------------------------------------------------------------------------


class Tracker(GeneralTracker):
    """In memory, as TensorBoard's and W&B's."""

    name, requires_logging_directory = "memory", False

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int | None, dict[str, float]]] = []

    @property
    def tracker(self) -> list[Any]:
        return self.lines

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        pass

    @on_main_process
    def log(self, values: dict[str, float], step: int | None = None, **kwargs: Any) -> None:
        self.lines.append((step, dict(values)))


def accelerated(treatments: str, steps: int = STEPS, *, load: Path | None = None, save: Path | None = None, **options):
    tracker = Tracker()
    accelerator = Accelerator(cpu=True, log_with=[tracker], **options)
    accelerator.init_trackers("test")
    model = Model(seed=0 if load is None else 1)
    model, optimizer, loader = accelerator.prepare(model, sgd(model), DataLoader(Images(), batch_size=BATCH))
    treatment = attach_treatment(accelerator, model, optimizer, treatments)
    monitor = attach_monitor(accelerator, model, optimizer, every=2)
    if load is not None:
        accelerator.load_state(str(load))
        loader = accelerator.skip_first_batches(loader, monitor.step)
    for batch in loader:
        if monitor.step == steps:
            break
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch)["loss"] + treatment.loss())
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
        if save is not None and monitor.step == steps // 2:
            accelerator.save_state(str(save))
            save = None
    monitor.close()
    return accelerator.unwrap_model(model), treatment, monitor, tracker.lines


def test_accelerate_takes_the_steps_of_a_hand_written_loop() -> None:
    model, treatment, monitor, lines = accelerated("nog+ow+ol+olr", gradient_accumulation_steps=3)
    assert_same_weights(model, by_hand("nog+ow+ol+olr", accumulate=3, clip=0.1))
    assert list(treatment.layers) == ["net.0"]
    assert treatment.nog.counts()["net.0"]["treated"] == monitor.step == STEPS
    assert [record.step for record in monitor.records] == [0, 2, 4]
    assert [(step, line["condition/net.1/kappa"]) for step, line in lines] == [
        (record.step, record.kappa) for record in monitor.records
    ]


def test_accelerate_in_mixed_precision_keeps_the_weight_orthogonal() -> None:
    model, *_ = accelerated("ow+nog", mixed_precision="bf16")
    assert orthogonality_gap(model.net[0]) < 1e-5


def test_a_loaded_state_goes_on_bit_for_bit(tmp_path: Path) -> None:
    straight, treatment, monitor, _ = accelerated("nog+ow+olr", save=tmp_path / "half")
    resumed, loaded, reloaded, _ = accelerated("nog+ow+olr", load=tmp_path / "half")
    assert same(straight, resumed)
    assert str(treatment.state_dict()) == str(loaded.state_dict())
    assert monitor.records == reloaded.records


# -- checkpoints --------------------------------------------------------------------------------------------------


def test_two_callbacks_of_a_kind_each_resume_their_own_state(tmp_path: Path) -> None:
    def callbacks() -> list[TrainerCallback]:
        first = [TreatmentCallback("nog", layers="net.0"), TreatmentCallback("nog", layers="net.4")]
        return [*first, ConditionMonitorCallback(every=2), ConditionMonitorCallback(every=3)]

    straight, resumed = callbacks(), callbacks()
    trainer(tmp_path, *straight, save_strategy="steps", save_steps=2).train()
    trainer(tmp_path, *resumed, model=Model(seed=1)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for one, other in zip(straight, resumed, strict=True):
        assert one.state() == other.state()
    assert [len(callback.records) for callback in resumed[2:]] == [3, 2]
    with pytest.raises(ValueError, match=r"several TreatmentCallbacks, but none for this one .*'layers': None"):
        trainer(tmp_path, TreatmentCallback("nog")).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


class Treated(Model):
    """Treated where it is made, as ``from_pretrained`` wants it."""

    treatment = staticmethod(orthogonal_weight)

    def __init__(self, config: PreTrainedConfig | None = None) -> None:
        super().__init__()
        self.treatment(self.net[0])
        self.post_init()


class Normed(Treated):
    treatment = staticmethod(spectral_norm)


@pytest.mark.parametrize("kind", [Treated, Normed])
def test_a_model_that_is_treated_where_it_is_made_comes_back_from_pretrained(kind: type[Treated], tmp_path) -> None:
    model = kind()
    x = torch.randn(8, 3, 6, 6)
    model(x)
    with torch.no_grad():
        model.net[0].parametrizations.weight.original.add_(torch.randn(6, 3, 3, 3))
    model.save_pretrained(tmp_path)
    back, report = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(back.eval()(x)["logits"], model.eval()(x)["logits"])


@pytest.mark.parametrize("empty", [True, False])
def test_accelerate_loads_it_entry_by_entry(empty: bool, tmp_path: Path) -> None:
    def make() -> nn.Module:
        net = tiny_net()
        orthogonal_weight(net[0], map="cayley")
        return net

    saved, x = make(), torch.randn(8, 3, 6, 6)
    saved(x)
    save_file(saved.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    with init_empty_weights() if empty else nullcontext():
        model = make()
    load_checkpoint_and_dispatch(model, str(tmp_path / "model.safetensors"), device_map={"": "cpu"})
    assert torch.equal(model.eval()(x), saved.eval()(x))
    assert same(model, saved)


@pytest.mark.parametrize("name", ["exp", "cayley", "householder"])
def test_accelerate_loads_it_in_half_precision(name: str, tmp_path: Path) -> None:
    saved = nn.Sequential(orthogonal_weight(nn.Linear(12, 9), map=name))
    save_file(saved.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    model = nn.Sequential(orthogonal_weight(nn.Linear(12, 9), map=name))
    file = str(tmp_path / "model.safetensors")
    load_checkpoint_and_dispatch(model, file, device_map={"": "cpu"}, dtype=torch.bfloat16)
    x, eps = torch.randn(4, 12, dtype=torch.bfloat16), torch.finfo(torch.bfloat16).eps
    assert orthogonality_gap(model[0]) < 2 * eps * 9**0.5
    torch.testing.assert_close(model(x), saved.to(torch.bfloat16)(x), rtol=8 * eps, atol=8 * eps)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["soc", "exp"])
def test_offloaded_by_accelerate_it_computes_the_same(name: str, bias: bool) -> None:
    model = nn.Sequential(orthogonal_weight(nn.Conv2d(8, 8, 3, padding=1, bias=bias), map=name)).eval()
    x = torch.randn(2, 8, 5, 5)
    expected = model(x)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model[0].parametrizations.weight.original.is_meta
    for _ in range(2):
        assert torch.equal(model(x), expected)
    assert not model[0].parametrizations.weight[0]._forward_pre_hooks


def test_what_from_pretrained_leaves_out_is_said_once_when_it_is_saved(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    with pytest.warns(UserWarning, match=r"from_pretrained will leave net\.0 at random.*treat_like") as said:
        trainer(tmp_path, TreatmentCallback("ow+nog"), **saving).train()
    assert len([w for w in said if "from_pretrained" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="from_pretrained")
        trainer(tmp_path, TreatmentCallback("nog"), **saving).train()
        trainer(
            tmp_path, TreatmentCallback("ow"), model=Treated(), **saving
        ).train()  # which is treated where it is made


def test_a_treated_model_is_loaded_into_a_plain_one_by_its_file(tmp_path: Path) -> None:
    model = Treated()
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    plain = Model(seed=1)
    with pytest.raises(RuntimeError, match="treat_like"):
        plain.load_state_dict(state)
    plain.load_state_dict(treat_like(plain, state))
    assert same(plain, model)


@pytest.mark.parametrize("callback", [TreatmentCallback("nog"), ConditionMonitorCallback(every=1)])
def test_callbacks_that_the_trainer_would_make_anew_without_their_options_are_refused(
    tmp_path: Path, callback: TrainerCallback
) -> None:
    folder = str(tmp_path)
    args = {"output_dir": folder, "max_steps": 2, "save_steps": 1, "report_to": [], "use_cpu": True}
    Trainer(Model(), TrainingArguments(**args), train_dataset=Images(), callbacks=[callback]).train()
    args["restore_callback_states_from_checkpoint"] = True
    again = Trainer(Model(), TrainingArguments(**args), train_dataset=Images(), callbacks=[callback])
    with pytest.raises(ValueError, match="restore_callback_states_from_checkpoint"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
