"""The command: it runs to the end, says what is wrong in one line, and is quick where there is nothing to do."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import wellcond
from wellcond.cli import app
from wellcond.experiments.files import read_csv

SMALL = ["--limit", "130", "--width", "8", "--batch-size", "32", "--epochs", "1", "--monitor-every", "2"]


def call(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def one_line(result):
    """The only line on the standard error; no traceback anywhere."""
    assert "Traceback" not in result.output
    (line,) = [line for line in result.stderr.splitlines() if line.strip()]
    return line


def python(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)


def test_train_prints_what_it_found(tmp_path):
    out = tmp_path / "run"
    result = call("train", *SMALL, "--treat", "nog+olr", "--out", out)
    assert result.exit_code == 0, result.output
    found = json.loads((out / "result.json").read_text())
    assert found["config"]["treat"] == "nog+olr"
    assert f"{100 * found['test_error']:.2f} %" in result.stdout  # an error under the name of error
    assert re.search(rf"test accuracy +{100 * found['test_accuracy']:.2f} %", result.stdout)
    assert "numerical 8/8" in result.stdout
    assert str(out) in result.stdout
    assert "epoch 1 of 1" in result.stderr  # no progress bar where nobody looks
    again = call("train", *SMALL, "--out", out)
    assert again.exit_code == 2
    assert re.match(r"error: '.*run' holds another run; go on with it by --resume, .* --overwrite", one_line(again))


def test_without_out_a_run_goes_to_a_folder_named_after_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("train", *SMALL, "--norm", "batch", "--seed", "3").exit_code == 0
    assert (tmp_path / "runs" / "digits-resnet8-batch-seed3" / "result.json").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--model", "resnet81"], "did you mean 'resnet8'"),
        (["--data", "digit"], "did you mean 'digits'"),
        (["--treat", "nog+owl"], "did you mean 'ow'"),
        (["--norm", "zac"], "did you mean 'zca'"),
        (["--head", "avgg"], "did you mean 'avg'"),
        (["--precision", "bf16"], "did you mean 'bf16-mixed'"),
        (["--precision", "fp16"], "did you mean '16-mixed'"),
        (["--precision", "float16"], "did you mean '16-mixed'"),
        (["--norm", "batch", "--treat", "nog"], "acts before a spectral layer"),
        (["--groups", "3"], "divisible by groups"),
        (["--epochs", "0"], "epochs must be at least 1, got 0"),
        (["--lr", "nan"], "lr must be positive and finite, got nan"),
        (["--seed", "-1"], "seed must not be negative, got -1"),
        (["--batch-size", "4000"], "does not fit into"),
        (["--data", "no/such/folder/here"], "no/such/folder/here"),
        (["--resume"], "holds no run to resume"),
        (["--resume", "--overwrite"], "exclude each other"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_wrong_option_is_one_line_and_writes_nothing(options, says, tmp_path):
    result = call("train", *SMALL, *options, "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert says in one_line(result)
    assert one_line(result).startswith("error: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("columns", "lacks"), [({"number": [1, 2]}, "image"), ({"image": [b"", b""]}, "label")])
def test_a_path_without_images_or_labels_is_said(columns, lacks, tmp_path):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "data" / "train-0.parquet")
    result = call("train", "--data", tmp_path / "data", "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    said = result.stderr.splitlines()[-1]  # after the progress bars of `datasets`
    assert said.startswith("error: ")
    assert f"no {lacks} column" in said
    assert not (tmp_path / "run").exists()


def test_debug_shows_the_traceback(tmp_path):
    result = call("train", "--model", "resnet81", "--debug", "--out", tmp_path / "run")
    assert isinstance(result.exception, ValueError)


def test_resume_takes_the_configuration_of_the_run_and_refuses_another(tmp_path):
    out = tmp_path / "run"
    assert call("train", *SMALL, "--treat", "OLR + NOG", "--out", out).exit_code == 0
    first = (out / "result.json").read_bytes()
    (out / "result.json").unlink()  # as if it had been interrupted before the test
    refused = call("train", "--out", out, "--resume", "--epochs", "7")
    assert refused.exit_code == 2
    assert "epochs is 1 there, 7 was asked" in one_line(refused)
    resumed = call("train", "--out", out, "--resume", "--epochs", "1", "--treat", "OLR + NOG")  # as it was begun
    assert resumed.exit_code == 0, resumed.output
    assert json.loads((out / "result.json").read_text()) == json.loads(first)
    assert len(read_csv(out / "metrics.csv")) == 1


def test_help_and_version_do_not_load_torch():
    """What makes the command quick where there is nothing to compute: torch alone takes seconds to import."""
    code = (
        "import sys; from wellcond.cli import main\n"
        "try: main()\n"
        "finally: print('loaded', [m for m in ('torch', 'lightning', 'matplotlib', 'numpy') if m in sys.modules])"
    )
    for arguments in (
        ["--help"],
        ["train", "--help"],
        ["compare", "--help"],
        ["bench", "--help"],
        ["latents", "--help"],
        ["--version"],
    ):
        done = python(code, *arguments)
        assert done.returncode == 0, done.stderr
        assert "loaded []" in done.stdout
    assert f"wellcond {wellcond.__version__}" in done.stdout


def test_help_shows_every_default():
    """The paper's, and the digits' own."""
    shown = " ".join(re.sub(r"[│╭╮╰╯─]", " ", call("train", "--help").stdout).split())
    for name, values in {
        "epochs": "350; digits: 5",
        "lr": "0.1",
        "width": "the model's default; digits: 16",
        "limit": "all",
        "augment": "augment; digits: no-augment",
        "norm": "zca",
        "treat": "none",
    }.items():
        assert re.search(rf"--{name} (?:(?! --\w).)*\[default: \({values}\)\]", shown), name


@pytest.mark.parametrize(("missing", "arguments"), [("typer", ["--help"]), ("lightning", ["train"])])
def test_a_missing_dependency_names_the_extra(missing, arguments, tmp_path):
    code = f"import sys; sys.modules['{missing}'] = None\nfrom wellcond.cli import main; main()"
    done = python(code, *arguments, *(["--out", str(tmp_path / "run")] if arguments == ["train"] else []))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert missing in done.stderr
    assert "wellcond[train]" in done.stderr
    assert "Traceback" not in done.stderr
