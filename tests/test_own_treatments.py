"""A treatment written outside the package is one class: treat, the callbacks, their states and the command know it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from lightning_task import QUIET, Task, fit, loader
from test_huggingface import STEPS, _fresh_accelerator, trainer
from treatment_models import batches, same, sgd, small_net, train
from wellcond.cli import app
from wellcond.lightning import TreatmentCallback
from wellcond.orthogonality import (
    TREATMENTS,
    LossTreatment,
    StepTreatment,
    WeightTreatment,
    _registry,
    parse_treatments,
    treat,
    treat_like,
)
from wellcond.transformers import TreatmentCallback as TrainerTreatmentCallback

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")]
assert _fresh_accelerator  # a fixture


def rows_of(weight: Tensor) -> Tensor:
    return weight.detach().flatten(1)


def define() -> None:
    """What a stranger writes: one class each, for the step, the weight and the loss."""

    class GradientCentralisation(StepTreatment, name="gc", about="gradient centralisation (Yong et al., ECCV 2020)"):
        treatment = "gradient centralisation"

        def __init__(self, optimizer, params, *, factor=1.0):
            super().__init__(optimizer, params)
            self.factor, self.steps = factor, 0

        def before(self, target, group):
            gradient = target.view.matrix(target.parameter.grad)
            centred = gradient - self.factor * gradient.mean(-1, keepdim=True)
            target.parameter.grad.copy_(target.view.tensor(centred, target.parameter.shape))
            self.steps += 1

        def scalars(self):
            return {f"steps/{target.name}": torch.tensor(self.steps) for target in self.targets}

        def state_dict(self):
            return {"steps": self.steps}

        def load_state_dict(self, state):
            self.steps = state["steps"]

    class CentredWeight(WeightTreatment, name="cw", about="weights of zero mean"):
        treatment = "centred weight"

        def forward(self, stored):
            matrix = self.view.matrix(stored)
            return self.view.tensor(matrix - matrix.mean(-1, keepdim=True), stored.shape)

    class SquaredWeight(LossTreatment, name="l2", about="sum of squares"):
        treatment = "squared weight"

        def term(self, W):
            return W.square().sum()


@pytest.fixture(autouse=True)
def _own() -> Iterator[None]:
    names, classes = dict(TREATMENTS), dict(_registry._classes)
    define()
    yield
    for registered, before in ((TREATMENTS, names), (_registry._classes, classes)):
        registered.clear()
        registered.update(before)


def test_treat_puts_them_on_logs_them_and_takes_them_off() -> None:
    model = small_net()
    before, optimizer = copy.deepcopy(model), torch.optim.SGD(model.parameters(), lr=1.0)
    treatment = treat(model, optimizer, "gc+cw+l2", options={"gc": {"factor": 1.0}})
    assert treatment.summary().splitlines()[2].endswith("gc (factor=1.0), cw, l2")
    assert treatment.loss().item() == pytest.approx(model[0].weight.square().sum().item())
    assert rows_of(model[0].weight).mean(1).abs().max() < 1e-7
    stored = model[0].parametrizations.weight.original
    start = rows_of(stored).clone()
    train(model, optimizer, batches(1), lambda: (stored * 3).sum())  # a gradient of mean 3 and some more
    moved = start - rows_of(stored)
    assert moved.mean(1).abs().max() < 1e-6 < moved.abs().max()
    assert {name: int(value) for name, value in treatment.scalars().items()} == {"steps/0": 1}
    with pytest.raises(ValueError, match=r"gradient centralisation of layer '0' .* is already on"):
        treat(model, optimizer, "gc")
    for name, message in (("cw", "already has the parametrisation CentredWeight"), ("l2", "'l2' .* already on")):
        with pytest.raises(ValueError, match=message):
            treat(model, optimizer, name)
    treatment.remove()
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    assert treatment.gc is treatment.l2 is None
    start = rows_of(model[0].weight).clone()
    train(model, optimizer, batches(1), lambda: (model[0].weight * 3).sum())
    assert (start - rows_of(model[0].weight)).mean(1).min() > 1  # the optimizer's own step again


def test_a_state_says_under_which_of_them_it_was_saved() -> None:
    model, fresh, other = small_net(), small_net(), small_net()
    treat(model, sgd(model), "cw")
    state = copy.deepcopy(model.state_dict())
    fresh.load_state_dict(treat_like(fresh, state))
    assert same(fresh, model)
    assert rows_of(fresh[0].weight).mean(1).abs().max() < 1e-7
    treat(other, sgd(other), "sn")
    with pytest.raises(RuntimeError, match=r"it was saved under 'cw', and is under 'sn' \(of='weight'\) here"):
        other.load_state_dict(state)


def test_options_of_any_kind_are_compared_by_what_is_the_same_in_every_process() -> None:
    class Scaled(WeightTreatment, name="scaled"):
        treatment = "scaled weight"

        def __init__(self, target, *, by=1.0, shape=(1, 2), of=rows_of, **more):
            super().__init__(target)
            self.by = by

        def forward(self, stored):
            return stored * self.by

    layers = [torch.nn.Linear(3, 2) for _ in range(3)]
    for layer, options in zip(layers, ({}, {"by": 1.0, "shape": [1, 2]}, {"by": 2.0, "note": "x"}), strict=True):
        Scaled.put_on(layer, **options)
    state = layers[0].state_dict()
    assert "0x" not in bytes(state["parametrizations.weight.0._extra_state"].int().tolist()).decode()
    layers[1].load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"'scaled' \(by=1\.0, of='rows_of'.* under 'scaled' \(by=2\.0, note='x'"):
        layers[2].load_state_dict(state)


def test_they_join_with_ours_and_resume() -> None:
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        model = small_net()
        optimizer = sgd(model)
        runs.append((model, optimizer, treat(model, optimizer, "gc+olr+cw")))
    for part in runs[0], runs[1]:
        train(part[0], part[1], batches(2))
        if part is runs[0]:
            states = [copy.deepcopy(p.state_dict()) for p in part]
    with torch.no_grad():
        runs[1][0][3].weight.zero_()
    for part, state in zip(runs[1], states, strict=True):
        part.load_state_dict(state)
    for model, optimizer, _ in runs:
        train(model, optimizer, batches(2, seed=1))
    assert same(runs[0][0], runs[1][0])
    assert runs[0][2].gc.steps == runs[1][2].gc.steps == 4
    assert list(runs[0][2].scalars()) == ["steps/0", "rate/0"]


def test_the_lightning_callback_knows_them(tmp_path) -> None:
    first, callback = TreatmentCallback("gc+cw"), TreatmentCallback("gc+cw")
    fit(Task(), first, max_epochs=1).save_checkpoint(tmp_path / "one.ckpt")
    task = Task()
    run = fit(task, callback, ckpt=tmp_path / "one.ckpt")
    assert rows_of(task.net[0].weight).mean(1).abs().max() < 1e-7
    assert run.logged_metrics["steps/net.0"] == 2 * len(loader())
    assert "net.0: cw" in callback.summary() and "gc" in callback.summary()


def test_the_trainers_callback_knows_them(tmp_path) -> None:
    callback = TrainerTreatmentCallback("gc+l2+cw", options={"gc": {"factor": 0.5}})
    work = trainer(tmp_path, callback, save_strategy="steps", save_steps=3)
    work.train()
    assert rows_of(work.model.net[0].weight).mean(1).abs().max() < 1e-7
    lines = [line for line in work.state.log_history if "loss" in line]
    assert lines[-1]["steps/net.0"] == STEPS
    again = TrainerTreatmentCallback("gc+l2+cw")
    trainer(tmp_path, again).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.treatment.gc.steps == STEPS


def test_the_command_knows_them(tmp_path) -> None:
    small = ["--limit", "130", "--width", "8", "--batch-size", "32", "--epochs", "1", "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(app, ["train", *small, "--treat", "gc+nog"])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "run" / "result.json").read_text())["config"]["treat"] == "gc+nog"


def test_those_of_an_installed_package_are_loaded_when_they_are_asked_for(monkeypatch) -> None:
    loaded: list[Any] = []

    class Entry:
        def load(self) -> None:
            loaded.append(type("Sixth", (StepTreatment,), {}, name="sixth", about="of an installed package"))

    monkeypatch.setattr(_registry, "entry_points", lambda group: [Entry()] if group == "wellcond.treatments" else [])
    assert parse_treatments("nog+ow") and not loaded
    assert parse_treatments("sixth+nog") == ("sixth", "nog") and len(loaded) == 1


@pytest.mark.parametrize(
    ("name", "message"), [("nog", "NearestOrthogonalGradient already"), ("A", "lower case"), ("a+b", "without '\\+'")]
)
def test_names_that_are_taken_or_cannot_be_written_are_refused(name, message) -> None:
    before = dict(TREATMENTS)
    with pytest.raises(ValueError, match=message):
        type("Own", (StepTreatment,), {}, name=name, about="")
    assert before == TREATMENTS
