"""A folder whose overwriting was killed is still ours, and nothing in it counts as finished that lacks files."""

from pathlib import Path

import pytest

from wellcond.experiments import folders

RESULTS = ("result.json", "results.parquet", "runs/a/result.json")
OTHERS = ("condition.csv", "runs/a/config.json", "runs/a/condition.csv", "runs/a/checkpoints/last.ckpt")
MADE = ("config.json", *OTHERS, *RESULTS)


@pytest.mark.parametrize("deleted", range(len(OTHERS) + len(RESULTS)))
def test_a_folder_that_was_being_emptied_can_be_overwritten(tmp_path, monkeypatch, deleted):
    folder = tmp_path / "out"
    for name in MADE:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    folders.mark(folder, "comparison", {"old": True})
    unlink, done = Path.unlink, []

    def killed(path):
        if len(done) == deleted:
            raise KeyboardInterrupt
        done.append(path)
        unlink(path)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            folders.prepare(folder, "comparison", {"new": True}, MADE)
    assert folders.check(folder, "comparison", overwrite=True) == {"old": True}
    whole = all((folder / name).exists() for name in OTHERS)
    assert whole or not any((folder / name).exists() for name in RESULTS)
    folders.prepare(folder, "comparison", {"new": True}, MADE)
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["config.json"]
    assert folders.read_config(folder, "comparison") == {"new": True}
