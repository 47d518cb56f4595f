"""Terminals, locales and pipes as they are: signs in names are printed as they are, and no output ends a training."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from wellcond.cli import app
from wellcond.experiments.results.table import Table

pytest.importorskip("lightning")
SMALL = ["--limit", "130", "--width", "8", "--batch-size", "32", "--epochs", "2", "--monitor-every", "2"]
ASCII = {"PYTHONIOENCODING": "ascii"}
POSIX = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # what C was before Python made it UTF-8


def started(*arguments: str, environment: dict[str, str] | None = None, **options: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", "from wellcond.cli import main; main()", *arguments]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen(command, env={**os.environ, **(environment or {})}, **streams)  # pyright: ignore


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


@pytest.mark.parametrize("locale", [ASCII, POSIX], ids=["ascii", "posix"])
def test_a_training_ends_well_where_letters_are_lacking(locale: dict[str, str], tmp_path: Path):
    out = str(tmp_path / "run")
    training = started("train", *SMALL, "--out", out, environment=locale)
    printed, said = training.communicate(timeout=120)
    assert training.returncode == 0, said
    assert b"norm1: k(P), k(P + eI)" in printed
    assert out.encode() in printed


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


@pytest.mark.parametrize("both", [False, True], ids=["output", "output and errors"])
def test_a_reader_who_leaves_does_not_end_a_training(both: bool, tmp_path: Path):
    """`wellcond train | head -1`, with `2>&1` or without."""
    out = tmp_path / "run"
    training = started("train", *SMALL, "--out", str(out), **({"stderr": subprocess.STDOUT} if both else {}))
    assert training.stdout is not None
    if both:
        assert training.stdout.readline().startswith(b"epoch 1 of 2")
    training.stdout.close()
    said = b"" if both else training.stderr.read()  # pyright: ignore[reportOptionalMemberAccess]
    assert training.wait(timeout=120) == 0, said
    assert (out / "result.json").exists()
    assert b"rror" not in said
