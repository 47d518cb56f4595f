"""Treatments in the loops that people have: scaled, accumulated and clipped gradients, averages, compiled, resumed."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from treatment_models import batches, orthogonality_gap, polar_reference, same, small_net
from wellcond.orthogonality import Treatment, treat

ALL = "ow+ol+nog+olr"
OPTIONS = {"ow": {"map": "cayley"}}  # whose backward pass is linear in the gradient to the last bit
Loop = tuple[nn.Module, torch.optim.Optimizer, Treatment]


def loop(names: str = ALL, *, seed: int = 0, adam: bool = False, dtype: torch.dtype = torch.float32, **options) -> Loop:
    torch.manual_seed(seed)
    model = small_net(bias=False).to(dtype)  # the gradient of a bias before whitening is rounding, which Adam magnifies
    kind: Any = torch.optim.AdamW if adam else torch.optim.SGD
    optimizer = kind(model.parameters(), lr=0.05, **({} if adam else {"momentum": 0.9}), **options)
    return model, optimizer, treat(model, optimizer, names, options=OPTIONS if "ow" in names else {})


def loss(model: nn.Module, treatment: Treatment, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(x.to(next(model.parameters()).dtype)).float(), y) + treatment.loss()


def run(parts: Loop, data: Any, scaler: Any = None, schedule: Any = None, forward: Any = None) -> None:
    model, optimizer, treatment = parts
    for x, y in data:
        optimizer.zero_grad()
        value = loss(forward or model, treatment, x, y)
        if scaler is None:
            value.backward()
            optimizer.step()
        else:
            scaler.scale(value).backward()
            scaler.step(optimizer)
            scaler.update()
        if schedule is not None:
            schedule.step()


# -- scaled gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("adam", [False, True])
def test_scaled_gradients_change_no_bit(fused: bool, adam: bool) -> None:
    """The scale is a power of two, so float32 keeps every digit."""
    plain, scaled = loop(adam=adam, fused=fused), loop(adam=adam, fused=fused)
    run(plain, batches(4))
    run(scaled, batches(4), torch.amp.GradScaler("cpu", init_scale=2.0**12))
    if fused:  # which divides by the scale inside its own kernel: eps32 a step, times the polar factor's condition
        for one, other in zip(plain[0].parameters(), scaled[0].parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
    else:
        assert same(plain[0], scaled[0])
        assert str(plain[2].state_dict()) == str(scaled[2].state_dict())


@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_leaves_weights_untouched(fused: bool) -> None:
    parts = loop("nog+olr", fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    run(parts, batches(1), scaler)
    before = {name: value.clone() for name, value in parts[0].named_parameters()}
    x, y = batches(1)[0]
    parts[1].zero_grad()
    scaler.scale(loss(parts[0], parts[2], x, y)).backward()
    parts[0][0].weight.grad[0] = float("inf")
    scaler.step(parts[1])
    scaler.update()
    assert scaler.get_scale() == 2.0**11
    assert all(torch.equal(value, before[name]) for name, value in parts[0].named_parameters())


@pytest.mark.parametrize("treatment", ["nog", "olr"])
def test_an_overflow_that_a_fused_optimizer_skips_is_no_update_to_treat(treatment: str) -> None:
    """AdamW then skips its weight decay too: what is left of it must not be taken for an update."""
    torch.manual_seed(0)
    model = small_net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1, fused=True)
    place = {"nog": {"on": "update"}, "olr": {"direction": "update"}}[treatment]
    treat(model, optimizer, treatment, options={treatment: place})
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    x, y = batches(1)[0]
    scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
    model[3].weight.grad[0, 0] = float("inf")  # not in the treated layer
    before = {name: value.clone() for name, value in model.named_parameters()}
    scaler.step(optimizer)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


# -- accumulated and clipped gradients ----------------------------------------------------------------------------


def test_accumulated_batches_are_the_joined_batch() -> None:
    joined, parted = loop(), loop()
    for model, *_ in (joined, parted):
        model.double().eval()  # statistics of the batch would differ; float64 so that the bound below is sharp
    data = [(x.double(), y) for x, y in batches(4)]
    run(joined, data)
    model, optimizer, treatment = parted
    for x, y in data:
        optimizer.zero_grad()
        for part in range(4):
            (loss(model, treatment, x.chunk(4)[part], y.chunk(4)[part]) / 4).backward()
        optimizer.step()
    for one, other in zip(joined[0].parameters(), parted[0].parameters(), strict=True):
        # eps64 in every sum, times the condition number of the polar factors (below 1e5), over four steps
        assert (one - other).abs().max() < 1e-9


@pytest.mark.parametrize("clip", [1e-3, 1e3])
def test_clipping_before_the_step_clips_the_other_layers_only(clip: float) -> None:
    torch.manual_seed(0)
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    treat(model, optimizer, "nog")
    x, y = batches(1)[0]
    nn.functional.cross_entropy(model(x), y).backward()
    before = [p.detach().clone() for p in model.parameters()]
    expected = [p.grad.clone() for p in model.parameters()]
    norm = torch.stack([g.square().sum() for g in expected]).sum().sqrt()
    expected = [g * min(1.0, clip / norm.item()) for g in expected]
    expected[0] = polar_reference(model[0], model[0].weight.grad).float()
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    for p, start, step in zip(model.parameters(), before, expected, strict=True):
        # Clipping multiplies by clip/(norm + 1e-6): 1e-6 relative, and eps32·κ = 1e-5 in the polar factor.
        torch.testing.assert_close(start - p, step, rtol=1e-4, atol=1e-5)


# -- averages, compiled models ------------------------------------------------------------------------------------


def test_an_average_of_treated_weights_is_orthogonal_and_can_be_saved(tmp_path: Path) -> None:
    parts = loop()
    average = AveragedModel(parts[0], multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for data in batches(20):
        run(parts, [data])
        average.update_parameters(parts[0])
    assert orthogonality_gap(average.module[0]) < 1e-6  # the stored tensors are averaged, and mapped afterwards
    assert not same(average.module, parts[0])
    torch.save(average.state_dict(), tmp_path / "average.pt")
    loaded = AveragedModel(loop(seed=1)[0], use_buffers=True)
    loaded.load_state_dict(torch.load(tmp_path / "average.pt", weights_only=True))
    x = batches(1)[0][0]
    assert torch.equal(loaded.eval()(x), average.eval()(x))


@pytest.mark.parametrize("first", ["treat", "compile"])
def test_the_order_of_treating_and_compiling_does_not_matter(first: str) -> None:
    plain = loop()
    torch.manual_seed(0)
    model = small_net(bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    if first == "treat":
        treatment = treat(model, optimizer, ALL, options=OPTIONS)
        compiled = torch.compile(model, backend="aot_eager")
    else:
        compiled = torch.compile(model, backend="aot_eager")
        treatment = treat(compiled, optimizer, ALL, options=OPTIONS)
    run(plain, batches(3))
    run((model, optimizer, treatment), batches(3), forward=compiled)
    assert orthogonality_gap(model[0]) < 1e-6
    for one, other in zip(plain[0].parameters(), model.parameters(), strict=True):
        # The same operations in another order: eps32, magnified by the polar factor's condition number.
        assert torch.allclose(one, other, rtol=0, atol=1e-4)


# -- resumed ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "adam", "dtype"),
    [
        *itertools.product(["nog+ow+olr", "sn+ol+nog", "nog+olr+sn"], [False, True], [torch.float32]),
        ("ow+nog", False, torch.bfloat16),
        ("ow+olr", False, torch.float16),
    ],
)
def test_a_checkpoint_holds_all_that_the_next_step_depends_on(names, adam, dtype, tmp_path: Path) -> None:
    """Weights, optimizer, scaler, schedule and treatment, through a file that runs no code; then not a bit differs."""

    def start(seed: int) -> tuple[Loop, Any, Any]:
        parts = loop(names, seed=seed, adam=adam, dtype=dtype)
        schedule = torch.optim.lr_scheduler.OneCycleLR(parts[1], 0.1, total_steps=8)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2) if dtype == torch.float32 else None
        return parts, scaler, schedule

    def save(parts: Loop, scaler: Any, schedule: Any) -> None:
        states = [part.state_dict() for part in (*parts, schedule, *([] if scaler is None else [scaler]))]
        torch.save(states, tmp_path / "checkpoint.pt")

    straight, resumed = start(0), start(1)
    run(straight[0], batches(3), *straight[1:])
    save(*straight)
    gap = orthogonality_gap(straight[0][0][0]) if "ow" in names else 0.0
    parts, scaler, schedule = resumed
    states = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    for part, state in zip((*parts, schedule, *([] if scaler is None else [scaler])), states, strict=True):
        part.load_state_dict(state)
    if "ow" in names:
        assert orthogonality_gap(parts[0][0]) == gap < 4 * torch.finfo(dtype).eps * 27**0.5  # no drift by loading
    run(straight[0], batches(4, seed=1), *straight[1:])
    run(parts, batches(4, seed=1), scaler, schedule)
    assert same(straight[0][0], parts[0])
    assert str(straight[0][2].state_dict()) == str(parts[2].state_dict())
