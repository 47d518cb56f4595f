"""One process at a time is at work in a folder, and a process that is gone, however it went, keeps nobody out."""

from __future__ import annotations

import subprocess
import sys

import pytest

from small_runs import small
from test_cli import SMALL, call, one_line
from wellcond.experiments import folders
from wellcond.experiments.errors import FolderError
from wellcond.experiments.run.train import run

HOLD = (
    "import sys; from pathlib import Path; from wellcond.experiments import folders\n"
    "with folders.claimed(Path(sys.argv[1]), lambda: None): print('in', flush=True); sys.stdin.read()"
)


def tree(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != folders.LOCK}


def claim(folder):
    return folders.claimed(folder, lambda: None)


def test_a_killed_process_leaves_the_folder_free(tmp_path):
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "in\n"
    with pytest.raises(FolderError, match=r"another process is at work in '.*run'"), claim(folder):
        pytest.fail("two at work")
    process.kill()
    process.communicate()
    assert (folder / folders.LOCK).exists()  # it had no time to tidy up
    with claim(folder):
        folders.check(folder, "run")  # the folder is empty, what was left is not somebody's work
    assert not (folder / folders.LOCK).exists()


def test_the_commands_refuse_a_folder_in_use_and_touch_nothing(tmp_path):
    run(small(epochs=1), tmp_path / "run")
    run(small(epochs=1), tmp_path / "part")
    (tmp_path / "part" / "result.json").unlink()  # else there is nothing to do
    for folder, command in {
        "part": ["train", "--resume"],
        "run": ["train", *SMALL, "--overwrite"],
        "comparison": ["compare", *SMALL],
        "report": ["report", tmp_path / "run"],
        "benchmark": ["bench"],
    }.items():
        out = tmp_path / folder
        before = tree(out)
        with claim(out):
            refused = call(*command, "--out", out)
        assert refused.exit_code == 2
        assert "another process is at work in" in one_line(refused)
        assert tree(out) == before


def test_a_finished_run_can_be_read_while_another_process_is_there(tmp_path):
    result = run(small(epochs=1), tmp_path)
    with claim(tmp_path):
        assert run(small(epochs=1), tmp_path, resume=True) == result


def test_what_another_process_wrote_since_the_check_is_not_overwritten(tmp_path):
    folder = tmp_path / "run"

    def check():
        folders.check(folder, "run")
        if not folder.exists():  # another process is as fast
            folders.prepare(folder, "run", {}, ())

    with pytest.raises(FolderError, match="holds another run"), folders.claimed(folder, check):
        pytest.fail("it was overwritten")


def test_a_folder_that_was_made_in_vain_goes_again(tmp_path):
    (tmp_path / "mine").mkdir()
    for folder in (tmp_path / "mine" / "a" / "b", tmp_path / "mine"):
        with pytest.raises(ValueError, match="no"), claim(folder):
            raise ValueError("no")
    assert list((tmp_path / "mine").iterdir()) == []
