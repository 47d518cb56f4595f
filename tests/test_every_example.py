"""Every example runs at a small size, shows what it is there to show, and is on the page with what it prints."""

from __future__ import annotations

import logging
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = {path.stem: path for path in (ROOT / "examples").glob("*.py")}
PAGE = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
NUMBER = r"[-+]?(?:\d[\d.]*(?:e[-+]?\d+)?|\binf\b|\bnan\b)"


class Small(NamedTuple):
    """How an example runs in a few seconds, what it needs beyond torch, and what its lines have to say."""

    arguments: str
    holds: Callable[[list[str]], bool]
    needs: tuple[str, ...] = ("sklearn",)


def last(line: str, before: str = "") -> float:
    """The last number of a line, or the last one before some words."""
    return float(re.findall(NUMBER, line.split(before)[0] if before else line)[-1])


def after(line: str, words: str) -> float:
    """The first number after some words."""
    return float(re.findall(NUMBER, line.split(words)[1])[0])


SMALL = {
    # An orthogonal weight does not stretch what it gets; the one that is learnt freely does.
    "own_loop": Small(
        "--steps 12 --treatments none nog+ow+olr", lambda out: last(out[1], " at last") < last(out[0], " at last")
    ),
    "covariance_head": Small("--epochs 2", lambda out: last(out[1]) < last(out[0])),
    # By chance 90 % are wrong.
    "token_pooling": Small("--epochs 3", lambda out: all(last(line) < 60 for line in out) and len(out) == 3),
    # All agree, but only the first by shrinking.
    "self_supervised": Small(
        "--epochs 3 --picture small.png",
        lambda out: all(after(out[0], "deviation") < after(line, "deviation") / 2 for line in out[1:]),
        ("sklearn", "matplotlib"),
    ),
    "perspective_pose": Small("--steps 25", lambda out: abs(after(out[-1], "focal length") - 800) < 40, ()),
    # By chance half are right; of 300 trials, four standard errors are 12 %.
    "eeg_covariances": Small("--trials 150 --steps 30", lambda out: all(last(line) > 0.62 for line in out), ()),
    "lightning_training": Small(
        "--steps 6", lambda out: out[0].startswith("treated net.0") and last(out[0]) < 1e-5, ("sklearn", "lightning")
    ),
    "transformers_trainer": Small(
        "--steps 3", lambda out: "logged rate/" in out[1], ("sklearn", "transformers", "accelerate")
    ),
    "accelerate_training": Small("--epochs 1", lambda out: out[-1].count("True") == 2, ("sklearn", "accelerate")),
    # Rounding of float32 through a few layers.
    "onnx_runtime": Small(
        "--steps 5",
        lambda out: last(out[0]) < 1e-5 and out[1].endswith("True"),
        ("sklearn", "onnxruntime", "onnxscript"),
    ),
    "two_processes": Small("--steps 3", lambda out: after(out[1], "weight") == 0 == after(out[1], "covariance")),
    # Folding moves roundings of float32 through some 60 layers.
    "whitened_first_norm": Small(
        "--steps 2", lambda out: last(out[2]) < 1e-4 and last(out[5]) < 1e-4, ("sklearn", "timm", "torchvision")
    ),
}
ELSEWHERE = {"style_transfer", "rigid_alignment"}  # test_examples.py


@pytest.fixture
def as_by_hand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """In an empty folder; what libraries keep for a whole process is put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    lightning = logging.getLogger("lightning.pytorch")
    level = lightning.level
    yield
    lightning.setLevel(level)
    if accelerate := sys.modules.get("accelerate.state"):
        accelerate.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.GradientState._reset_state()


def shape(line: str) -> str:
    """A line with its numbers blotted out."""
    return re.sub(NUMBER, "#", line)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(SMALL))
def test_an_example_shows_what_it_is_for(name, as_by_hand, monkeypatch, capsys):
    small = SMALL[name]
    for package in small.needs:
        pytest.importorskip(package, reason=f"examples/{name}.py needs {package}, which is not installed")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *small.arguments.split()])
    runpy.run_path(str(EXAMPLES[name]), run_name="__main__")
    out = re.sub(r"(?m)^.*peer ranks.*\n+", "", capsys.readouterr().out).splitlines()  # gloo's, in PyTorch 2.9
    assert small.holds(out), "\n".join(out)
    shown = (ROOT / "docs" / "outputs" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    assert {*map(shape, out)} <= {*map(shape, shown)}, f"the page shows another output: docs/figures/examples.py {name}"


def test_no_example_is_left_out():
    assert set(EXAMPLES) == set(SMALL) | ELSEWHERE


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_an_example_fits_two_screens_says_how_to_run_it_and_is_on_the_page(name):
    text = EXAMPLES[name].read_text(encoding="utf-8")
    assert text.count("\n") <= 130
    assert f"    python examples/{name}.py" in text
    assert f"../examples/{name}.py" in PAGE and f"outputs/{name}.txt" in PAGE
    assert (ROOT / "docs" / "outputs" / f"{name}.txt").read_text(encoding="utf-8").startswith("$ python examples/")
