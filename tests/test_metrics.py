"""`wellcond.metrics`: the condition number of everything that was seen, over batches and processes."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import multiprocessing

from group_work import leave
from wellcond.linalg import condition_number, effective_rank
from wellcond.metrics import ConditionNumber, EffectiveRank


def features(n=120, kappa=1e4, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    Q, _ = torch.linalg.qr(torch.randn(5, 5, generator=g, dtype=torch.float64))
    scales = torch.logspace(0, -math.log10(kappa) / 2, 5, dtype=torch.float64)
    return (torch.randn(n, 5, generator=g, dtype=torch.float64) * scales @ Q.T + 3).to(dtype)


@pytest.mark.parametrize("shape", [(120, 5), (12, 5, 10), (6, 5, 4, 5)])
def test_batches_give_what_all_features_give(shape):
    X = features()
    maps = X.reshape(shape[0], -1, 5).movedim(-1, 1).reshape(shape)
    for metric, expected in (
        (ConditionNumber(5), condition_number(X.T, features=True)),
        (ConditionNumber(5, eps=1e-3), condition_number(X.T, eps=1e-3, features=True)),
        (EffectiveRank(5), effective_rank(X.T, features=True)),
    ):
        for part in maps.split([1, 2, shape[0] - 3]):
            metric.update(part)
        # κ of a Gram matrix in float64 is known to κ·eps64·d.
        torch.testing.assert_close(metric.compute(), expected, rtol=1e-10, atol=0.0)


def test_the_value_of_a_batch_and_that_of_all_of_them():
    one, two = features(seed=1), features(seed=2)
    metric = ConditionNumber(5)
    torch.testing.assert_close(metric(one), condition_number(one.T, features=True), rtol=1e-10, atol=0.0)
    torch.testing.assert_close(metric(two), condition_number(two.T, features=True), rtol=1e-10, atol=0.0)
    both = condition_number(torch.cat([one, two]).T, features=True)
    torch.testing.assert_close(metric.compute(), both, rtol=1e-10, atol=0.0)
    metric.reset()
    with pytest.warns(UserWarning, match="before"), pytest.raises(ValueError, match="call update first"):
        metric.compute()


def test_what_the_rounding_of_the_features_explains_is_no_eigenvalue():
    X = features(kappa=100.0, dtype=torch.float32)
    X[:, 4] = X[:, 0] + X[:, 1]  # rounded to float32
    metric = ConditionNumber(5)
    metric.update(X)
    assert metric.compute() == math.inf == condition_number(X.T, features=True)
    few = ConditionNumber(5)
    few.update(features(n=4))
    assert few.compute() == math.inf
    few.update(features(n=40))
    assert few.compute() < 1e6
    still = EffectiveRank(5)
    still.update(torch.full((4, 5), 7.0))
    assert still.compute() == 0.0


def test_a_copy_goes_on_alone_and_states_are_kept():
    metric = ConditionNumber(5)
    metric.update(features())
    twin, stored = copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))
    twin.update(100 * features(seed=3))
    assert twin.compute() != metric.compute() == stored.compute()
    metric.persistent(True)
    other = ConditionNumber(5)
    other.persistent(True)
    other.load_state_dict(metric.state_dict())
    other.update(features(seed=4))
    metric.update(features(seed=4))
    assert other.compute() == metric.compute()


def test_metrics_are_merged():
    """As torchmetrics does for map-reduce: from a metric or from its states."""
    one, two = ConditionNumber(5), ConditionNumber(5)
    one.update(features(seed=1))
    two.update(features(n=50, seed=2))
    expected = condition_number(torch.cat([features(seed=1), features(n=50, seed=2)]).T, features=True)
    for incoming in (two, two.metric_state):
        merged, empty = copy.deepcopy(one), ConditionNumber(5)
        merged.merge_state(incoming)
        torch.testing.assert_close(merged.compute(), expected, rtol=1e-10, atol=0.0)
        empty.merge_state(incoming)
        assert empty.compute() == two.compute()
    with pytest.raises(ValueError, match="cannot merge"):
        one.merge_state(ConditionNumber(4))


def _in_process(rank: int, file: str, found) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    metric = ConditionNumber(5)
    metric.update(features(seed=1) if rank == 0 else features(n=50, seed=2))
    found.put((rank, metric.compute().item()))
    leave()


@pytest.mark.slow
def test_processes_have_the_value_of_all_their_features_together(tmp_path):
    found = multiprocessing.get_context("spawn").SimpleQueue()
    multiprocessing.start_processes(_in_process, (str(tmp_path / "meet"), found), nprocs=2, start_method="spawn")
    both = torch.cat([features(seed=1), features(n=50, seed=2)])
    expected = condition_number(both.T, features=True).item()
    values = dict([found.get(), found.get()])
    assert values == {0: pytest.approx(expected, rel=1e-10), 1: pytest.approx(expected, rel=1e-10)}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ConditionNumber(0), "num_features must be a positive whole number, got 0"),
        (lambda: ConditionNumber(3, eps=-1.0), "eps"),
        (lambda: ConditionNumber(3).update(torch.randn(4, 5)), r"\(N, 3\) or \(N, 3, \*spatial\); got .* \(4, 5\)"),
        (lambda: ConditionNumber(3).update(torch.ones(4, 3, dtype=torch.int64)), "must be floating"),
        (lambda: ConditionNumber(3).update(torch.full((4, 3), math.nan)), "NaN or infinity"),
    ],
)
def test_bad_input_is_refused_in_one_line(make, says):
    with pytest.raises(ValueError, match=says):
        make()
