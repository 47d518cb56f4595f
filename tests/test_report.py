"""The report says what the runs found, needs nothing but itself, and loses nothing; inspect measures what is there."""

from __future__ import annotations

import base64
import json
import logging
import os
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from small_runs import checkpoint, small
from test_cli import SMALL, call, one_line
from wellcond.experiments import folders
from wellcond.experiments.compare import compare
from wellcond.experiments.data.batches import ImageDataModule
from wellcond.experiments.data.load import load_images
from wellcond.experiments.errors import FolderError, RunError
from wellcond.experiments.files import read_csv
from wellcond.experiments.inspect import inspect, newest_run
from wellcond.experiments.report import report
from wellcond.experiments.results.summary import labels
from wellcond.experiments.run.command_line import command
from wellcond.experiments.run.config import RunConfig, run_config
from wellcond.experiments.run.train import run
from wellcond.experiments.run.training import Classifier


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of two configurations with two seeds."""
    out = tmp_path_factory.mktemp("done") / "comparison"
    compare([small(epochs=2, treat=treat, seed=seed) for treat in ("none", "ow+nog") for seed in (0, 1)], out)
    return out


class Page:
    """A well-formed page: its tables as lists of rows of cells, its images, its tags."""

    def __init__(self, text: str) -> None:
        root = ElementTree.fromstring(text)
        self.tables = [
            [["".join(cell.itertext()) for cell in row] for row in table.iter("tr")] for table in root.iter("table")
        ]
        self.images = [image.attrib for image in root.iter("img")]
        self.tags = {element.tag for element in root.iter()}


def test_the_page_says_what_the_runs_found_and_needs_nothing_else(done: Path, tmp_path: Path) -> None:
    path, notes = report([done], tmp_path / "report")
    text = path.read_text()
    page = Page(text)
    assert notes == []
    assert not page.tags & {"link", "iframe", "object"}
    assert all("src" not in script.attrib for script in ElementTree.fromstring(text).iter("script"))
    assert not re.search(r"(src|href|url)\s*[=(]\s*['\"]?(?!data:)[\w/.]", text.split("</style>")[1])
    results, found, conditioning, runs, options = page.tables
    assert [row[:2] for row in found[1:]] == [["zca+ow+nog", "zca"]]
    assert [row[:2] for row in conditioning[1:]] == [["zca+ow+nog", "zca"]]
    rows = read_csv(done / "results.csv")
    assert [row[0] for row in results[1:]] == ["zca", "zca+ow+nog"] == [row["label"] for row in rows]
    for shown, row in zip(results[1:], rows, strict=True):
        mean, std = (100 * float(row[f"test_error_{name}"]) for name in ("mean", "std"))
        assert shown[1] == f"{mean:.2f} ± {std:.2f}"
        assert shown[3:10] == [
            "norm1",
            f"{float(row['kappa']):.3g}",
            f"{float(row['kappa_eps']):.3g}",
            "8/8",
            f"{float(row['effective_rank']):.3g}",
            row["failures"],
            f"{float(row['seconds_per_step']):.4f}",
        ]
    assert "<b>" in text  # the best of a column
    assert len(runs) == 1 + 4
    for shown in runs[1:]:
        found = json.loads((Path(shown[-1]) / "result.json").read_text())
        assert shown[2] == f"{100 * found['test_error']:.2f}"
        assert shown[1] == str(found["config"]["seed"])
    assert ["treat", "none, ow+nog"] in options
    for name, image in zip(("condition", "learning"), page.images, strict=True):
        kind, data = image["src"].split(",")
        assert kind == "data:image/svg+xml;base64"
        assert base64.b64decode(data) == (path.parent / f"{name}.svg").read_bytes()
        assert len(image["alt"]) > 20
        assert (path.parent / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def luminance(colour: str) -> float:
    """Relative luminance of `#rrggbb`, as WCAG 2 defines it."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def colours_in_the_dark(svg: ElementTree.Element) -> tuple[set[str], set[str], set[str]]:
    """Of lines and text, and of areas, after the rules of the style sheet for the dark; and of text alone."""
    rules: dict[tuple[str, str], str] = {}
    for style in svg.iter("{http://www.w3.org/2000/svg}style"):
        sheet = (style.text or "").partition("(prefers-color-scheme: dark)")[2]
        text = re.search(r"text { fill: (#\w+) !important", sheet)
        for selectors, kind, colour in re.findall(r"(\[style.*?) { (\w+): (#\w+) !important; }", sheet):
            rules |= {(kind, old): colour for old in re.findall(rf"{kind}: (#\w+)", selectors)}
        if sheet:
            assert text is not None
            break
    else:
        pytest.fail("it has no rules for the dark")
    seen: dict[str, set[str]] = {"stroke": set(), "fill": set()}
    for element in svg.iter():
        for kind, colour in re.findall(r"(stroke|fill): (#\w+)", element.get("style", "")):
            seen[kind].add(rules.get((kind, colour), colour))
    return seen["stroke"], seen["fill"], {text[1]}


def test_figures_are_readable_in_the_dark_and_stacked_on_phones(done: Path, tmp_path: Path) -> None:
    """On the dark paper every line has a contrast of 3 : 1 and text one of 7 : 1 at least (WCAG 2: 1.4.11, 1.4.6)."""
    path, _ = report([done], tmp_path / "report")
    text = path.read_text()
    pages = re.search(r"prefers-color-scheme: dark\) {\s*:root { .*--page: (#\w+)", text)
    assert pages is not None
    figures = [image for image in Page(text).images if image["src"]]
    stacked = [source.get("srcset", "") for source in ElementTree.fromstring(text).iter("source")]
    assert len(figures) == len(stacked) == 2
    assert text.count('<source media="(max-width: 40rem)"') == 2
    for data, is_stacked in [*((image["src"], False) for image in figures), *((data, True) for data in stacked)]:
        svg = ElementTree.fromstring(base64.b64decode(data.split(",")[1]))
        _, _, width, height = map(float, svg.attrib["viewBox"].split())
        assert (height > width) == is_stacked
        lines, areas, words = colours_in_the_dark(svg)
        assert pages[1] in areas  # the paper
        assert "#ffffff" not in areas
        assert min(contrast(colour, pages[1]) for colour in lines - {"#b0b0b0"}) >= 3  # the grid is no content
        assert min(contrast(colour, pages[1]) for colour in words) >= 7


def test_a_run_that_was_made_longer_says_so_and_how_it_is_made_again(tmp_path: Path) -> None:
    run(small(epochs=1), tmp_path / "a run")
    run(small(epochs=3), tmp_path / "a run", resume=True)
    path, (note,) = report([tmp_path / "a run"], tmp_path / "report")
    assert "a run' was extended: 1, then 3 epochs" in note
    (lines,) = [pre.text for pre in ElementTree.fromstring(path.read_text()).iter("pre")]
    assert lines is not None
    first, then = map(shlex.split, lines.splitlines())
    assert first[:2] == ["wellcond", "train"]
    assert "--epochs 1" in " ".join(first)
    assert then == ["wellcond", "train", "--out", first[-1], "--resume", "--epochs", "3"]
    assert Path(first[-1]).resolve() == tmp_path / "a run"


def test_a_run_that_is_being_made_longer_is_reported_as_it_was(tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "run"
    before = run(small(epochs=1), out)
    _, notes = report([out], tmp_path / "before")
    assert notes == []
    real = Classifier.training_step

    def training_step(self, batch, batch_index):
        if self.global_step == 9:  # of 12; the second epoch is finished, and logged
            raise KeyboardInterrupt
        return real(self, batch, batch_index)

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "training_step", training_step)
        with pytest.raises(KeyboardInterrupt):
            run(small(epochs=3), out, resume=True)
    assert len(read_csv(out / "metrics.csv")) == 2
    path, (note,) = report([out], tmp_path / "after")
    assert "is being extended and not finished: reported is its result after 1 epoch; go on" in note
    results, runs, _ = Page(path.read_text()).tables
    assert results[1][1] == f"{100 * before.test_error:.2f}"
    assert [row[0] for row in runs[1:]] == ["zca"]
    for name in ("condition.svg", "learning.svg"):  # the curves end where the result does
        assert (tmp_path / "after" / name).read_text() == (tmp_path / "before" / name).read_text()
    (lines,) = [pre.text for pre in ElementTree.fromstring(path.read_text()).iter("pre")]
    assert lines is not None
    assert lines.count("wellcond train") == 1
    assert "--epochs 1" in lines
    run(small(epochs=3), out, resume=True)
    _, (note,) = report([out], tmp_path / "after")
    assert "was extended: 1, then 3 epochs" in note


def test_what_is_not_finished_is_left_out_and_said(done: Path, tmp_path: Path) -> None:
    part = tmp_path / "part"
    shutil.copytree(done, part)
    (part / "runs" / "zca-seed1" / "result.json").unlink()
    (part / "results.parquet").unlink()  # which has the result too
    path, (note,) = report([part, part / "runs" / "zca-seed0", part / "runs"], tmp_path / "report")
    assert "zca-seed1' is not finished and left out; go on with: wellcond train --out" in note
    page = Page(path.read_text())
    assert len(page.tables[-2]) == 1 + 3  # each run once, however often it is named
    assert page.tables[0][1][1] == page.tables[0][1][2]  # one seed has no spread
    assert "is not finished" in path.read_text()
    for folder in (part / "runs").iterdir():
        (folder / "result.json").unlink(missing_ok=True)
    with pytest.raises(RunError, match="there is no finished run to report"):
        report([part], tmp_path / "report")
    assert Page(path.read_text()).tables == page.tables  # the earlier report is still there


def test_a_run_that_two_comparisons_share_is_counted_once(done: Path, tmp_path: Path) -> None:
    """As `--reuse` copies it, and once more on another number of threads."""
    shared = small(epochs=2)
    compare([shared], tmp_path / "copy", reuse=[done])
    run(replace(shared, threads=2), tmp_path / "threads")
    other = run(replace(shared, threads=2, seed=7), tmp_path / "seed")
    places = [done, tmp_path / "copy", tmp_path / "threads", tmp_path / "seed"]
    path, (note,) = report(places, tmp_path / "report")
    assert note.startswith("left out, as a run of the same configuration is reported: ")
    assert "copy/runs/zca-seed0' (as '" in note
    assert re.search("threads' .as '[^']*zca-seed0', but for its threads.$", note)
    assert note.count("(as '") == 2
    page = Page(path.read_text())
    assert [(row[0], row[1]) for row in page.tables[-2][1:]] == [
        *(("zca", "0"), ("zca", "1"), ("zca+ow+nog", "0"), ("zca+ow+nog", "1"), ("zca", "7"))
    ]
    errors = [float(row[2]) for row in page.tables[-2][1:] if row[0] == "zca"]
    assert f"{100 * other.test_error:.2f}" == page.tables[-2][-1][2]
    assert page.tables[0][1][1].startswith(f"{np.mean(errors):.2f} ± ")


def test_a_damaged_table_is_noted_where_the_folders_of_the_runs_are_there(done: Path, tmp_path: Path) -> None:
    out = tmp_path / "damaged"
    shutil.copytree(done, out)
    (out / "results.parquet").write_bytes((done / "results.parquet").read_bytes()[:100])
    path, (note,) = report([out], tmp_path / "report")
    assert "damaged/results.parquet' is not a table of results that can be read" in note
    assert note.endswith("reported are the runs whose folders are there")
    assert len(Page(path.read_text()).tables[-2]) == 1 + 4
    shutil.rmtree(out / "runs")
    with pytest.raises(RunError, match=r"no finished run to report; '.*results.parquet' is not a table"):
        report([out], tmp_path / "report")


def test_only_an_earlier_report_is_replaced(done: Path, tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="holds a comparison, not a report"):
        report([done], done)
    (tmp_path / "mine.txt").write_text("of the user")
    with pytest.raises(FolderError, match="holds files that no report made"):
        report([done], tmp_path)
    with pytest.raises(FolderError, match="holds no run; give the folder"):
        report([tmp_path], tmp_path / "report")
    report([done], tmp_path / "report")
    (tmp_path / "report" / "mine.txt").write_text("of the user")
    report([done / "runs" / "zca-seed0"], tmp_path / "report")
    assert (tmp_path / "report" / "mine.txt").exists()
    assert len(Page((tmp_path / "report" / "report.html").read_text()).tables[-2]) == 1 + 1


def test_configurations_that_share_a_short_name_are_told_apart() -> None:
    configs = [small(width=8), small(width=16), small(width=16, seed=3)]
    assert [labels(configs)(c) for c in configs] == ["zca, width 8", "zca, width 16", "zca, width 16"]
    assert labels(configs[1:])(configs[1]) == "zca"
    threads = [small(threads=1), small(threads=2)]
    assert [labels(threads)(c) for c in threads] == ["zca", "zca"]  # the same up to rounding


@pytest.mark.parametrize(
    "config",
    [
        run_config(),
        small(treat="nog+ow", seed=4, augment=True),
        run_config(data="cifar100", model="resnet50", head="gcp", augment=False, eps=1e-3, threads=2),
        run_config(data="a folder/of <images>", norm="iter", monitor_every=3),
    ],
)
def test_the_command_on_the_page_is_that_of_the_run(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[RunConfig] = []

    def run(config: RunConfig, *args: Any, **kwargs: Any) -> None:
        asked.append(config)
        raise FolderError("enough")

    monkeypatch.setattr("wellcond.experiments.run.train.run", run)
    words = shlex.split(command(config))
    assert words[0] == "wellcond"
    assert call(*words[1:]).exit_code == 2
    assert asked == [config]


def test_without_arguments_report_takes_the_comparison_or_makes_it(done: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)

    def make(out: Path) -> None:
        shutil.copytree(done, out)

    monkeypatch.setattr("wellcond.cli.report.compare", make)
    for _ in range(2):
        result = call("report")
        assert result.exit_code == 0, result.output
        assert "in report: report.html, condition.png" in result.stdout
    assert len(Page((tmp_path / "report" / "report.html").read_text()).tables[-2]) == 1 + 4
    assert "comparison/runs/zca-seed0" in (tmp_path / "report" / "report.html").read_text()


def test_a_run_that_its_comparison_has_not_begun_goes_on_with_the_comparison(done: Path, tmp_path: Path) -> None:
    shutil.copytree(done, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "runs" / "zca-seed1")
    (tmp_path / "cut" / "results.parquet").unlink()  # which has its result too
    _, (note,) = report([tmp_path / "cut"], tmp_path / "out")
    command = note.split("go on with: wellcond ")[1]
    assert command == f"compare --out {tmp_path / 'cut'} --resume"


# -- inspect ------------------------------------------------------------------------------------------------------


def test_inspect_measures_the_covariances_and_weights_of_the_checkpoint(done: Path, tmp_path: Path) -> None:
    """Against numpy, on the input of the layer in the same network."""
    run = done / "runs" / "zca+ow+nog-seed1"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    found = inspect(run, batches=3, out=tmp_path / "found.csv")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    config = RunConfig.from_dict(folders.read_config(run, "run"))
    module = Classifier(config, num_classes=10, in_channels=1)
    module.load_state_dict(checkpoint(run)["state_dict"])
    inputs: list[np.ndarray] = []
    module.model.norm1.register_forward_pre_hook(lambda layer, args: inputs.append(args[0].double().numpy()))
    images = ImageDataModule(load_images("digits", limit=130), 32, augment=False, seed=1)
    with torch.no_grad():
        for _, batch in zip(range(3), images.train_dataloader(), strict=False):
            module.train().model(images.on_after_batch_transfer(batch, 0)[0])
    for record, x in zip(found.records, inputs, strict=True):
        values = np.linalg.eigvalsh(np.cov(np.moveaxis(x, 1, 0).reshape(8, -1), bias=True))
        # eps64·κ of the covariance, with κ below 1e3
        assert record.kappa == pytest.approx(values[-1] / values[0], rel=1e-9)
        assert (record.eig_max, record.eig_min) == pytest.approx((values[-1], values[0]), rel=1e-9)
    summary = found.layers["model.norm1"]
    assert summary["kappa"] == np.median([record.kappa for record in found.records])
    assert (found.images, found.epoch, found.split) == (96, 2, "train")
    assert [row["layer"] for row in read_csv(tmp_path / "found.csv")] == ["model.norm1"] * 3
    (weight,) = found.weights
    singular = np.linalg.svd(module.model.conv1.weight.detach().double().numpy().reshape(8, -1), compute_uv=False)
    assert (weight.layer, weight.rows, weight.columns) == ("conv1", 8, 25)
    assert (weight.largest, weight.smallest) == pytest.approx((singular[0], singular[-1]), rel=1e-12)
    assert weight.largest == pytest.approx(1, abs=1e-6)  # the treatment kept it orthogonal


def test_inspect_takes_any_checkpoint_and_split_and_the_newest_run(done: Path, tmp_path: Path, monkeypatch) -> None:
    best = done / "runs" / "zca-seed0" / "checkpoints" / "best.ckpt"
    result = call(
        "inspect", best, "--split", "test", "--batches", "2", "--batch-size", "50", "--out", tmp_path / "a.csv"
    )
    assert result.exit_code == 0, result.output
    assert re.search(r"norm1 .* 8/8 ", result.stdout)
    assert "100 test images" in " ".join(result.stdout.split())
    assert len(read_csv(tmp_path / "a.csv")) == 2
    again = call("inspect", best, "--out", tmp_path / "a.csv")
    assert "is there already; choose another --out" in one_line(again)
    nowhere = call("inspect", best, "--batches", "1", "--out", tmp_path / "a.csv" / "b.csv")
    assert nowhere.exit_code == 2
    assert "a.csv'" in one_line(nowhere)
    chosen = done / "runs" / "zca-seed1" / "checkpoints" / "last.ckpt"
    later = max(path.stat().st_mtime for path in done.rglob("*.ckpt")) + 10
    os.utime(chosen, (later, later))
    assert newest_run((done / "runs", tmp_path / "nothing")) == done / "runs" / "zca-seed1"
    assert newest_run((tmp_path,)) is None
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("wellcond.cli.train.run_config", lambda: small(epochs=1))
    for said in (True, False):  # trained the first time, found the second
        result = call("inspect", "--batches", "1")
        assert result.exit_code == 0, result.output
        assert ("there is no run yet: training the default" in result.stdout) == said
        assert "runs/digits-resnet8-zca-seed0/checkpoints/last.ckpt" in result.stdout


def test_inspect_watches_a_batch_norm_where_there_is_no_spectral_layer(tmp_path: Path) -> None:
    assert call("train", *SMALL, "--norm", "batch", "--out", tmp_path / "run").exit_code == 0
    found = inspect(tmp_path / "run", batches=1)
    assert list(found.layers) == ["model.norm1"]
    assert found.weights == ()


def test_inspect_says_what_is_wrong(done: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = done / "runs" / "zca-seed0"
    colour = (torch.zeros(90, 3, 8, 8, dtype=torch.uint8), torch.arange(90) % 2)
    for options, message in [
        ({"split": "tset"}, "unknown split 'tset'; did you mean 'test'"),
        ({"batches": 0}, "batches must be at least 1, got 0"),
        ({"data": colour}, "takes images of 1 channels"),
    ]:
        with pytest.raises(ValueError, match=message):
            inspect(run, **options)
    for place in (done, tmp_path / "nowhere", tmp_path):
        with pytest.raises(FolderError, match="is not a run; give the folder of one"):
            inspect(place)
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "checkpoints" / "last.ckpt").write_bytes(b"torn")
    with pytest.raises(RunError, match=r"last.ckpt' is not a checkpoint of a run"):
        inspect(copy / "checkpoints" / "last.ckpt")
    caplog.clear()
    instead = inspect(copy, batches=1).checkpoint.name
    (said,) = [
        record.getMessage()
        for record in caplog.records
        if record.name == "wellcond" and record.levelno >= logging.WARNING
    ]
    assert instead != "last.ckpt"
    assert "last.ckpt' cannot be read (it is damaged" in said
    assert f"looking at '{instead}'" in said
    assert (copy / "checkpoints" / "last.ckpt").read_bytes() == b"torn"  # inspecting changes nothing
    state = checkpoint(run)
    state["state_dict"] = {name.replace("norm1", "norm2"): value for name, value in state["state_dict"].items()}
    torch.save(state, copy / "checkpoints" / "last.ckpt")
    with pytest.raises(RunError, match="are not those of the run beside it"):
        inspect(copy)
