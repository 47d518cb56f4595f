"""How far the weight before a watched layer turns in one step: measured right, kept over a resume, and said."""

from __future__ import annotations

import copy
import csv
import itertools
import math
import warnings

import pytest
import torch
from torch import nn

from treatment_models import batches, sgd, small_net, train
from wellcond.experiments.run.models import build_model
from wellcond.monitor import ConditionMonitor, ConditionRecord, CSVWriter, JSONLinesWriter
from wellcond.monitor._record import FIELDS
from wellcond.nn import SkewOrthogonalConv2d
from wellcond.orthogonality import orthogonal_weight, pre_spectral_layers, treat

TREATMENTS = {"plain": "", "exp": "ow", "exp and steps": "nog+ow+olr", "soc": "nog+ow+olr", "sn": "sn"}


def watched(name: str, every: int, steps: int, count: bool = True) -> tuple[ConditionMonitor, list[float]]:
    """The monitor of a training, and the rotation of the weight in use in every step of it, by hand."""
    torch.manual_seed(0)
    model = small_net(padding=1)
    optimizer = sgd(model)
    monitor = ConditionMonitor(model, every=every, optimizer=optimizer if count else None)  # before the treatments
    if TREATMENTS[name]:
        options = {"ow": {"map": "soc"}} if name == "soc" else None
        treat(model, optimizer, TREATMENTS[name], options=options)
    turned = []
    for batch in batches(steps):
        before = model[0].weight.detach().double()
        train(model, optimizer, [batch])
        turned.append(((model[0].weight.detach() - before).norm() / before.norm()).item())
    return monitor, turned


@pytest.mark.parametrize("count", [True, False], ids=["steps of the optimizer", "forward passes"])
@pytest.mark.parametrize("name", TREATMENTS)
def test_it_is_the_relative_move_of_the_weight_in_use_in_the_step_before_the_record(name, count):
    monitor, turned = watched(name, every=3, steps=8, count=count)
    assert [record.step for record in monitor.records] == [0, 3, 6]
    assert monitor.records[0].rotation == 0
    # Norms of float32 weights, whose difference is known to eps32 of the weight itself.
    assert [r.rotation for r in monitor.records[1:]] == pytest.approx([turned[2], turned[5]], rel=1e-4, abs=1e-7)
    assert monitor.statistics()["1"]["rotation"] == pytest.approx((turned[2] + turned[5]) / 2, rel=1e-4)
    assert monitor.records[-1].scalars()["condition/1/rotation"] == monitor.records[-1].rotation


def test_every_step_can_be_recorded():
    monitor, turned = watched("exp", every=1, steps=5)
    assert [r.rotation for r in monitor.records[1:]] == pytest.approx(turned[:-1], rel=1e-4)


@pytest.mark.parametrize("every", [3, 4])
def test_it_goes_on_over_a_resume_as_if_it_had_not_stopped(every, tmp_path):
    """After the fourth step: in the middle of a block, and when the move before the next record has been made."""

    def part(model, optimizer, monitor, data):
        for batch in data:
            train(model, optimizer, [batch])
        return monitor.state_dict()

    def begin(name):
        torch.manual_seed(0)
        model = small_net()
        optimizer = sgd(model)
        treat(model, optimizer, "nog+ow+olr")
        path = tmp_path / f"{name}.csv"
        return model, optimizer, ConditionMonitor(model, every=every, optimizer=optimizer, writers=path)

    data = batches(9)
    whole = begin("whole")
    part(*whole, data)
    first, second = begin("parts"), begin("parts")
    state = copy.deepcopy(part(*first, data[:4]))
    torch.save(state, tmp_path / "state.pt")
    for mine, theirs in zip(second[:2], first[:2], strict=True):
        mine.load_state_dict(copy.deepcopy(theirs.state_dict()))
    second[2].load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    part(*second, data[4:])
    assert (tmp_path / "whole.csv").read_text() == (tmp_path / "parts.csv").read_text()
    assert [r.rotation > 0 for r in second[2].records] == [False] + [True] * (len(second[2].records) - 1)


def test_the_weights_before_any_layer_are_found_and_each_layer_has_its_own():
    model = build_model("resnet8", num_classes=4, norm="zca", head="gcp", width=8)
    names = [name for name, m in model.named_modules() if getattr(m, "is_spectral_layer", False)]
    monitor = ConditionMonitor(model, every=1, layers=[*names, "stage1.0.bn2"])
    found = {name: list(turning.layers) for name, turning in monitor._turning.items()}
    assert found["norm1"] == ["conv1"] and found["stage1.0.bn2"] == ["stage1.0.conv2"]
    assert {one for name in names for one in found[name]} == set(pre_spectral_layers(model))
    part = nn.Module()  # without a forward function, as the LightningModule of a run
    part.model = model
    monitor = ConditionMonitor(part, layers=["model.norm1"])
    assert list(monitor._turning["model.norm1"].layers) == ["model.conv1"]


class Untraceable(nn.Module):
    """Its forward function needs a number of the data."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(4, 3), nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(self.first(x) * float(x.sum()))


def test_where_nothing_is_known_it_is_nan_and_nothing_else_changes():
    model = Untraceable()
    monitor = ConditionMonitor(model, every=1, layers=["norm"])
    for _ in range(3):
        model(torch.randn(8, 4))
    assert len(monitor.records) == 3 and all(math.isnan(record.rotation) for record in monitor.records)
    assert "condition/norm/rotation" not in monitor.records[0].scalars()
    twin = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)), nn.BatchNorm1d(3))
    other = copy.deepcopy(twin)
    with ConditionMonitor(other, every=1, layers=["1"]) as watched_:
        for layers in (twin, other):
            torch.manual_seed(0)
            for _ in range(3):
                layers(torch.randn(8, 4))
    # Looking at the weight would have been a step of its power iteration.
    assert all(torch.equal(a, b) for a, b in zip(twin.state_dict().values(), other.state_dict().values(), strict=True))
    assert all(math.isnan(record.rotation) for record in watched_.records[1:])
    assert math.isnan(watched_.statistics()["1"]["rotation"])


def test_a_weight_that_turns_too_far_is_said_once_by_name():
    """Full polar factors on the exponential map, as combinations were before: some 30 % in every step."""

    def run(options) -> list[str]:
        torch.manual_seed(0)
        model = small_net(16)
        optimizer = sgd(model, lr=0.1)
        treat(model, optimizer, "nog+ow", options=options)
        with warnings.catch_warnings(record=True) as said, ConditionMonitor(model, every=5, optimizer=optimizer):
            warnings.simplefilter("always")
            train(model, optimizer, batches(60))
        return [str(one.message) for one in said if "turns" in str(one.message)]

    (message,) = run({"nog": {"scale": "paper"}})
    assert "the weight of layer '0' turns by" in message and "(step 35; more than 10% in 3 records" in message
    assert "'scale': 'gradient'" in message and "'map': 'soc'" in message
    assert run({}) == []


def test_the_first_steps_and_single_records_say_nothing():
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3))
    monitor = ConditionMonitor(model, every=1, layers=["1"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(40):
            model(torch.randn(8, 4))
            with torch.no_grad():
                model[0].weight.mul_(1.3 if step < 19 or step % 3 else 1.0)
    assert max(r.rotation for r in monitor.records[1:]) == pytest.approx(0.3, rel=1e-5)

    def far() -> None:
        for _ in range(4):
            model(torch.randn(8, 4))
            with torch.no_grad():
                model[0].weight.mul_(1.3)

    with pytest.warns(RuntimeWarning, match="layer '0' turns by 30%"):
        far()


def test_files_of_an_older_version_are_continued_in_their_own_columns(tmp_path):
    old = FIELDS[: FIELDS.index("rotation")]
    path = tmp_path / "condition.csv"
    values = {name: 3 for name in FIELDS} | {"layer": "norm"}
    records = [ConditionRecord(**{**values, "step": step, "rotation": 0.1}) for step in (0, 10, 20)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(old)
        writer.writerow([getattr(records[0], name) for name in old])
        writer.writerow([getattr(records[1], name) for name in old])
    new = CSVWriter(path)
    new.rewind(10)
    new(records[1])
    CSVWriter(path)(records[2])
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "10", "20"] and set(rows[0]) == set(old) and None not in rows[2]
    fresh = CSVWriter(tmp_path / "new.csv")
    fresh(records[0])
    assert (tmp_path / "new.csv").read_text().startswith(",".join(FIELDS))
    path.unlink()  # as a run that starts afresh does
    new(records[0])
    JSONLinesWriter(tmp_path / "new.jsonl")(records[0])
    assert '"rotation": 0.1' in (tmp_path / "new.jsonl").read_text()


def test_states_of_an_older_version_load():
    model = small_net()
    monitor = ConditionMonitor(model, every=1)
    model(batches(1)[0][0])
    state = monitor.state_dict()
    state.pop("rotation")
    state["records"].pop("rotation")
    other = ConditionMonitor(small_net(), every=1)
    other.load_state_dict(state)
    assert len(other.records) == 1 and math.isnan(other.records[0].rotation)
    assert other.records[0].kappa == monitor.records[0].kappa


def test_orthogonal_weights_are_measured_in_use_and_not_as_stored():
    torch.manual_seed(0)
    model = small_net()
    orthogonal_weight(model[0])
    monitor = ConditionMonitor(model, every=1)
    x = batches(1)[0][0]
    model(x)
    with torch.no_grad():  # along the frame, which the map divides out: the weight in use stays
        original = model[0].parametrizations.weight.original
        original.add_(model[0].parametrizations.weight[0].frame.mT.reshape(original.shape))
    model(x)
    assert monitor.records[1].rotation < 1e-5


class Remembers(nn.Module):
    """Keeps what it gets and counts its calls, as models do for a look at their features."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.seen, self.scale, self.kept = 0, None, []
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.seen += 1
        self.calls += 1
        self.kept.append(x)
        if self.scale is None:
            self.scale = x.abs().mean()
        return self.norm(self.conv(x / self.scale))


def test_a_model_is_as_it_was_before_a_monitor_looked_for_its_weights():
    model, called = nn.Sequential(Remembers()), []
    model[0].register_forward_hook(lambda *_: called.append(1))
    ConditionMonitor(model, layers=["0.norm"])
    pre_spectral_layers(model, of="0.norm")
    part = model[0]
    assert (part.seen, part.scale, part.kept, part.calls.item(), called) == (0, None, [], 0, [])
    assert torch.isfinite(model(torch.randn(2, 3, 8, 8))).all()
    assert (part.seen, len(part.kept), part.calls.item(), called) == (1, 1, 1, [1])


@pytest.mark.parametrize("channels", [4, 64])
def test_a_skew_orthogonal_convolution_turns_as_its_map_does(channels):
    """The layer and the treatment alike: by what it does, not by its stored filter. Of many channels by an estimate."""
    torch.manual_seed(0)
    conv = SkewOrthogonalConv2d(channels, channels, 3, bias=False)
    model = nn.Sequential(conv, nn.BatchNorm2d(channels))
    optimizer = torch.optim.SGD(conv.parameters(), lr=1.0)
    monitor = ConditionMonitor(model, every=1, layers=["1"], optimizer=optimizer)
    pixel = torch.zeros(channels, channels, 11, 11)
    pixel[:, :, 5, 5] = torch.eye(channels)
    maps, x = [], torch.randn(4, channels, 12, 12)
    for _ in range(3):
        with torch.no_grad():
            maps.append(conv(pixel).double())
        model(x).pow(3).mean().backward()
        optimizer.step()
    turned = [((new - old).norm() / old.norm()).item() for old, new in itertools.pairwise(maps)]
    # The relative deviation of Hutchinson's estimate from 8 vectors is at most sqrt(2/8) of a matrix of rank one, and
    # falls with the rank; these are of full rank.
    within = 1e-4 if channels == 4 else 0.15
    assert [record.rotation for record in monitor.records[1:]] == pytest.approx(turned, rel=within)


def test_a_frozen_zero_weight_does_not_hide_the_others():
    torch.manual_seed(0)
    left, right, norm = nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)

    class Join(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.norm = left, right, norm

        def forward(self, x):
            return self.norm(self.left(x) + self.right(x))

    nn.init.zeros_(right.weight).requires_grad_(False)
    model = Join()
    optimizer = torch.optim.SGD(left.parameters(), lr=0.1)
    monitor = ConditionMonitor(model, every=1, layers=["norm"], optimizer=optimizer)
    for _ in range(3):
        model(torch.randn(8, 3, 4, 4)).pow(3).mean().backward()
        optimizer.step()
    assert all(record.rotation > 0 for record in monitor.records[1:])


def test_a_loaded_state_says_nothing_of_the_model_before(tmp_path):
    torch.manual_seed(0)
    model = small_net(padding=1)
    optimizer = sgd(model)
    monitor = ConditionMonitor(model, every=2, optimizer=optimizer)
    train(model, optimizer, batches(3))
    state = monitor.state_dict()
    train(model, optimizer, batches(2))
    with torch.no_grad():
        model[0].weight.mul_(100)
    monitor.load_state_dict(state)
    train(model, optimizer, batches(2))
    assert monitor.records[-1].rotation < 1 or math.isnan(monitor.records[-1].rotation)


def test_a_layer_that_is_unfrozen_late_has_its_first_steps_too():
    """The warning counts from the step in which the weight first moved; over a resume it is not said again."""
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3))

    def go(monitor: ConditionMonitor, steps: range) -> list[str]:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for step in steps:
                model(torch.randn(8, 4))
                with torch.no_grad():
                    model[0].weight.mul_(1.0 if step < 50 else 1.3)
        return [str(one.message) for one in said]

    monitor = ConditionMonitor(model, every=1, layers=["1"])
    assert go(monitor, range(69)) == []
    (message,) = go(monitor, range(69, 80))
    assert "turns by 30%" in message
    state = monitor.state_dict()
    monitor.close()
    resumed = ConditionMonitor(model, every=1, layers=["1"])
    resumed.load_state_dict(state)
    assert go(resumed, range(80, 120)) == []
