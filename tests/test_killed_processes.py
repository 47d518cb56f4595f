"""What kill -9 leaves: a folder that is free, a run that goes on with the same bits, a line that names a rank."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

import dying_work
import group_work
from small_runs import checkpoint, differences, differences_of_runs, small
from test_training import plain_loop_of_two
from wellcond.experiments.compare import compare
from wellcond.experiments.data.load import load_images
from wellcond.experiments.errors import FolderError, RunError
from wellcond.experiments.run.processes import spawn, threads
from wellcond.experiments.run.train import run

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "kill_runs.py"


@pytest.mark.slow
def test_trainings_killed_at_random_moments_end_with_the_same_bits():
    """Of runs, in the middle of writing their files, and of grids; all fifty: ``benchmarks/kill_runs.py``."""
    done = subprocess.run([sys.executable, str(SCRIPT), "--quick"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    kinds = re.findall(r"^\| (run|write|grid) \| (\d+) \| (\d+) \| (\d+) \|$", done.stdout, re.MULTILINE)
    assert [kind for kind, *_ in kinds] == ["run", "write", "grid"]
    assert all(int(kills) == int(equal) > 0 for _, kills, equal, _ in kinds)


@pytest.mark.parametrize("work", [run, lambda config, out: compare([config], out)], ids=["run", "grid"])
def test_a_process_that_was_killed_writing_its_mark_leaves_the_folder_free(work, tmp_path):
    (tmp_path / ".config.json.part").write_text('{"kind": "ru')
    (tmp_path / ".lock").write_text("")
    work(small(epochs=1), tmp_path)
    assert not (tmp_path / ".config.json.part").exists()
    assert len(list(tmp_path.rglob("result.json"))) == 1


def test_the_files_of_somebody_else_are_still_refused(tmp_path):
    (tmp_path / ".config.json.part").write_text("")
    (tmp_path / "thesis.tex.part").write_text("years of work")
    with pytest.raises(FolderError, match="holds files that no run made"):
        run(small(epochs=1), tmp_path)


def test_a_run_of_a_grid_killed_in_every_file_that_it_writes_first(tmp_path):
    """Only the mark, only half of it, or the mark without a checkpoint: the grid goes on in each."""
    config = small(epochs=1)
    compare([config], tmp_path / "whole")
    for name, content in {".config.json.part": "{", ".lock": ""}.items():
        folder = tmp_path / f"part{name}" / "runs" / config.folder_name
        folder.mkdir(parents=True)
        (folder / name).write_text(content)
        mark = (tmp_path / "whole" / "config.json").read_bytes()
        (folder.parents[1] / "config.json").write_bytes(mark)
        compare([config], folder.parents[1], resume=True)
        assert differences_of_runs(tmp_path / "whole" / "runs" / config.folder_name, folder) == []


@pytest.mark.slow
def test_a_killed_rank_is_named():
    with pytest.raises(RunError, match=r"^process 1 of 2 died from SIGKILL \(.*\); .* go on with --resume$"):
        spawn(dying_work.kill_rank_1, 2)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="threads are read from /proc")
def test_the_threads_of_a_process_group_end_before_the_interpreter_does(tmp_path):
    """One that lets go of a tensor while the interpreter finalizes aborts a process whose work is done."""
    config = small(devices=2, batch_size=16, threads=1)
    spawn(group_work.train_and_name_the_last_threads, 2, config, tmp_path)
    for rank in "01":
        names = (tmp_path / rank).read_text().splitlines()
        assert names
        assert not [name for name in names if "gloo" in name]


@pytest.mark.slow
def test_a_run_goes_on_after_one_of_its_processes_was_killed(tmp_path):
    """Two processes that average their gradients; the truth is the same loop written out in one."""
    config = small(epochs=3, devices=2, batch_size=16, treat="nog+olr", threads=1)

    def kill():
        while not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists():
            time.sleep(0.005)
        ranks = [p for p in psutil.Process().children(recursive=True) if "spawn_main" in " ".join(p.cmdline())]
        ranks[-1].kill()

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    with pytest.raises(RunError, match=r"^process \d of 2 died from SIGKILL .*go on with --resume$"):
        run(config, tmp_path / "run")
    killer.join()
    assert not (tmp_path / "run" / "result.json").exists()
    result = run(config, tmp_path / "run", resume=True)
    assert result.steps == 3 * (checkpoint(tmp_path / "run")["global_step"] // 3)
    with threads(1):
        expected = plain_loop_of_two(config, load_images("digits", limit=130))
    assert differences(checkpoint(tmp_path / "run")["state_dict"], dict(expected)) == []
