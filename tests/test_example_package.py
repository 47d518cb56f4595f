"""What strangers add takes as many edits as CONTRIBUTING says: a file, and at most the line that imports it."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import wellcond.linalg as wl
from helpers import eps_of, relative_error, with_spectrum
from wellcond.cli import app
from wellcond.experiments.data.named import NAMED
from wellcond.monitor import ConditionMonitor
from wellcond.orthogonality import TREATMENTS, _registry, treat


def test_a_solver_is_a_file_and_a_line():
    from example_package import denman_beavers  # the line

    try:
        P = with_spectrum([2.0, 2.0, 0.5]).requires_grad_()
        for f in (wl.sqrtm, wl.invsqrtm):
            assert relative_error(f(P, solver="denman_beavers"), f(P, solver="eigh")) < 100 * eps_of(P.dtype)
            call = lambda P, f=f: f((P + P.mT) / 2, solver="denman_beavers")  # noqa: E731
            assert torch.autograd.gradcheck(call, P, check_forward_ad=True, check_batched_grad=True)
            assert torch.autograd.gradgradcheck(call, P)
        with pytest.raises(ValueError, match="did you mean 'denman_beavers'"):
            wl.sqrtm(P, solver="denman_beaver")
    finally:
        del wl.SOLVERS[denman_beavers.DenmanBeavers.name]


def test_a_spectral_layer_is_a_file():
    from example_package.log_pool import LogPool

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), LogPool())
    treatment = treat(model, torch.optim.SGD(model.parameters(), lr=0.1), "nog")
    x = torch.randn(2, 3, 8, 8)
    with ConditionMonitor(model, every=1) as monitor:
        model(x).sum().backward()
    assert list(treatment.layers) == ["0"]
    (record,) = monitor.records
    assert (record.layer, record.matrices, record.dim, record.samples, record.eps) == ("2", 2, 4, 36, 1e-3)


def test_a_treatment_is_a_file_and_a_line():
    from example_package import centralised_gradient  # the line

    try:
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        treatment = treat(model, optimizer, "gc", layers="0")
        assert "gc" in treatment.summary()
        before = model[0].weight.detach().clone()
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
        assert (model[0].weight.detach() - before).sum(1).abs().max() < 1e-5
    finally:
        name = centralised_gradient.CentralisedGradient.name
        del TREATMENTS[name], _registry._classes[name]


def test_a_data_set_is_a_file(tmp_path, monkeypatch):
    from example_package import stripes

    monkeypatch.setitem(NAMED, "stripes", stripes)  # a module inside of experiments/data/named needs not even this
    ended = CliRunner().invoke(app, ["train", "--data", "stripes", "--out", str(tmp_path / "run")])
    assert ended.exit_code == 0, ended.output
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert (config["data"], config["width"], config["epochs"]) == ("stripes", 4, 1)


def test_a_writer_is_a_callable():
    written = []
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    with ConditionMonitor(model, every=1, layers="1", writers=written.append):
        model(torch.randn(5, 3))
    assert [record.layer for record in written] == ["1"]
