"""A run by `torch.compile`: the same training to rounding, the same names in its checkpoints, resumed exactly."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from small_runs import checkpoint, differences_of_runs, small
from wellcond.experiments.run.compiled import compile_stages
from wellcond.experiments.run.models import build_model
from wellcond.experiments.run.train import run
from wellcond.experiments.run.training import Classifier, first_non_finite_layer


@pytest.mark.slow
def test_a_compiled_run_is_the_plain_one_and_resumes_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # Not nog, which divides by the least singular values of gradients, and what rounding there is with them.
    options = {"epochs": 2, "treat": "ol"}
    run(small(**options), tmp_path / "plain")
    run(small(**options, compile=True), tmp_path / "whole")
    plain, compiled = (checkpoint(tmp_path / name)["state_dict"] for name in ("plain", "whole"))
    assert list(plain) == list(compiled)
    for name, tensor in plain.items():
        # float32 sums in another order, eps32 = 1.2e-7 each, carried through eight steps of training
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-4, atol=1e-5, msg=name)

    real = Classifier.training_step

    def training_step(self: Any, batch: Any, index: int) -> Any:
        if self.global_step == 6:
            raise KeyboardInterrupt
        return real(self, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "training_step", training_step)
        with pytest.raises(KeyboardInterrupt):
            run(small(**options, compile=True), tmp_path / "part")
    run(small(**options, compile=True), tmp_path / "part", resume=True)
    assert differences_of_runs(tmp_path / "whole", tmp_path / "part") == []


def test_only_the_stages_are_compiled_and_a_broken_layer_in_them_is_found(monkeypatch: pytest.MonkeyPatch):
    """`torch.compile` is replaced by what it does to hooks, so that the test takes no minute: it ignores them."""
    seen: list[torch.Size] = []

    def compiling(function: Any) -> Any:
        def compiled(x: torch.Tensor) -> torch.Tensor:
            seen.append(x.shape)
            return function(x)

        return compiled

    monkeypatch.setattr(torch, "compile", compiling)
    model = build_model("resnet8", num_classes=3, norm="zca", head="gcp", width=4, stem="imagenet").eval()
    names, x = list(model.state_dict()), torch.randn(2, 3, 16, 16)
    expected = model(x)
    compile_stages(model)
    assert torch.equal(model(x), expected)
    assert seen == [torch.Size((2, 4, 4, 4))]  # of the stem's pooling
    assert list(model.state_dict()) == names
    with torch.no_grad():
        model.stage2[0].conv2.weight[0] = float("inf")
    assert first_non_finite_layer(model, x) == "stage2.0.conv2"


@pytest.mark.slow
def test_without_a_compiler_there_is_one_line_and_nothing_is_written(tmp_path: Path):
    environment = {**os.environ, "CXX": str(tmp_path / "no-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "c")}
    command = [
        sys.executable,
        "-m",
        "wellcond.cli",
        "train",
        "--limit",
        "100",
        "--compile",
        "--out",
        str(tmp_path / "r"),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: torch.compile does not work here") and line.endswith("or leave compile out")
    assert not (tmp_path / "r").exists()
