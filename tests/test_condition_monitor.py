"""ConditionMonitor: its figures against known spectra and brute force, its steps, and that it leaves no trace."""

from __future__ import annotations

import copy
import io
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from helpers import features_with, geometric
from wellcond.linalg import _covariance, condition_number, covariance_spectrum
from wellcond.monitor import MEASURES, ConditionMonitor, ConditionRecord, medians
from wellcond.monitor._record import measure
from wellcond.nn import (
    DecorrelatedBatchNorm2d,
    GlobalCovariancePool2d,
    SpectralLayer,
    WhiteningColoring,
    replace_batchnorm,
    update_statistics,
)
from wellcond.orthogonality import treat


def brute_force(features: torch.Tensor) -> np.ndarray:
    """Eigenvalues of the covariance from numpy's SVD of the centred features, descending."""
    X = features.double().numpy()
    sigma = np.linalg.svd(X - X.mean(-1, keepdims=True), compute_uv=False)
    return sigma**2 / X.shape[-1]


def record_of(features: torch.Tensor, eps: float = 0.0, max_matrices: int = 16) -> ConditionRecord:
    return measure(features, eps, max_matrices, step=0, layer="x", failures=0, retries=0)


class ConvNet(nn.Module):
    """A convolution, a decorrelated batch norm and a head."""

    def __init__(self, channels: int = 6, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.norm = norm or DecorrelatedBatchNorm2d(channels)
        self.head = nn.Linear(channels, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


def images(n: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        model(images(seed=step)).square().sum().backward()
        optimizer.step()


# -- the figures --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kappa", [1e2, 1e6, 1e10, 1e14, 1e18])
def test_kappa_is_that_of_the_spectrum_beyond_what_a_float64_covariance_resolves(kappa: float) -> None:
    record = record_of(features_with(geometric(16, kappa), 500))
    # The features carry rounding of about d·eps64·σ_max, hence σ_min is off by that, relative d·eps64·√κ, and κ by
    # twice. Below the QR branch (κ < 3e11) the Gram matrix is allowed 1 %.
    assert record.kappa == pytest.approx(kappa, rel=0.01 if kappa < 3e11 else 2 * 16 * 2.3e-16 * kappa**0.5)
    assert record.numerical_rank == 16


def test_the_gram_matrix_alone_would_have_been_wrong_there() -> None:
    features = features_with(geometric(16, 1e18), 500)
    gram = _covariance.centred_gram(features)[0] / features.shape[-1]
    eigvals = torch.linalg.eigvalsh(gram)
    assert not 0.5e18 < eigvals[-1] / eigvals[0] < 2e18


def test_kappa_with_eps_is_that_of_the_shifted_covariance() -> None:
    record = record_of(features_with(geometric(8, 1e6), 300), eps=1e-3)
    assert record.kappa_eps == pytest.approx((1 + 1e-3) / (1e-6 + 1e-3), rel=1e-9)
    assert record.kappa == pytest.approx(1e6, rel=1e-6)


def test_measures_are_those_of_a_brute_force_svd() -> None:
    features = torch.randn(5, 40, generator=torch.Generator().manual_seed(1)) * torch.arange(1.0, 6)[:, None] + 3
    eigvals = brute_force(features)
    record = record_of(features, eps=0.1)
    expected = {
        "kappa": eigvals[0] / eigvals[-1],
        "kappa_eps": (eigvals[0] + 0.1) / (eigvals[-1] + 0.1),
        "kappa_range": eigvals[0] / eigvals[-1],
        "numerical_rank": 5,
        "effective_rank": eigvals.sum() ** 2 / (eigvals**2).sum(),
        "eig_max": eigvals[0],
        "eig_min": eigvals[-1],
        "rotation": math.nan,  # of no weight
    }
    for name in MEASURES:
        assert getattr(record, name) == pytest.approx(expected[name], rel=1e-10, nan_ok=True), name


def test_a_stem_convolution_has_rank_27_and_infinite_kappa() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    x = torch.randn(16, 3, 16, 16)
    with torch.no_grad():
        record = record_of(conv(x).transpose(0, 1).flatten(1))
        exact = brute_force(conv.double()(x.double()).transpose(0, 1).flatten(1))
    assert record.numerical_rank == 27
    assert record.kappa == math.inf
    # float32 convolution: eigenvalues of the range are off by a few eps32·λ_max
    assert record.kappa_range == pytest.approx(exact[0] / exact[26], rel=1e-3)


def test_more_channels_than_samples_has_the_rank_of_the_centred_samples() -> None:
    features = torch.randn(2, 64, 10, generator=torch.Generator().manual_seed(2))
    record = record_of(features)
    assert (record.numerical_rank, record.kappa, record.dim, record.samples) == (9, math.inf, 64, 10)
    eigvals = [brute_force(matrix) for matrix in features]
    assert record.kappa_range == pytest.approx(min(e[0] / e[8] for e in eigvals), rel=1e-9)  # lower median of two


def test_an_ill_conditioned_float32_batch_of_image_size_is_not_called_singular() -> None:
    """max(d, n)·eps·σ_max, numpy's rank tolerance, would be 0.4 % of σ_max here and end κ at 7e4."""
    record = record_of(features_with(geometric(16, 1e10), 32 * 32 * 32).float())
    # rounding to float32 puts noise of about eps32²/12·mean square on each eigenvalue: 1e-15 of λ_max beside 1e-10
    assert record.kappa == pytest.approx(1e10, rel=0.02)


def test_rounding_to_float32_is_not_taken_for_rank() -> None:
    low_rank = [*geometric(16, 1e3)[:10], *[0.0] * 6]
    for offset in (0.0, 100.0):  # a large mean makes the rounding larger, and the tolerance with it
        record = record_of((features_with(low_rank, 4000) + offset).float())
        assert record.numerical_rank == 10
        assert record.eig_min < record.rank_tolerance


def test_chunks_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    for shape in ((2, 5, 1000), (2, 300, 7)):
        features = torch.randn(shape, generator=torch.Generator().manual_seed(3)) + 2
        whole = covariance_spectrum(features)
        monkeypatch.setitem(_covariance._PIECE, "cpu", 64)
        torch.testing.assert_close(covariance_spectrum(features).eigvals, whole.eigvals, rtol=1e-12, atol=1e-13)
        monkeypatch.undo()


def test_a_non_finite_matrix_is_nan_and_its_neighbours_are_measured() -> None:
    features = torch.randn(3, 4, 50, generator=torch.Generator().manual_seed(4))
    spoilt = features.clone()
    spoilt[1, 2, 7] = math.nan
    eigvals = covariance_spectrum(spoilt).eigvals
    torch.testing.assert_close(eigvals[[0, 2]], covariance_spectrum(features).eigvals[[0, 2]])
    assert eigvals[1].isnan().all()
    record = record_of(spoilt)
    assert math.isnan(record.kappa_max)
    assert not record.finite


def test_constant_features_have_rank_zero() -> None:
    record = record_of(torch.zeros(4, 20))
    assert (record.numerical_rank, record.kappa, record.effective_rank) == (0, math.inf, 0.0)
    assert record.finite


def test_at_most_max_matrices_are_looked_at_evenly_spread() -> None:
    scales = torch.arange(1.0, 10.0)
    features = torch.stack([features_with([float(s), 1.0], 50) for s in scales])
    record = record_of(features, max_matrices=3)  # the first, the middle and the last: κ = 1, 5, 9
    assert record.kappa == pytest.approx(5.0)
    assert record.kappa_max == pytest.approx(9.0)
    assert record.matrices == 9


# -- layers -------------------------------------------------------------------------------------------------------


def seen_inputs(layer: nn.Module) -> list[torch.Tensor]:
    seen: list[torch.Tensor] = []
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    return seen


def test_a_decorrelated_batch_norm_reports_each_group_of_its_input() -> None:
    torch.manual_seed(0)
    model = ConvNet(8, DecorrelatedBatchNorm2d(8, groups=2, eps=1e-3))
    seen = seen_inputs(model.norm)
    with ConditionMonitor(model) as monitor:
        model(images())
    groups = [brute_force(group) for group in seen[0].transpose(0, 1).reshape(2, 4, -1)]
    record = monitor.records[0]
    assert (record.layer, record.matrices, record.dim, record.samples, record.eps) == ("norm", 2, 4, 8 * 36, 1e-3)
    assert record.kappa == pytest.approx(min(e[0] / e[-1] for e in groups), rel=1e-9)  # lower median of two
    assert record.kappa_max == pytest.approx(max(e[0] / e[-1] for e in groups), rel=1e-9)


def test_covariance_pooling_reports_one_matrix_an_image() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), GlobalCovariancePool2d(16, reduction=5))
    with ConditionMonitor(model, max_matrices=64) as monitor:
        model(images(9))
    record = monitor.records[0]
    assert (record.layer, record.matrices, record.dim, record.samples) == ("1.spectral", 9, 5, 36)


def test_a_named_batch_norm_is_watched_by_its_input() -> None:
    torch.manual_seed(0)
    model = ConvNet(6, nn.BatchNorm2d(6))
    seen = seen_inputs(model.norm)
    with ConditionMonitor(model, layers=["norm"]) as monitor:
        model(images())
    eigvals = brute_force(seen[0].transpose(0, 1).flatten(1))
    assert monitor.records[0].kappa == pytest.approx(eigvals[0] / eigvals[-1], rel=1e-9)
    assert monitor.records[0].eps == model.norm.eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_spectrum_is_still_that_of_float64(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = ConvNet()
    seen = seen_inputs(model.norm)
    with ConditionMonitor(model) as monitor, torch.autocast("cpu", dtype=dtype):
        model(images())
    assert seen[0].dtype == dtype
    eigvals = brute_force(seen[0].transpose(0, 1).flatten(1))
    assert monitor.records[0].kappa == pytest.approx(eigvals[0] / eigvals[-1], rel=1e-9)


def test_solver_errors_name_the_layer_by_its_place_in_the_model() -> None:
    model = nn.Sequential(ConvNet(), nn.Identity())
    with ConditionMonitor(model), pytest.raises(ValueError, match=r"0\.norm"):
        model(images() * math.nan)


# -- steps --------------------------------------------------------------------------------------------------------


def test_a_record_every_so_many_forward_passes_in_training_mode() -> None:
    model = ConvNet()
    with ConditionMonitor(model, every=3) as monitor:
        for step in range(8):
            model(images(seed=step))
            model.eval()
            model(images())
            model.train()
    assert [record.step for record in monitor.records] == [0, 3, 6]
    assert monitor.step == 8


def test_with_an_optimizer_its_steps_count_not_the_accumulated_batches() -> None:
    model = ConvNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with ConditionMonitor(model, every=2, optimizer=optimizer) as monitor:
        for batch in range(12):
            model(images(seed=batch)).sum().backward()
            if batch % 3 == 2:
                optimizer.step()
    assert [record.step for record in monitor.records] == [0, 2]
    assert monitor.step == 4


def test_steps_set_from_outside_that_skip_multiples_still_make_one_record_an_interval() -> None:
    model = ConvNet()
    with ConditionMonitor(model, every=10) as monitor:
        for step in range(0, 40, 3):
            monitor.step = step
            model(images())
    assert [record.step for record in monitor.records] == [0, 12, 21, 30]


def test_a_layer_used_twice_is_recorded_once_a_step() -> None:
    class Twice(ConvNet):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + super().forward(2 * x)

    model = Twice()
    with ConditionMonitor(model, every=1) as monitor:
        model(images())
        model(images())
    assert [record.step for record in monitor.records] == [0, 1]


@pytest.mark.parametrize("whole", [True, False])
def test_activation_checkpointing_is_not_another_step(whole: bool) -> None:
    """The forward pass that backward repeats is of the batch already counted: batch k is as large as 10^k."""

    class Checkpointed(ConvNet):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)

    model = ConvNet() if whole else Checkpointed()
    with ConditionMonitor(model, every=1) as monitor:
        for step in range(3):
            x = images(seed=step) * 10.0**step
            y = checkpoint(model, x, use_reentrant=False) if whole else model(x)
            y.square().sum().backward()
    assert [record.step for record in monitor.records] == [0, 1, 2]
    scales = [math.log10(record.eig_max / monitor.records[0].eig_max) / 2 for record in monitor.records]
    assert scales == pytest.approx([0, 1, 2], abs=0.5)  # the batches differ by less than that


@pytest.mark.parametrize(
    ("make", "layers"),
    [
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), GlobalCovariancePool2d(4)), None),
        (lambda: nn.Sequential(nn.Identity(), nn.Conv2d(3, 4, 1)), ["1"]),
    ],
    ids=["covariance pooling", "ordinary layer"],
)
def test_an_empty_batch_is_a_step_without_a_record(make, layers) -> None:
    model = make()
    with ConditionMonitor(model, layers=layers, every=2) as monitor:
        for count in (0, 4, 0, 0, 4):
            model(images(count))
    assert [record.step for record in monitor.records] == [1, 4]
    assert monitor.step == 5


def test_under_vmap_nothing_is_recorded() -> None:
    model = ConvNet(norm=DecorrelatedBatchNorm2d(6, track_running_stats=False))
    with ConditionMonitor(model, every=1) as monitor:
        several = torch.func.vmap(model)(images(16).unflatten(0, (2, 8)))
        assert monitor.records == []
        whole = model(images(16)[:8])
    torch.testing.assert_close(several[0], whole)
    assert [record.step for record in monitor.records] == [1]


def test_update_statistics_is_no_training_also_of_a_norm_that_took_the_hook_over() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    with ConditionMonitor(model, layers=["1"], every=1) as monitor:
        replace_batchnorm(model)
        model(images())
        update_statistics(model, [1000 * images()])
        model(images())
    largest = [record.eig_max for record in monitor.records]
    assert len(largest) == 2 and max(largest) < 10 * min(largest)


def test_update_statistics_is_no_training() -> None:
    model = ConvNet()
    with ConditionMonitor(model, every=1) as monitor, ConditionMonitor(model.norm, every=1) as part:
        for step in range(3):
            model(images(seed=step))
        update_statistics(model, [1000 * images()])
        for step in range(3, 5):
            model(images(seed=step))
    for seen in (monitor, part):
        assert [record.step for record in seen.records] == list(range(5))
        largest = [record.eig_max for record in seen.records]
        assert max(largest) < 10 * min(largest)  # it grows with the square of the factor


def test_nothing_is_computed_between_records(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(features: torch.Tensor) -> object:
        calls.append(features)
        return covariance_spectrum(features)

    monkeypatch.setattr("wellcond.monitor._record.covariance_spectrum", counted)
    model = ConvNet()
    with ConditionMonitor(model, every=4):
        for step in range(9):
            model(images(seed=step))
    assert len(calls) == 3


def test_solver_failures_are_those_since_the_last_record() -> None:
    model = ConvNet()
    alarms: list[str] = []
    with ConditionMonitor(model, every=1, on_alarm=lambda record, reason: alarms.append(reason)) as monitor:
        model(images())
        model.norm.solver_events.failures += 3
        model.norm.solver_events.rescues["float64"] = 2
        model(images())
        model(images())
    assert [(r.failures, r.retries) for r in monitor.records] == [(0, 0), (3, 2), (0, 0)]
    assert alarms == ["3 decompositions of 'norm' failed before step 1"]
    assert monitor.statistics()["norm"]["failures"] == 3
    model.norm.solver_events.failures += 2  # after the last record
    assert monitor.statistics()["norm"]["failures"] == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_layer_that_takes_covariances_is_recorded_by_their_eigenvalues(dtype: torch.dtype) -> None:
    """Of rank 6 of 8: what rounding left of the rest is not taken for eigenvalues."""
    eigvals = torch.tensor([*geometric(6, 100.0), 0.0, 0.0], dtype=torch.float64)
    U = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    P = ((U * eigvals) @ U.mT).to(dtype)
    layer = SpectralLayer("sqrt", takes="covariance")
    with ConditionMonitor(layer, every=1) as monitor:
        layer((P + P.mT) / 2)
    (record,) = monitor.records
    assert record.numerical_rank == 6
    assert record.kappa_max == math.inf
    assert record.eig_max == pytest.approx(1.0, rel=1e-6)
    assert record.effective_rank == pytest.approx(float(eigvals.sum() ** 2 / eigvals.square().sum()), rel=1e-5)


def test_masked_content_is_recorded_by_the_positions_chosen() -> None:
    content, style = torch.randn(1, 3, 6, 6, dtype=torch.float64), torch.randn(1, 3, 4, 4, dtype=torch.float64)
    mask = torch.rand(1, 6, 6) < 0.5
    layer = WhiteningColoring(1e-5)
    with ConditionMonitor(layer, every=1) as monitor:
        layer(content, style, content_mask=mask)
    eigvals = brute_force(content[0, :, mask[0]])
    (record,) = monitor.records
    assert record.kappa == pytest.approx(eigvals[0] / eigvals[-1], rel=1e-9)
    assert record.eig_min == pytest.approx(eigvals[-1], rel=1e-9)


# -- no trace -----------------------------------------------------------------------------------------------------


def test_training_is_bit_for_bit_the_same_with_the_monitor() -> None:
    torch.manual_seed(0)
    model = ConvNet()
    other = copy.deepcopy(model)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), range(4))
    with ConditionMonitor(other, every=1):
        train(other, torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9), range(4))
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def hook_counts(model: nn.Module) -> list[int]:
    return [
        len(getattr(module, name, ()))
        for module in model.modules()
        for name in ("_forward_hooks", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")
    ]


def test_close_removes_every_hook_and_keeps_the_records() -> None:
    model = nn.Sequential(ConvNet(), nn.Identity())
    before = hook_counts(model)
    monitor = ConditionMonitor(model, layers=["0.norm", "0.conv"], every=1)
    assert hook_counts(model) != before
    model(images())
    monitor.close()
    monitor.close()
    assert hook_counts(model) == before
    model(images())
    assert len(monitor.records) == 2


def test_the_hook_of_the_optimizer_is_removed_too() -> None:
    model = ConvNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ConditionMonitor(model, optimizer=optimizer) as monitor:
        train(model, optimizer, range(2))
    train(model, optimizer, range(2))
    assert monitor.step == 2


def test_copies_and_pickles_of_the_model_are_not_watched(tmp_path) -> None:
    model = ConvNet()
    bare = hook_counts(model)
    layers = ["norm", "conv"]
    with ConditionMonitor(model, layers=layers, every=1, writers=[tmp_path / "condition.csv"]) as monitor:
        ema = copy.deepcopy(model)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        ema(images())
        loaded(images())
        assert monitor.records == []
        assert monitor.step == 0
        assert hook_counts(ema) == hook_counts(loaded) == bare  # what came along took itself off
        with ConditionMonitor(ema, every=1) as other:
            ema(images())
        assert len(other.records) == 1
        assert monitor.records == []
        model(images())
    assert len(monitor.records) == 2


def test_a_copy_of_a_watched_model_compiles_to_one_graph() -> None:
    model = ConvNet(norm=nn.BatchNorm2d(6))
    with ConditionMonitor(model, layers=["norm"], every=1) as monitor:
        twin = copy.deepcopy(model)
        compiled = torch.compile(twin, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(images()), model(images()))
    assert len(monitor.records) == 1


def test_a_compiled_model_gives_the_same_records() -> None:
    torch.manual_seed(0)
    model = ConvNet()
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="eager")
    with ConditionMonitor(model, every=2) as eager, ConditionMonitor(compiled, every=2) as monitor:
        for step in range(5):
            model(images(seed=step))
            compiled(images(seed=step)).sum().backward()
    assert [r.step for r in monitor.records] == [0, 2, 4]
    assert [r.layer for r in monitor.records] == ["norm"] * 3
    for mine, theirs in zip(monitor.records, eager.records, strict=True):
        assert mine.kappa == pytest.approx(theirs.kappa, rel=1e-5)


def test_a_wrapped_model_keeps_the_layer_names(tmp_path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(ConvNet())
        with ConditionMonitor(wrapped, every=1) as monitor:
            wrapped(images()).sum().backward()
            wrapped(images()).sum().backward()
        # Before its group: the last holder's destructor waits, with the interpreter's lock, for a thread that wants it.
        del wrapped
    finally:
        torch.distributed.destroy_process_group()
    assert [(r.step, r.layer) for r in monitor.records] == [(0, "norm"), (1, "norm")]


# -- resuming -----------------------------------------------------------------------------------------------------


def test_a_resumed_monitor_ends_with_the_records_of_an_uninterrupted_one() -> None:
    def run(resume_at: int | None) -> list[ConditionRecord]:
        torch.manual_seed(0)
        model = ConvNet()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        with ConditionMonitor(model, every=3) as monitor:
            train(model, optimizer, range(resume_at or 10))
            model.norm.solver_events.failures += resume_at is not None
        if resume_at is None:
            return monitor.records
        buffer = io.BytesIO()
        torch.save(monitor.state_dict(), buffer)
        buffer.seek(0)
        with ConditionMonitor(model, every=3) as second:
            second.load_state_dict(torch.load(buffer, weights_only=True))
            train(model, optimizer, range(resume_at, 10))
        assert sum(r.failures for r in second.records) == 1
        return second.records

    straight = run(None)
    for resume_at in (1, 3, 5):
        resumed = run(resume_at)
        assert [r.step for r in resumed] == [0, 3, 6, 9]
        assert [r.kappa for r in resumed] == [r.kappa for r in straight]


# -- reading ------------------------------------------------------------------------------------------------------


def fixed_records(kappas: list[float]) -> ConditionMonitor:
    monitor = ConditionMonitor(ConvNet(), every=1)
    monitor.close()
    base = record_of(torch.randn(3, 20)).as_dict()
    monitor.records = [
        ConditionRecord(**{**base, "layer": "norm", "step": i, "kappa": k}) for i, k in enumerate(kappas)
    ]
    return monitor


def test_summary_is_the_median_over_records() -> None:
    assert fixed_records([1e3, 1e9, 1e4]).statistics()["norm"]["kappa"] == 1e4
    assert fixed_records([1e3, math.inf, 1e4]).statistics()["norm"]["kappa"] == 1e4


def test_summary_leaves_out_records_of_non_finite_features_and_counts_them() -> None:
    monitor = fixed_records([math.nan, 1e3, 1e5, math.nan, 1e4])
    assert monitor.statistics()["norm"]["kappa"] == 1e4
    assert (monitor.statistics()["norm"]["nonfinite"], monitor.statistics()["norm"]["records"]) == (2, 5)
    assert math.isnan(fixed_records([math.nan]).statistics()["norm"]["kappa"])


def test_the_summary_prints_the_statistics() -> None:
    monitor = fixed_records([1e3, math.nan, 1e9, 1e4])
    header, _, row = monitor.summary().splitlines()
    cells = dict(zip(header.split(), row.split(), strict=True))
    assert (cells["layer"], float(cells["kappa"]), cells["records"]) == ("norm", 1e4, "4")
    assert medians(monitor.records)["kappa"] == 1e4
    with pytest.warns(DeprecationWarning, match=r"use statistics\(\) for the numbers"):
        assert monitor.summary()["norm"]["kappa"] == 1e4  # the dictionary that it was


def test_the_sparkline_rises_with_the_logarithm() -> None:
    monitor = fixed_records([1e0, 1e1, 1e2, 1e7, math.inf, math.nan, 1e7])
    assert monitor.sparkline() == "norm 1.0e+07 ▁▂▃█∞?█"
    assert monitor.sparkline("norm", width=2) == "norm 1.0e+07 ?▁"


def test_plot_draws_kappa_over_the_steps(tmp_path) -> None:
    monitor = fixed_records([10.0, math.inf, 1000.0])
    axes = monitor.plot(tmp_path / "deep" / "kappa.png")
    assert (tmp_path / "deep" / "kappa.png").read_bytes()[:4] == b"\x89PNG"
    (line,) = axes.get_lines()
    assert axes.get_yscale() == "log"
    assert axes.get_ylabel() == "condition number κ(P)"
    assert line.get_label() == "norm (not finite at 1 of 3)"  # a gap alone might go unseen
    np.testing.assert_array_equal(line.get_xdata(), [0, 1, 2])
    np.testing.assert_array_equal(line.get_ydata(), [10.0, math.nan, 1000.0])
    assert monitor.plot(axes, "kappa_eps") is axes
    assert len(axes.get_lines()) == 2


# -- alarms and errors --------------------------------------------------------------------------------------------


def test_alarms_are_raised_beyond_the_bound_and_for_non_finite_features() -> None:
    torch.manual_seed(0)
    model = ConvNet(40)  # rank 27 of 40
    alarms: list[tuple[int, str]] = []
    with ConditionMonitor(
        model,
        every=1,
        layers="conv",
        kappa_above=1e6,
        on_alarm=lambda record, reason: alarms.append((record.step, reason)),
    ):
        model(images())  # 3 input channels: well conditioned
        model(images() * torch.tensor([1.0, 1.0, 1e-6]).view(3, 1, 1))
        model.norm = nn.Identity()
        model(images() * math.inf)
    steps, reasons = zip(*alarms, strict=True)
    assert steps == (1, 2)
    assert "κ of 'conv' is" in reasons[0]
    assert "above 1.000e+06" in reasons[0]
    assert "not finite" in reasons[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be a positive integer, got 0"),
        ({"every": 1.5}, r"every must be a positive integer, got 1\.5"),
        ({"every": math.inf}, "every must be a positive integer, got inf"),
        ({"max_matrices": 0}, "max_matrices must be a positive integer, got 0"),
        ({"layers": ["nrom"]}, "no layer 'nrom'; did you mean 'norm'"),
        ({"layers": [nn.Identity()]}, "the layer Identity is not a part of the model"),
        ({"layers": []}, "layers is empty"),
        ({"kappa_above": 1e3}, "needs on_alarm"),
        ({"kappa_above": math.nan, "on_alarm": print}, "kappa_above is NaN"),
        ({"writers": ["x.txt"]}, "must end in .csv or .jsonl"),
    ],
)
def test_wrong_options_are_refused_and_leave_no_hook(options: dict, message: str) -> None:
    model = ConvNet()
    before = hook_counts(model)
    with pytest.raises(ValueError, match=message):
        ConditionMonitor(model, **options)
    assert hook_counts(model) == before


def test_a_model_without_spectral_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ConvNet\) has no spectral layer"):
        ConditionMonitor(ConvNet(norm=nn.BatchNorm2d(6)))


def test_an_input_that_is_not_features_is_refused() -> None:
    model = nn.Sequential(nn.Identity())
    with ConditionMonitor(model, layers="0"), pytest.raises(ValueError, match="not a tensor"):
        model(torch.tensor(1.0))


class OwnSpectral(nn.Module):
    """A spectral layer of a user's own: the mark, and nothing of ours."""

    is_spectral_layer = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class OwnObserved(OwnSpectral):
    def observed_features(self, x: torch.Tensor) -> tuple[torch.Tensor, float]:
        return x.unflatten(1, (2, -1)).permute(1, 2, 0), 0.25


def test_the_mark_is_enough_to_be_watched_and_treated() -> None:
    x = torch.randn(50, 6)
    for layer, dim, matrices, eps in ((OwnSpectral(), 6, 1, 0.0), (OwnObserved(), 3, 2, 0.25)):
        model = nn.Sequential(nn.Linear(6, 6), layer)
        with ConditionMonitor(model, every=1) as monitor:
            model(x)
        (record,) = monitor.records
        assert (record.layer, record.dim, record.matrices, record.eps) == ("1", dim, matrices, eps)
        features = model[0](x)
        blocks = features.unflatten(1, (matrices, -1)).permute(1, 2, 0).detach()
        assert record.kappa_max == pytest.approx(max(condition_number(block).item() for block in blocks))
        treatment = treat(model, torch.optim.SGD(model.parameters(), lr=0.1), "nog")
        assert list(treatment.layers) == ["0"]
