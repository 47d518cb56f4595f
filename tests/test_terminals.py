"""Terminals, locales and pipes as they are: signs in names are printed as they are, and no output ends a training."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from wellcond.cli import app
from wellcond.cli.reporting import reporting
from wellcond.experiments.results.table import Table

pytest.importorskip("lightning")
SMALL = ["--limit", "130", "--width", "8", "--batch-size", "32", "--epochs", "2", "--monitor-every", "2"]
ASCII = {"PYTHONIOENCODING": "ascii"}
POSIX = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # what C was before Python made it UTF-8


def started(*arguments: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", "from wellcond.cli import main; main()", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env={**os.environ, **environment}, stdout=pipe, stderr=pipe)


@pytest.mark.parametrize("name", ["q[/b]", "r[x]", "s[bold]", "t:bug:", "u\\"])
def test_a_path_is_printed_as_it_is(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    missing = runner.invoke(app, ["data", f"./no/{name}"])
    assert f"error: no such path: 'no/{name}'" in missing.stderr
    inspected = runner.invoke(app, ["inspect", name])
    assert inspected.stderr.startswith(f"error: '{name}' is not a run")
    assert inspected.exit_code == missing.exit_code == 2


@pytest.mark.parametrize("name", ["q[/b]", "r[x]", "t:bug:", "u\\"])
def test_a_table_shows_signs_in_title_caption_and_cells(name: str):
    from rich.console import Console

    from wellcond.experiments.show.render import for_terminal

    console = Console(width=80, color_system=None)
    with console.capture() as printed:
        console.print(for_terminal(Table(["class", "n"], [[name, name]], title=name, caption=name)))
    assert printed.get().count(name) == 4


def test_a_long_name_takes_more_lines_and_no_number_is_cut_at_80_columns():
    from rich.console import Console

    from wellcond.experiments.show.render import for_terminal

    console, name, numbers = Console(width=80, color_system=None), "x" * 200, ["123456", "7.89e+12", "345"]
    with console.capture() as printed:
        console.print(for_terminal(Table(["class", *"abc"], [[name, *numbers]])))
    assert [number for number in numbers if number not in printed.get()] == []
    assert printed.get().count("x") == 200
    assert max(map(len, printed.get().splitlines())) <= 80


def test_a_training_ends_well_where_letters_are_lacking_and_nobody_reads_on(tmp_path: Path):
    """As by `wellcond train 2>&1 >file | head -1` in the locale of a bare container."""
    out = tmp_path / "run"
    training = started("train", *SMALL, "--out", str(out), environment=POSIX)
    assert training.stdout is not None
    assert training.stderr is not None
    assert training.stderr.readline().startswith(b"epoch 1 of 2")
    training.stderr.close()
    with training.stdout:
        printed = training.stdout.read()
    assert training.wait(timeout=120) == 0, printed
    assert (out / "result.json").exists()
    assert b"norm1: k(P), k(P + eI)" in printed
    assert str(out).encode() in printed


@pytest.mark.parametrize("command", ["", "train", "compare", "bench", "inspect", "report", "data"])
def test_help_is_shown_where_letters_are_lacking(command: str):
    shown = started(*command.split(), "--help", environment=ASCII)
    printed, said = shown.communicate(timeout=60)
    assert (shown.returncode, said) == (0, b"")
    printed.decode("ascii")
    assert b"Usage" in printed


def test_what_no_encoding_has_is_an_escape():
    """File names may hold bytes that are no text; Python has them as lone surrogates."""
    code = "from wellcond._shared.streams import make_patient; make_patient(); print('κ=2 \\udcff ± 日')"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **ASCII}, capture_output=True, check=True)
    assert done.stdout == b"k=2 \\udcff +- \\u65e5\n"


def test_a_path_that_a_library_cannot_encode_is_one_line(capsys: pytest.CaptureFixture[str]):
    """TensorBoard, for one, refuses what was typed in another encoding than the locale's."""
    with pytest.raises(typer.Exit) as ended, reporting(False, logging.WARNING, []):
        "runs/\udcc3\udca9".encode()
    assert ended.value.exit_code == 2
    assert capsys.readouterr().err == (
        "error: 'runs/\\udcc3\\udca9' has characters that this locale lacks; set PYTHONUTF8=1\n"
    )


def test_what_is_printed_to_nobody_ends_nothing(tmp_path: Path):
    """A pipe whose reader has left, as of `| head -1`: by our own lines, by `print`, and by a process started later."""
    code = (
        "import subprocess, sys; from wellcond import cli; from wellcond.cli.reporting import say, stderr\n"
        "def app():\n"
        "    sys.stdin.read()\n"
        "    for i in range(3): say('line'); print('line', flush=True); say('line', stderr)\n"
        "    subprocess.run([sys.executable, '-c', 'print(1)'], check=True)\n"
        "    open(sys.argv[1], 'w').write('done')\n"
        "cli.app = app; cli.main()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "done")]
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, **streams) as process:  # pyright: ignore
        assert process.stdout is not None
        assert process.stdin is not None
        process.stdout.close()
        process.stdin.close()
        assert process.wait(timeout=60) == 0
    assert (tmp_path / "done").read_text() == "done"
