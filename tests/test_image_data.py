"""Images from every source: the same pixels, labels and splits; clear errors for what cannot be used."""

from __future__ import annotations

import io
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from image_files import CLASSES, as_files, picture_file, pictures, write_image, write_parquet
from wellcond.experiments.data.draws import stratified_split
from wellcond.experiments.data.images import ImageSet
from wellcond.experiments.data.load import ImageData, load_images
from wellcond.experiments.errors import DataError

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what `datasets` stores inside the test's folder, and its progress bars out of the output."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    datasets.disable_progress_bars()


TRAIN, TEST = pictures(30, 1), pictures(9, 2)
TRAIN_LABELS, TEST_LABELS = [i % 3 for i in range(30)], [i % 3 for i in range(9)]


def table(images: np.ndarray, labels: list[int], label: str = "label") -> Any:
    features = datasets.Features({"img": datasets.Image(), label: datasets.ClassLabel(names=list(CLASSES))})
    rows = {"img": [{"bytes": f, "path": None} for f in as_files(images)], label: labels}
    return datasets.Dataset.from_dict(rows, features=features)


def hub_layout(root: Path, train: str = "train-00000-of-00001.parquet", test: str = "test-00000-of-00001.parquet"):
    write_parquet(root / train, as_files(TRAIN), TRAIN_LABELS)
    write_parquet(root / test, as_files(TEST), TEST_LABELS)
    return root


def image_folder(root: Path) -> Path:
    for split, images, labels in (("train", TRAIN, TRAIN_LABELS), ("test", TEST, TEST_LABELS)):
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            file = root / split / CLASSES[label] / f"test-{i}.png"  # a name that must not be taken for a split
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(picture_file(image))
    return root


def undescribed(root: Path) -> Path:
    for name, images, labels in (("train", TRAIN, TRAIN_LABELS), ("test", TEST, TEST_LABELS)):
        words = [CLASSES[label] for label in labels]
        write_parquet(root / f"{name}.parquet", as_files(images), words, label="target", described=False)
    return root


SOURCES = {
    "parquet": hub_layout,
    "parquet in data/": lambda root: hub_layout(root, "data/train-0.parquet", "data/test-0.parquet") and root,
    "parquet in folders of splits": lambda root: hub_layout(root, "train/0000.parquet", "test/0000.parquet") and root,
    "parquet as a string": lambda root: str(hub_layout(root)),
    "parquet in a folder with signs": lambda root: hub_layout(root / "a [1] é*"),
    "parquet without a description, labels as words": undescribed,
    "folders of images": image_folder,
    "DatasetDict": lambda root: datasets.DatasetDict(train=table(TRAIN, TRAIN_LABELS), test=table(TEST, TEST_LABELS)),
}


def counted(*sets: ImageSet) -> Counter[tuple[bytes, int]]:
    """The images with their labels, whatever their order."""
    return Counter(
        (image.numpy().tobytes(), int(label))
        for s in sets
        for image, label in zip(*s.batch(range(len(s))), strict=True)
    )


def expected(images: np.ndarray, labels: list[int]) -> Counter[tuple[bytes, int]]:
    return Counter((image.tobytes(), label) for image, label in zip(images, labels, strict=True))


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("budget", [2**30, 0], ids=["in memory", "decoded when read"])
def test_every_source_gives_the_pixels_and_labels_that_were_written(name: str, budget: int, tmp_path: Path):
    data = load_images(SOURCES[name](tmp_path / "source"), memory_budget=budget)
    assert data.train.in_memory == (budget > 0)
    assert data.classes == CLASSES
    assert (data.in_channels, data.image_size, data.num_classes) == (3, (6, 6), 3)
    assert counted(data.train, data.validation) == expected(TRAIN, TRAIN_LABELS)
    assert counted(data.test) == expected(TEST, TEST_LABELS)
    assert len(data.validation) == 3
    assert data.notes == ()


def test_arrays_in_memory_are_taken_as_they_are():
    images, labels = pictures(50, 0), np.arange(50) % 5 + 10
    data = load_images((images, labels))
    assert data.classes == ("class 10", "class 11", "class 12", "class 13", "class 14")
    assert counted(data.train, data.validation, data.test) == expected(images, (labels - 10).tolist())
    grey = load_images((torch.from_numpy(images[:, 0]), torch.from_numpy(labels)))
    assert (grey.in_channels, grey.image_size) == (1, (6, 6))


def test_digits_are_scikit_learns_with_every_level_spread_to_255():
    from sklearn.datasets import load_digits

    truth: Any = load_digits()
    data = load_images("digits")
    assert (data.in_channels, data.image_size, data.classes) == (1, (8, 8), tuple("0123456789"))
    found = counted(data.train, data.validation, data.test)
    levels = np.array([round(v * 255 / 16) for v in range(17)], np.uint8)
    assert found == expected(levels[truth.images.astype(int)], truth.target.tolist())
    assert not data.flip, "a mirrored digit is another sign"


def test_the_test_images_are_the_same_for_every_seed_and_the_validation_images_are_not():
    a, b = load_images("digits", seed=0), load_images("digits", seed=1)
    assert counted(a.test) == counted(b.test)
    assert counted(a.validation) != counted(b.validation)
    assert counted(a.validation) == counted(load_images("digits", seed=0).validation)


def test_a_published_validation_split_is_used_as_such_beside_a_test_split(tmp_path: Path):
    root, held = hub_layout(tmp_path / "source"), pictures(6, 3)
    write_parquet(root / "validation-0.parquet", as_files(held), [0, 1, 2, 0, 1, 2])
    data = load_images(root)
    assert counted(data.validation) == expected(held, [0, 1, 2, 0, 1, 2])
    assert counted(data.train) == expected(TRAIN, TRAIN_LABELS)


def test_without_a_test_split_the_validation_split_is_the_test_and_that_is_said(tmp_path: Path, caplog: Any):
    write_parquet(tmp_path / "s/train.parquet", as_files(TRAIN), TRAIN_LABELS)
    write_parquet(tmp_path / "s/valid.parquet", as_files(TEST), TEST_LABELS)
    data = load_images(tmp_path / "s")
    assert counted(data.test) == expected(TEST, TEST_LABELS)
    assert counted(data.train, data.validation) == expected(TRAIN, TRAIN_LABELS)
    assert "no test split" in data.notes[0]
    assert "no test split" in caplog.text


def test_without_any_other_split_a_fifth_of_each_class_is_the_test_and_that_is_said(tmp_path: Path, caplog: Any):
    write_parquet(tmp_path / "all.parquet", as_files(TRAIN), TRAIN_LABELS)
    for source in (tmp_path / "all.parquet", (TRAIN, TRAIN_LABELS)):
        caplog.clear()
        data = load_images(source)
        assert data.test.labels.bincount().tolist() == [2, 2, 2]
        assert counted(data.train, data.validation, data.test) == expected(TRAIN, TRAIN_LABELS)
        assert "no test split" in data.notes[0]
        assert "no test split" in caplog.text


def test_a_test_split_with_withheld_labels_is_not_used(tmp_path: Path):
    root = hub_layout(tmp_path / "source")
    write_parquet(root / "test-00000-of-00001.parquet", as_files(TEST), [-1] * 9)
    data = load_images(root)
    assert "withheld" in data.notes[0]
    assert counted(data.train, data.validation, data.test) == expected(TRAIN, TRAIN_LABELS)


@pytest.mark.parametrize(
    ("name", "repository", "label"),
    [
        ("cifar10", "uoft-cs/cifar10", "label"),
        ("cifar100", "uoft-cs/cifar100", "fine_label"),
        ("me/it:big", "me/it", "label"),
    ],
)
def test_hub_names_reach_datasets_and_their_columns_are_found(
    name: str, repository: str, label: str, monkeypatch: pytest.MonkeyPatch
):
    """The hub is replaced here; the columns and their features are as uoft-cs/cifar10 and cifar100 have them."""
    asked: list[Any] = []

    def load_dataset(path: str, configuration: str | None) -> Any:
        asked.append((path, configuration))
        both = datasets.DatasetDict(train=table(TRAIN, TRAIN_LABELS, label), test=table(TEST, TEST_LABELS, label))
        if label == "fine_label":
            coarse = datasets.Features({"coarse_label": datasets.ClassLabel(names=["x", "y"])})["coarse_label"]
            both = both.map(lambda row: {"coarse_label": 0}).cast_column("coarse_label", coarse)
        return both

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *args, **options: None)
    data = load_images(name)
    assert asked == [(repository, "big" if name == "me/it:big" else None)]
    assert data.classes == CLASSES
    assert counted(data.test) == expected(TEST, TEST_LABELS)


def test_an_unreachable_hub_is_a_short_error_at_once_and_what_was_downloaded_still_loads(
    monkeypatch: pytest.MonkeyPatch,
):
    def unreachable(*args: Any, **options: Any) -> None:
        raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    start = time.perf_counter()
    with pytest.raises(DataError, match=r"'some/where' is not on this machine and the hub cannot be reached"):
        load_images("some/where")
    assert time.perf_counter() - start < 5, "datasets itself retries for over 20 s"
    assert not datasets.config.HF_HUB_OFFLINE, "put back"

    def only_offline(path: str, configuration: str | None) -> Any:
        assert datasets.config.HF_HUB_OFFLINE
        return datasets.DatasetDict(train=table(TRAIN, TRAIN_LABELS), test=table(TEST, TEST_LABELS))

    monkeypatch.setattr(datasets, "load_dataset", only_offline)
    assert counted(load_images("some/where").test) == expected(TEST, TEST_LABELS)


def test_mixed_modes_become_rgb_and_all_grey_stays_one_channel():
    ramp = np.arange(36, dtype=np.uint8).reshape(6, 6) * 7
    colour = pictures(1, 5)[0]
    palette = Image.fromarray(ramp % 2).convert("P")
    palette.putpalette([10, 20, 30, 200, 100, 50])
    two = np.array([[10, 20, 30], [200, 100, 50]], np.uint8)
    alpha = np.concatenate([colour, ramp[None]])
    bits = Image.fromarray((ramp % 2 * 255).astype(np.uint8)).convert("1")
    cases: list[tuple[Image.Image, np.ndarray]] = [
        (Image.fromarray(ramp), np.stack([ramp] * 3)),
        (palette, two[ramp % 2].transpose(2, 0, 1)),
        (Image.fromarray(alpha.transpose(1, 2, 0)), colour),
        (Image.fromarray(np.stack([ramp, ramp[::-1]], -1)), np.stack([ramp] * 3)),
        (bits, np.stack([ramp % 2 * 255] * 3)),
        (Image.fromarray(colour.transpose(1, 2, 0)), colour),
    ]
    assert [image.mode for image, _ in cases] == ["L", "P", "RGBA", "LA", "1", "RGB"]
    for chosen, channels in ((cases, 3), ([cases[i] for i in (0, 3, 4)], 1)):
        images = [image for image, _ in chosen] * 6
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        rows = {"image": images, "label": [i % 2 for i in range(len(images))]}
        one = datasets.Dataset.from_dict(rows, features=features)
        for budget in (2**30, 0):
            data = load_images(datasets.DatasetDict(train=one, test=one), memory_budget=budget)
            truth = np.stack([pixels[:channels] for _, pixels in chosen])
            found, _ = data.test.batch(range(len(chosen)))
            np.testing.assert_array_equal(found.numpy(), truth)


def test_photographs_are_turned_upright_as_their_exif_says():
    pixels = pictures(1, 0, (4, 6))[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held so that the picture has to be turned a quarter clockwise
    rows = {"image": [{"bytes": picture_file(pixels, exif=exif), "path": None}] * 8, "label": [0, 1] * 4}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(2)})
    data = load_images({"train": datasets.Dataset.from_dict(rows, features=features)})
    assert data.image_size == (6, 4)
    np.testing.assert_array_equal(data.train.images[torch.tensor([0])][0], np.rot90(pixels, -1, (1, 2)))


@pytest.mark.parametrize("budget", [2**30, 0])
def test_image_size_scales_the_shorter_side_and_takes_the_middle(budget: int, tmp_path: Path):
    """Images of three vertical bands, 8 and 16 pixels high: the middle square of each is one colour."""
    files = []
    for height in (8, 16):
        bands = np.zeros((3, height, 3 * height), np.uint8)
        bands[0, :, :height], bands[1, :, height : 2 * height], bands[2, :, 2 * height :] = 200, 100, 50
        files += [picture_file(bands)] * 10
    write_parquet(tmp_path / "train.parquet", files, [0, 1] * 10)
    data = load_images(tmp_path, image_size=4, memory_budget=budget)
    middle = np.zeros((3, 4, 4), np.uint8)
    middle[1] = 100
    for image, _ in data.train:
        # the filter reaches over the bands' edges at the border only
        np.testing.assert_array_equal(image[..., 1:-1], middle[..., 1:-1])
    arrays = load_images((pictures(20, 0, (4, 8)) // 255 + 7, [0, 1] * 10), image_size=2)
    assert arrays.image_size == (2, 2)
    assert arrays.train.images[torch.arange(3)].unique().tolist() == [7]


@pytest.mark.parametrize("budget", [2**30, 0])
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_greys_of_16_bits_keep_the_uppermost_8_of_those_in_use(bits: int, budget: int, tmp_path: Path):
    """A scanner's 12 bits in a file of 16 would else be black; all images by one rule, so that they stay comparable."""
    scans = np.random.default_rng(0).integers(0, 2**bits, (20, 5, 7), dtype=np.uint16)
    scans[:, 0, 0] = 2**bits - 1
    scans[1:] //= 2  # a darker image stays darker
    write_parquet(tmp_path / "train.parquet", [picture_file(image) for image in scans], [0, 1] * 10)
    data = load_images(tmp_path, memory_budget=budget)
    truth = (scans // 2 ** (bits - 8)).astype(np.uint8)[:, None]
    assert counted(data.train, data.validation, data.test) == expected(truth, [0, 1] * 10)
    assert [note for note in data.notes if "bits" in note] == (
        [f"greys of {bits} bits: the uppermost 8 are used"] if bits > 8 else []
    )
    assert load_images(tmp_path, image_size=4, memory_budget=budget).image_size == (4, 4)


def test_an_image_of_200_megapixels_is_scaled_like_any_other(tmp_path: Path):
    huge = Image.new("1", (20_000, 10_010))
    huge.paste(1, (10_000, 0, 20_000, 10_010))
    huge.save(buffer := io.BytesIO(), "PNG", compress_level=1)
    files = [buffer.getvalue(), *as_files(pictures(19, 0, channels=1))]
    write_parquet(tmp_path / "train.parquet", files, [0, 1] * 10)
    data = load_images(tmp_path, image_size=4)
    # The middle square has as much of either half; the filter reaches over the edge between them.
    rows = {image[:1] + image[3:4] for image, _ in counted(data.train, data.validation, data.test)}
    assert b"\x00\xff" in rows


@pytest.mark.parametrize("name", ["notes", ".cache/train", "._train-0", "meta/labels", "assets/figure.png"])
def test_a_stray_file_beside_parquet_files_is_named_and_not_used(name: str, tmp_path: Path):
    root = hub_layout(tmp_path / "source")
    if name.endswith(".png"):
        write_image(root / name, pictures(1, 0)[0])
    elif "." in name:  # as macOS and Jupyter leave them
        (file := root / f"{name}.parquet").parent.mkdir(exist_ok=True)
        file.write_bytes(b"\0")
    else:
        (file := root / f"{name}.parquet").parent.mkdir(exist_ok=True)
        datasets.Dataset.from_dict({"number": [1, 2]}).to_parquet(file)
    data = load_images(root)
    assert counted(data.test) == expected(TEST, TEST_LABELS)
    (note,) = data.notes
    assert note.startswith("skipped (")
    assert name.split("/")[0] in note


def test_a_split_of_another_name_and_classes_that_look_alike_are_mentioned():
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    rows = {"image": [{"bytes": f, "path": None} for f in as_files(TRAIN)], "label": ["dog", "doG", "a"] * 10}
    one = datasets.Dataset.from_dict(rows, features=features)
    data = load_images(datasets.DatasetDict(train=one, test=one, extra=one))
    assert data.classes == ("a", "doG", "dog")
    assert data.notes == ("split 'extra' is not used", "classes that differ in case or spaces only: 'doG', 'dog'")


def test_limit_keeps_that_many_of_each_split_in_proportion_of_the_classes():
    labels = [0] * 300 + [1] * 100
    data = load_images((pictures(400, 0), labels), limit=40)
    assert [len(s) for s in (data.train, data.validation, data.test)] == [40, 32, 40]
    assert data.train.labels.bincount().tolist() == [30, 10]
    assert data.test.labels.bincount().tolist() == [30, 10]
    same = load_images((pictures(400, 0), labels), limit=40, seed=9)
    assert counted(same.test) == counted(data.test), "tests are comparable between seeds"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=80),
    st.floats(0.02, 0.98),
    st.integers(0, 2**40),
)
def test_a_stratified_split_is_one_and_gives_each_class_its_share(labels: list[int], fraction: float, seed: int):
    target = torch.tensor(labels)
    kept, held = stratified_split(target, fraction, seed)
    assert sorted(torch.cat([kept, held]).tolist()) == list(range(len(labels)))
    again, _ = stratified_split(target, fraction, seed)
    assert torch.equal(kept, again)
    for label in set(labels):
        n, out = labels.count(label), int((target[held] == label).sum())
        assert min(n - 1, int(fraction * n)) <= out <= min(n - 1, fraction * n + 1)
    if len(held) != round(fraction * len(labels)):
        at_last = [int((target[held] == label).sum()) == labels.count(label) - 1 for label in set(labels)]
        assert len(held) < fraction * len(labels)
        assert any(at_last), "fewer are held out only where a class has to keep its last image"


def test_statistics_are_those_of_the_training_pixels():
    data = load_images((pictures(700, 4) // 3, np.arange(700) % 2))
    mean, std = data.channel_statistics()
    pixels = data.train.images[torch.arange(len(data.train))].numpy().astype(np.float64)
    # one rounding to float32 of a float64 result: 2⁻²⁴ relative, and a little for the float64 sums
    np.testing.assert_allclose(mean, pixels.mean((0, 2, 3)), rtol=2**-23)
    np.testing.assert_allclose(std, pixels.std((0, 2, 3)), rtol=2**-23)
    flat = load_images((np.full((20, 1, 2, 2), 9, np.uint8), [0, 1] * 10))
    assert [t.tolist() for t in flat.channel_statistics()] == [[9.0], [1.0]]


@pytest.mark.parametrize("budget", [2**30, 0])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_plain_data_loader_reads_an_image_set(budget: int, workers: int, tmp_path: Path):
    data = load_images(hub_layout(tmp_path / "source"), memory_budget=budget)
    loader = DataLoader(data.test, batch_size=4, num_workers=workers)
    images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    assert torch.equal(labels, torch.tensor(TEST_LABELS))
    assert torch.equal(images, torch.from_numpy(TEST))
    image, label = data.test[5]
    assert torch.equal(image, images[5])
    assert label == labels[5]


def test_no_code_of_a_data_set_is_run_and_nothing_is_unpickled(tmp_path: Path):
    import pickle

    root, trap = image_folder(tmp_path / "source"), tmp_path / "ran"

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (trap,)

    (root / "source.py").write_text(f"open({str(trap)!r}, 'w')\n")
    (root / "train.pkl").write_bytes(pickle.dumps(Trap()))
    load_images(root)
    assert not trap.exists()
    only = tmp_path / "pickles"
    only.mkdir()
    (only / "train.pkl").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(DataError, match="neither parquet files"):
        load_images(only)
    assert not trap.exists()


GOOD = as_files(TRAIN)
DEEP = np.arange(36, dtype=np.uint16).reshape(6, 6) * 1000


def with_labels(labels: Any, **options: Any):
    """A source of good images under other labels or columns."""
    return lambda root: write_parquet(root / "train.parquet", GOOD, labels, **options)


def in_test(labels: Any, **options: Any):
    """A source with these labels in test, and two classes in training."""

    def make(root: Path) -> None:
        training = ["cat", "dog"] * 15 if isinstance(labels[0], str) else [0, 1] * 15
        write_parquet(root / "train.parquet", GOOD, training, **options)
        write_parquet(root / "test.parquet", GOOD, labels, **options)

    return make


def with_image(data: bytes | None):
    """A source whose image 4 is another."""
    return lambda root: write_parquet(root / "train.parquet", [*GOOD[:4], data, *GOOD[5:]], TRAIN_LABELS)


def truncated(root: Path) -> None:
    file = hub_layout(root) / "train-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:200])


def two_data_sets(root: Path) -> None:
    hub_layout(root / "a")
    hub_layout(root / "b")


def other_columns_in_test(root: Path) -> None:
    with_labels(TRAIN_LABELS)(root)
    write_parquet(root / "test.parquet", GOOD, TRAIN_LABELS, label="other")


BROKEN = {
    # what is wrong: how to make it (the source, or None where it is the folder), what is said
    "missing": (
        lambda root: (root / "cifar100").mkdir() or root / "cifar10O",
        r"no such path.*did you mean 'cifar100'",
    ),
    "relative": (lambda root: "./nowhere/at/all", r"no such path: 'nowhere/at/all'"),
    "typo": (
        lambda root: "cifra10",
        r"unknown data set 'cifra10'; did you mean 'cifar10'\?.*cifar10, cifar100, digits",
    ),
    "no name": (lambda root: "two words", r"'two words' is not the name of a data set"),
    "empty folder": (lambda root: root, r"neither parquet files .* nor images.*it holds: nothing"),
    "no label": (
        with_labels(TRAIN_LABELS, label="kind", described=False),
        r"no label column.*names label, .*found the columns image \(.*\), kind \(int64\)",
    ),
    "float label": (with_labels([0.5] * 30, described=False), r"no label column.*label \((double|float64)\)"),
    "no image": (with_labels(TRAIN_LABELS, image="pic", described=False), r"no image column.*names image, img.*pic"),
    "null label": (with_labels([None, *TRAIN_LABELS[1:]]), r"split 'train': 1 rows have no label"),
    "label out of range": (with_labels([7, *TRAIN_LABELS[1:]]), r"split 'train': label 7 is outside the 3 classes"),
    "one class": (with_labels(["cat"] * 30, described=False), r"only one class"),
    "null image": (with_image(None), r"split 'train': row 4 has no image"),
    "corrupt image": (
        with_image(GOOD[4][: len(GOOD[4]) // 2]),
        r"split 'train': image 4 \('4.png'\) cannot be decoded",
    ),
    "not an image": (with_image(b"hello"), r"split 'train': image 4 \('4.png'\) cannot be decoded"),
    "other size": (
        with_image(picture_file(pictures(1, 0, (5, 7))[0])),
        r"image 4 is 5×7 pixels .*6×6.*--image-size N \(image_size=N\)",
    ),
    "floats in a file": (
        with_image(picture_file(DEEP.astype(np.float32), "TIFF")),
        r"image 4 .*cannot be decoded \(its pixels are floats; save them as integers",
    ),
    "below zero": (
        with_image(picture_file(DEEP.astype(np.int32) - 1000, "TIFF")),
        r"image 4 .*cannot be decoded \(it has pixels below zero, -1000",
    ),
    "label -1": (
        with_labels([-1, *TRAIN_LABELS[1:]], described=False),
        r"split 'train': 1 rows have the label '-1', which means no label; remove them",
    ),
    "label -1 of a description": (with_labels([-1, *TRAIN_LABELS[1:]]), r"1 rows have the label '-1'"),
    "label -1 of an array": (lambda root: (TRAIN, [-1, *TRAIN_LABELS[1:]]), r"labels: 1 rows have the label '-1'"),
    "empty label": (with_labels([" ", *["cat", "dog"] * 14, "cat"], described=False), r"1 rows have the label ' '"),
    "another spelling in test": (
        in_test(["cat", "doG"] * 15, described=False),
        r"split 'test' has classes that training lacks: doG; did you mean 'dog'\?",
    ),
    "another number in test": (in_test([0, 7] * 15, described=False), r"'test' has classes that training lacks: 7"),
    "two validation splits": (
        lambda root: {key: table(TRAIN, TRAIN_LABELS) for key in ("train", "val", "valid")},
        r"'val' and 'valid', which both mean validation",
    ),
    "a file of no split": (
        lambda root: write_parquet(hub_layout(root) / "more.parquet", GOOD, TRAIN_LABELS),
        r"which split are more.parquet of\? Name the files train-\*.parquet",
    ),
    "files that may be of a split": (
        lambda root: hub_layout(root, "pets_train.parquet", "pets_test.parquet") and None,
        r"which split are pets_test.parquet, pets_train.parquet of\?",
    ),
    "images as well as parquet": (
        lambda root: image_folder(hub_layout(root)) and None,
        r"holds images in folders and parquet files with images \(test-0.*, train-0.*\): remove one",
    ),
    "truncated parquet": (truncated, r"parquet files cannot be read"),
    "no train": (
        lambda root: write_parquet(root / "test.parquet", GOOD, TRAIN_LABELS),
        r"no split 'train', only: test",
    ),
    "two data sets": (two_data_sets, r"several data sets; name one: '.*a', '.*b'"),
    "empty": (lambda root: {"train": table(TRAIN, TRAIN_LABELS).select([])}, r"split 'train' is empty"),
    "other columns in test": (other_columns_in_test, r"cannot be read together|no column 'label'"),
    "new class in test": (
        lambda root: (image_folder(root) / "test" / "cat").rename(root / "test" / "cow") and None,
        r"test' has folders of classes that training lacks: cow",
    ),
    "corrupt file": (
        lambda root: (image_folder(root) / "train/dog/test-1.png").write_bytes(b"\x89PNG\r\n\x1a\n garbage") and None,
        r"image \d+ \('.*test-1.png'\) cannot be decoded",
    ),
    "floats": (lambda root: (TRAIN / 255.0, TRAIN_LABELS), r"must be uint8 with values 0 to 255, got torch.float64"),
    "channels last": (
        lambda root: (TRAIN.transpose(0, 2, 3, 1), TRAIN_LABELS),
        r"got \(30, 6, 6, 3\); move the channels",
    ),
    "labels too few": (lambda root: (TRAIN, TRAIN_LABELS[1:]), r"labels must be 30 integers"),
    "too few": (lambda root: (TRAIN[:2], [0, 1]), r"too few"),
}


@pytest.mark.parametrize("budget", [2**30, 0])
@pytest.mark.parametrize("kind", BROKEN)
def test_bad_images_are_named_before_training_or_when_read(kind: str, budget: int, tmp_path: Path):
    make, message = BROKEN[kind]
    (root := tmp_path / "source").mkdir()
    made = make(root)
    with pytest.raises(DataError, match=message):
        everything(load_images(root if made is None else made, memory_budget=budget))


def everything(data: ImageData) -> None:
    for images in (data.train, data.validation, data.test):
        images.batch(range(len(images)))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"image_size": 0}, "image_size .* 0"), ({"limit": 0}, "limit .* 0"), ({"validation": 1.0}, "validation .* 1.0")],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(DataError, match=message):
        load_images("digits", **options)


def test_a_source_of_another_kind_is_a_type_error():
    with pytest.raises(TypeError, match="int"):
        load_images(3)  # pyright: ignore[reportArgumentType]
