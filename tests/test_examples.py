"""The examples run, and show what they say they show."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_patches_laid_back_are_the_picture():
    example = load("style_transfer")
    picture = torch.rand(1, 3, 20, 17, dtype=torch.float64)
    torch.testing.assert_close(example.decode(example.encode(picture), picture.shape[-2:]), picture)


def test_a_photograph_takes_the_colours_of_the_other_as_alpha_grows():
    example = load("style_transfer")
    temple, flower = example.photographs(64)
    gaps = [
        (example.transfer(temple, flower, alpha).mean((2, 3)) - flower.mean((2, 3))).norm().item()
        for alpha in (0.0, 0.5, 1.0)
    ]
    # Without clamping to [0, 1] the gap would fall like 1 − α (patches weigh the border a little less).
    assert gaps[1] < 0.6 * gaps[0]
    assert gaps[2] < 0.2 * gaps[0]


def test_style_transfer_writes_its_picture(tmp_path, monkeypatch):
    out = tmp_path / "new" / "picture.png"
    monkeypatch.setattr(sys, "argv", ["style_transfer.py", "--width", "48", "--alphas", "0.5", "--out", str(out)])
    load("style_transfer").main()
    with Image.open(out) as picture:
        assert picture.size == (3 * 48 + 2 * 4, 2 * 32 + 4)


@pytest.mark.slow
def test_learned_weights_find_the_pose_that_outliers_hide(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rigid_alignment.py", "--steps", "120"])
    load("rigid_alignment").main()
    plain, before, after = (
        float(line.split("median ")[1].removeprefix("rotation error ").split("°")[0])
        for line in capsys.readouterr().out.splitlines()
    )
    assert plain > 5
    assert before > 5
    # Noise of 0.01 over some 38 inliers of unit size: about 0.01/√38 rad = 0.1°; ten times that is a success.
    assert after < 1
