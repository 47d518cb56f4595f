"""Folders of images as people have them: splits and classes by exact names, nothing vanishes without a line."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from image_files import pictures, write_classes, write_image
from wellcond.cli import app
from wellcond.experiments.data.load import ImageData, load_images
from wellcond.experiments.errors import DataError

pytest.importorskip("datasets")
HELD_OUT = "stratified by class, are the test"


def per_class(data: ImageData) -> dict[str, int]:
    """How many images of each class there are in all splits together."""
    counts = sum(s.labels.bincount(minlength=data.num_classes) for s in (data.train, data.validation, data.test))
    return dict(zip(data.classes, counts.tolist(), strict=True))  # pyright: ignore[reportAttributeAccessIssue]


def skipped(data: ImageData) -> list[str]:
    return [note for note in data.notes if HELD_OUT not in note]


@pytest.mark.parametrize(
    "classes",
    [
        ("bus", "car", "train_station/platform", "train_station/hall"),
        ("bus", "car", "train_station"),
        ("bus", "test_tube", "train"),
        ("test", "train", "val", "oak"),
        ("test_tube", "train_station"),
        ("__background__", "dev", "validation-1"),
        ("bus", "train", "train/2024"),
        ("bus/train", "bus/tram", "car/train", "car/van"),
        ("bus/train", "bus/test", "car"),
    ],
    ids=",".join,
)
def test_a_class_may_have_a_name_like_that_of_a_split(classes: tuple[str, ...], tmp_path: Path):
    if "train/2024" in classes:  # images of its own make it a class, but folders in it could be classes
        with pytest.raises(DataError, match=r"has splits \(train\) next to other folders of images \(bus\)"):
            load_images(write_classes(tmp_path, *classes))
        return
    data = load_images(write_classes(tmp_path, *classes))
    assert per_class(data) == {
        name: 10 * sum(c.split("/")[0] == name for c in classes) for name in sorted({c.split("/")[0] for c in classes})
    }
    assert skipped(data) == []


@pytest.mark.parametrize(
    ("names", "used"),
    [
        (("train", "test"), ("train", "test")),
        (("Training", "Testing"), ("train", "test")),
        (("train", "val", "test"), ("train", "validation", "test")),
        (("train", "dev", "TEST"), ("train", "validation", "test")),
    ],
)
def test_folders_with_the_exact_names_of_splits_are_splits(names: Any, used: Any, tmp_path: Path):
    write_classes(tmp_path, *(f"{name}/{c}" for name in names for c in ("cat", "train_station")))
    data = load_images(tmp_path)
    assert data.classes == ("cat", "train_station")
    found = {"train": data.train, "validation": data.validation, "test": data.test}
    for name, split in zip(names, used, strict=True):
        files = sorted((tmp_path / name).rglob("*.png"))
        if split != "train":  # of which some are validation where there is no such folder
            assert len(found[split]) == len(files) == 20
    assert sum(map(len, found.values())) == 20 * len(names)
    assert skipped(data) == []


ASKED = {
    "val and valid": (
        ["train/cat", "train/dog", "val/cat", "val/dog", "valid/cat"],
        r"'val' and 'valid', which both mean validation; merge them, or remove one",
    ),
    "a folder beside splits": (
        ["train/cat", "train/dog", "test/cat", "extra/cat"],
        r"has splits \(test, train\) next to other folders of images \(extra\): remove .*move them all to '.*train'",
    ),
    "nearly splits": (["training_set/a", "test_set/a"], r"may be splits \(test_set, training_set\): rename them"),
    "no folders of classes": (["train", "test"], r"images in test, train, but no folders of classes in 'train'"),
    "no training": (["test/cat", "val/cat"], r"images in test, val, but no folder 'train'"),
    "data sets side by side": (
        ["bottle/train/good", "bottle/test/good", "bottle/test/bad", "cable/train/good", "cable/test/good"],
        r"splits inside its folders \(bottle, cable\): give the folder that holds the splits, such as '.*bottle'",
    ),
    "and masks": (
        [f"{name}/{split}" for name in ("bottle", "cable") for split in ("train/good", "test/good", "masks/good")],
        r"splits inside its folders \(bottle, cable\)",
    ),
    "splits inside classes": (
        ["cat/train", "cat/test", "dog/train", "dog/test"],
        r"if those are classes, move the splits above them, as in train/cat/",
    ),
    "a folder too high": (
        ["data/train/a", "data/train/b", "data/test/a"],
        r"splits inside its folders \(data\): give .* such as '.*data'",
    ),
    "a class that training lacks": (
        ["train/cat", "train/dog", "test/cat", "test/Dog"],
        r"test' has folders of classes that training lacks: Dog; did you mean 'dog'\?",
    ),
}


@pytest.mark.parametrize("name", ASKED)
def test_what_can_be_read_in_two_ways_is_asked_about(name: str, tmp_path: Path):
    folders, message = ASKED[name]
    with pytest.raises(DataError, match=message):
        load_images(write_classes(tmp_path, *folders))


@pytest.mark.parametrize("reading", ["train", "."])
def test_the_way_out_that_is_named_leads_out(reading: str, tmp_path: Path):
    """Classes that are named like splits can be used in a folder `train`."""
    write_classes(tmp_path / reading, "train", "test")
    if reading == ".":
        (tmp_path / "inner").mkdir()
        for name in ("train", "test"):
            shutil.move(tmp_path / name, tmp_path / "inner" / name)
        (tmp_path / "inner").rename(tmp_path / "train")
    assert per_class(load_images(tmp_path)) == {"test": 10, "train": 10}


def empty_class(root: Path) -> None:
    (root / "ferret").mkdir()


def copy_of_jupyter(root: Path) -> None:
    (root / "cat/.ipynb_checkpoints").mkdir()
    shutil.copy(root / "cat/1.png", root / "cat/.ipynb_checkpoints/1-checkpoint.png")


def link_into_nowhere(root: Path) -> None:
    os.symlink("gone.png", root / "cat/gone.png")
    os.symlink("self", root / "cat/self")


def stray_parquet(root: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"file": ["1.png"], "label": [0]}), root / "index.parquet")


STRAYS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "an empty class": (empty_class, "skipped (a folder without images): 'ferret'"),
    "Jupyter": (copy_of_jupyter, "skipped (hidden, or a tool's own): 'cat/.ipynb_checkpoints'"),
    "macOS": (
        lambda root: [(root / "cat" / name).write_bytes(b"\0\5\x16\7") for name in ("._0.png", ".DS_Store")],
        "skipped (hidden, or a tool's own): 'cat/.DS_Store', 'cat/._0.png'",
    ),
    "an archive of macOS": (
        lambda root: write_classes(root, "__MACOSX/cat"),
        "skipped (hidden, or a tool's own): '__MACOSX'",
    ),
    "thumbnails": (lambda root: write_classes(root, "cat/@eaDir"), "skipped (hidden, or a tool's own): 'cat/@eaDir'"),
    "a broken link": (link_into_nowhere, "skipped (not a file, or a broken link): 'cat/gone.png', 'cat/self'"),
    "a loop": (
        lambda root: os.symlink("..", root / "cat/all"),
        "skipped (a link to a parent folder): 'cat/all'",
    ),
    "parquet": (stray_parquet, "skipped (a table without images): 'index.parquet'"),
    "texts": (
        lambda root: [(root / f"{i}.txt").write_text("") for i in range(5)],
        "skipped (not an image by its name): '0.txt', '1.txt', '2.txt' and 2 more",
    ),
    "an image of no class": (
        lambda root: write_image(root / "logo.png", pictures(1, 0)[0]),
        "skipped (not in a class folder): 'logo.png'",
    ),
}


@pytest.mark.parametrize("name", STRAYS)
@pytest.mark.parametrize("split", ["", "train"])
def test_what_is_no_image_of_a_class_is_passed_over_and_named(name: str, split: str, tmp_path: Path):
    make, line = STRAYS[name]
    root = write_classes(tmp_path / split, "cat", "dog")
    make(root)
    data = load_images(tmp_path)
    assert per_class(data) == {"cat": 10, "dog": 10}
    assert [note.replace("'train/", "'") for note in skipped(data)] == [line]


def test_images_in_an_empty_looking_split_are_named(tmp_path: Path):
    write_classes(tmp_path, "train/cat", "train/dog", "test")
    data = load_images(tmp_path)
    assert per_class(data) == {"cat": 10, "dog": 10}
    assert skipped(data) == [
        "'test' has no folders of classes: split 'test' is not used",
        "skipped (not in a class folder): 'test/0.png', 'test/1.png', 'test/2.png' and 7 more",
    ]


def test_links_to_folders_are_followed(tmp_path: Path):
    root = write_classes(tmp_path / "data", "a")
    write_classes(tmp_path / "elsewhere", "one", "two", each=4)
    (root / "b").mkdir()
    os.symlink(tmp_path / "elsewhere" / "one", root / "b" / "more")
    os.symlink(tmp_path / "elsewhere" / "two", root / "c")
    os.symlink(root, tmp_path / "linked")
    assert per_class(load_images(tmp_path / "linked")) == {"a": 10, "b": 4, "c": 4}


def test_a_folder_named_like_an_image_is_a_folder(tmp_path: Path):
    write_classes(tmp_path, "a", "b/x.png")
    assert per_class(load_images(tmp_path)) == {"a": 10, "b": 10}


def called(*arguments: Any) -> Any:
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "80"})


def test_wellcond_data_says_what_is_there_and_what_was_skipped(tmp_path: Path):
    write_classes(tmp_path, "train/cat", "val/cat", each=12, size=(9, 7))
    write_classes(tmp_path, "train/[b]dog[x]", each=15)
    write_image(tmp_path / "train/cat/grey.png", np.zeros((4, 4), np.uint8))
    empty_class(tmp_path)
    said = called("data", tmp_path)
    assert said.exit_code == 0, said.output
    lines = [line.split() for line in said.stdout.splitlines()]
    for expected in (
        ["class", "train", "validation"],
        ["cat", "13", "12"],
        ["[b]dog[x]", "15", "0"],
        ["all", "2", "classes", "28", "12"],
    ):
        assert expected in lines
    assert "sizes, height×width: 9×7 (24), 6×6 (15), 4×4 (1)" in said.stdout
    assert "modes: RGB (39), L (1)" in said.stdout
    assert "skipped (a folder without images): 'ferret'" in said.stdout
    assert "no test split: the validation split is the test" in said.stdout
    assert "for training: train 25, validation 3, test 12; the images differ in size" in said.stdout
    assert "--image-size N" in said.stdout
    sized = called("data", tmp_path, "--image-size", 5)
    assert "train 25, validation 3, test 12; 3×5×5, 3.0 kB, in memory" in sized.stdout  # 40 · 75 bytes


@pytest.mark.parametrize("decode", [[], ["--decode"]])
def test_wellcond_data_names_broken_images_and_fails(decode: list[str], tmp_path: Path):
    root = write_classes(tmp_path / "data", "cat", "dog", size=(40, 40))
    (root / "cat/0.png").write_bytes(b"<html>")
    half = (file := root / "dog/3.png").read_bytes()[:1500]  # truncated after the header
    file.write_bytes(half)
    found = called("data", root, *decode)
    assert found.exit_code == 2
    assert "Traceback" not in found.output
    broken = [line for line in found.stdout.splitlines() if line.startswith("broken: ")]
    assert ["0.png" in line or "3.png" in line for line in broken] == [True] * (2 if decode else 1)
    assert "not an image format known to Pillow" in broken[0]
    assert "object at" not in found.stdout
    count = (
        "2 images cannot be read; replace or remove them" if decode else "1 image cannot be read; replace or remove it"
    )
    assert found.stderr == f"error: {count}\n"


def test_wellcond_data_shows_the_digits_and_one_line_for_what_is_wrong(tmp_path: Path):
    digits = called("data")
    assert "train 1294, validation 144, test 359; 1×8×8" in digits.stdout  # as load_images' own example has it
    for arguments in (
        ["no/such/folder/here"],
        [write_classes(tmp_path, "train", "test")],
        ["digits", "--image-size", "0"],
    ):
        wrong = called("data", *arguments)
        assert wrong.exit_code == 2
        assert wrong.stderr.startswith("error: ")
        assert len(wrong.stderr.splitlines()) == 1
    one = called("data", write_classes(tmp_path / "one", "cat"))
    assert ["cat", "10"] in [line.split() for line in one.stdout.splitlines()], "what is there is shown all the same"
    assert "has only one class" in one.stderr


def test_images_of_several_sizes_train_with_an_image_size(tmp_path: Path):
    root = write_classes(tmp_path / "data", "cat", each=12, size=(9, 7))
    write_classes(root, "dog", each=12, size=(6, 8))
    options = ["--model", "resnet8", "--width", "4", "--epochs", "1", "--batch-size", "4", "--data", root]
    refused = called("train", *options, "--out", tmp_path / "run")
    assert refused.exit_code == 2
    assert "bring all images to one size by --image-size N" in refused.stderr
    assert not (tmp_path / "run").exists()
    run = called("train", *options, "--image-size", 6, "--out", tmp_path / "run")
    assert run.exit_code == 0, run.output
    seen = called("inspect", tmp_path / "run", "--batches", 1)
    assert seen.exit_code == 0, seen.output
    compared = called(
        *("compare", *options, "--image-size", 6, "--norm", "batch", "--treat", "none", "--seeds", 1),
        *("--out", tmp_path / "comparison"),
    )
    assert compared.exit_code == 0, compared.output


def test_what_is_skipped_is_said_before_a_training_by_one_process(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    empty_class(write_classes(tmp_path, "cat", "dog"))
    line = "skipped (a folder without images): 'ferret'"
    for rank, said in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        caplog.clear()
        assert line in load_images(tmp_path).notes
        assert (line in caplog.text) == said
