"""What the second review found: each was wrong once."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from wellcond._shared.exact_products import exact_products, exactly
from wellcond.orthogonality import OptimalLearningRate, orthogonal_weight, spectral_norm


@pytest.fixture
def rounded():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_of_a_zero_weight_under_the_spectral_norm_is_finite(dtype):
    layer = nn.Linear(3, 4, dtype=dtype)
    nn.init.zeros_(layer.weight)
    spectral_norm(layer)
    layer(torch.ones(2, 3, dtype=dtype)).sum().backward()
    assert layer.parametrizations.weight.original.grad.isfinite().all()


def test_gradients_through_the_spectral_norm_come_in_batches():
    layer = spectral_norm(nn.Linear(6, 4, dtype=torch.float64))
    W, stored = layer.weight, layer.parametrizations.weight.original
    directions = torch.randn(3, *W.shape, dtype=W.dtype)
    batch = torch.autograd.grad(W, stored, directions, is_grads_batched=True, retain_graph=True)[0]
    each = [torch.autograd.grad(W, stored, one, retain_graph=True)[0] for one in directions]
    torch.testing.assert_close(batch, torch.stack(each))


def test_counts_still_act_as_the_number_they_were():
    layer = nn.Linear(3, 5)
    olr = OptimalLearningRate(torch.optim.SGD(layer.parameters(), lr=0.1), {"layer": layer})
    olr._shortened["layer"] += 3
    counts = olr.counts()["layer"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert (counts != 3) is False and counts != 4 and counts <= 3 and counts >= 3
        assert sum(olr.counts().values()) == 3 and int(counts) == 3
    assert caught and all(warning.filename == __file__ for warning in caught)
    assert counts != {"shortened": 4}


def test_checkpointing_goes_through_exact_products(rounded):
    layer, x = orthogonal_weight(nn.Linear(8, 12)), torch.randn(2, 8)
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    got = layer.parametrizations.weight.original.grad.clone()
    layer.zero_grad()
    layer(x).square().sum().backward()
    torch.testing.assert_close(got, layer.parametrizations.weight.original.grad)


def test_products_stay_exact_when_another_thread_leaves(rounded):
    inside, leave = threading.Event(), threading.Event()

    def hold():
        with exact_products():
            inside.set()
            leave.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait()
    seen = []

    def product(x):
        leave.set()
        thread.join()
        seen.append(torch.get_float32_matmul_precision())
        return x @ x

    y = exactly(product, torch.eye(2, requires_grad=True))
    assert seen == ["highest"] and type(y.grad_fn).__name__ == "_ExactlyBackward"
    assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="of PyTorch 2.9")
def test_convolutions_are_exact_where_the_setting_is_of_all_backends(run_apart):
    run_apart(
        "import torch\n"
        "from wellcond._shared.exact_products import exact_products\n"
        "torch.backends.fp32_precision = 'tf32'\n"
        "with exact_products(convolutions=True):\n"
        "    assert torch.backends.cudnn.conv.fp32_precision == 'ieee'\n"
        "assert torch.backends.cudnn.conv.fp32_precision == 'tf32'\n"
    )


@pytest.fixture
def run_apart():
    import subprocess
    import sys

    return lambda code: subprocess.run([sys.executable, "-c", code], check=True)


def test_cells_do_not_break_a_table_in_markdown():
    pytest.importorskip("jinja2")
    from wellcond.experiments.results.table import Column, Strong, Table
    from wellcond.experiments.show.render import for_markdown

    table = Table(["method", Column("folder", text=True)], [("a|b", Strong("*x*"))])
    assert for_markdown(table).splitlines()[-1] == r"| a\|b | **\*x\*** |"


@pytest.mark.parametrize("when", ["starting", "ending"])
def test_ctrl_c_at_a_bad_moment_leaves_no_worker(when, monkeypatch):
    pytest.importorskip("joblib")
    from wellcond.experiments.grid import processes

    ended = []

    class Worker:
        pid = None

        def submit(self, task):
            raise KeyboardInterrupt

        def shut_down(self, kill, wait):
            ended.append((self, kill, wait))

    if when == "starting":
        monkeypatch.setattr(processes, "_Worker", Worker)
        with pytest.raises(KeyboardInterrupt):
            next(processes.in_processes(1)(["task"]))
    else:
        Worker.pid = 1
        monkeypatch.setattr(processes, "_signal", lambda pid, number: True)

        def interrupted(seconds):
            raise KeyboardInterrupt

        monkeypatch.setattr(processes.time, "sleep", interrupted)
        with pytest.raises(KeyboardInterrupt):
            processes._shut_down([Worker()])
    assert ended and ended[-1][1:] == (True, True)
