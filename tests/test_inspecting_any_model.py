"""`wellcond inspect --model`: any model that can be imported, the spectrum of each of its layers as a picture, and what
is wrong with it in one line."""

from __future__ import annotations

import importlib
import sys
from itertools import count
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import nn

from helpers import relative_error
from small_runs import small
from test_cli import call, one_line
from wellcond.experiments.data.batches import ImageDataModule
from wellcond.experiments.data.load import load_images
from wellcond.experiments.files import read_csv
from wellcond.experiments.inspect import Inspection, LayerSpectrum, inspect, inspect_model
from wellcond.experiments.run.train import run
from wellcond.experiments.show.spectra import spectra_figure
from wellcond.monitor import observed_features

MODULE = """
import torch
from torch import nn
from wellcond.experiments.run.models import build_model
from wellcond.nn import DecorrelatedBatchNorm2d


def plain(num_classes, in_channels=3):
    return nn.Sequential(
        nn.Conv2d(in_channels, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 6, 3), nn.GroupNorm(2, 6),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(6), nn.Linear(6, num_classes))


def spectral():
    return build_model("resnet8", num_classes=3, norm="zca", in_channels=1, width=8)


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.never = nn.BatchNorm2d(1), nn.BatchNorm2d(1)

    def forward(self, images):
        import beside
        return {"logits": self.used(images).mean((1, 2, 3))}


class Rowwise(nn.Module):
    # cannot be followed from its code, which asks how many images there are
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), DecorrelatedBatchNorm2d(4)

    def forward(self, images):
        return self.norm(torch.cat([self.conv(image[None]) for image in images]))


class inside:
    deep = Unused


def rgb(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
def large(): return nn.Sequential(nn.Conv2d(1, 4, 9), nn.BatchNorm2d(4))
def no_norm(): return nn.Flatten()
def numbers(): return [1, 2]
def wants(path, num_classes): return nn.Identity()
def raises(): raise RuntimeError("no weights\\nhere")
def leaves(): raise SystemExit(3)
ready, text = plain(10, 1), "x"
"""
COUNT = count()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The current folder, with a module of another name for every test, and one that it imports late."""
    name = f"models_{next(COUNT)}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    (tmp_path / "beside.py").write_text("")
    (tmp_path / "broken.py").write_text("import nothing_such\n")
    (tmp_path / "wrong.py").write_text("1 +\n")
    monkeypatch.chdir(tmp_path)
    importlib.invalidate_caches()
    return name


def test_every_norm_of_a_model_is_measured_as_numpy_does(here: str, tmp_path: Path) -> None:
    found = inspect_model(f"{here}:plain", batches=2, batch_size=50, out=tmp_path / "a.csv", picture=tmp_path / "p")
    assert list(found.layers) == list(found.spectra) == ["1", "4", "7"] and found.images == 100
    assert len(read_csv(tmp_path / "a.csv")) == 6
    torch.manual_seed(0)
    model = sys.modules[here].plain(10, 1)
    inputs: dict[str, list[np.ndarray]] = {name: [] for name in found.layers}
    for name, into in inputs.items():
        model.get_submodule(name).register_forward_pre_hook(
            lambda layer, args, into=into: into.append(args[0].double().numpy())
        )
    images = ImageDataModule(load_images("digits"), 50, augment=False)
    with torch.no_grad():
        for _, batch in zip(range(2), images.train_dataloader(), strict=False):
            model(images.on_after_batch_transfer(batch, 0)[0])
    for name, arrays in inputs.items():
        each = [
            np.linalg.eigvalsh(np.cov(np.moveaxis(x, 1, 0).reshape(x.shape[1], -1), bias=True))[::-1] for x in arrays
        ]
        got = found.spectra[name]
        want = np.minimum(*each)  # of two the lower is the median, as everywhere
        # 3 × 3 pixels make the first, whatever its width; each group norm leaves its channels a mean of 0
        assert got.numerical_rank == {"1": 9, "4": 6, "7": 4}[name]
        kept = slice(got.numerical_rank)
        assert np.array(got.eigvals[kept]) == pytest.approx(want[kept], rel=1e-6)
        kappas = [values[0] / values[-1] for values in each]
        if name == "4":
            assert found.layers[name]["kappa"] == pytest.approx(np.median(kappas), rel=1e-6)
    assert found.layers["1"]["kappa"] == np.inf


def test_the_command_prints_the_table_and_draws_the_spectra(here: str, tmp_path: Path) -> None:
    result = call("inspect", "--model", f"{here}:plain", "--batches", "2", "--picture", "spectra.png")
    assert result.exit_code == 0, result.output
    assert " 9/16 " in result.stdout and f"{here}:plain; 256 train images of digits" in result.stdout
    assert "in spectra.png and spectra.svg" in result.stdout
    assert (tmp_path / "spectra.png").read_bytes().startswith(b"\x89PNG")
    text = "".join(ElementTree.fromstring((tmp_path / "spectra.svg").read_bytes()).itertext())
    for words in (f"{here}:plain", "1 (9 of 16)", "4 (6 of 6)", "7 (4 of 6)", "rank-deficient", "1/κ(P)"):
        assert words in text
    again = call("inspect", "--model", f"{here}:plain", "--picture", "spectra")
    assert again.exit_code == 2 and "'spectra.png' is there already; choose another --picture" in one_line(again)
    ready = call("inspect", "--model", f"{here}:ready", "--batches", "1", "--layers", "[47]", "--split", "test")
    assert ready.exit_code == 0 and "128 test images" in ready.stdout
    assert " 6/6 " in ready.stdout and " 4/6 " in ready.stdout and "/16 " not in ready.stdout


def test_spectral_layers_come_before_norms_and_layers_that_are_not_called_are_said(here: str) -> None:
    found = inspect_model(f"{here}:spectral", batches=1)
    assert list(found.layers) == ["norm1"] and [w.layer for w in found.weights] == ["conv1"]
    assert not found.spectra  # nobody asked for a picture
    by_pattern = inspect_model(f"{here}:spectral", batches=1, layers=["stage?.0.bn1", "norm1"])
    assert list(by_pattern.layers) == ["norm1", "stage1.0.bn1", "stage2.0.bn1", "stage3.0.bn1"]
    unused = inspect_model(f"{here}:inside.deep", batches=1)  # a class in a class, whose output is a dictionary
    assert list(unused.layers) == ["used"] and unused.lines() == ["never is not called by the network"]
    rowwise = call("inspect", "--model", f"{here}:Rowwise", "--batches", "1", "--batch-size", "9")
    assert rowwise.exit_code == 0 and " 4/4 " in rowwise.stdout and "weight of" not in rowwise.stdout
    assert one_line(rowwise).startswith("weights before the spectral layers are not shown: the forward function of")


def test_the_network_of_a_run_has_a_picture_too(tmp_path: Path) -> None:
    run(small(epochs=1), tmp_path / "run")
    found = inspect(tmp_path / "run", batches=2, layers=["norm1", "stage*.bn2"], picture=tmp_path / "p.svg")
    assert list(found.layers) == list(found.spectra)
    first, *others = found.layers
    assert first == "model.norm1" and others and all(name.endswith("bn2") for name in others)
    assert (tmp_path / "p.png").exists() and "norm1 (8 of 8)" in (tmp_path / "p.svg").read_text()
    # The same covariances as the monitor's, of two batches the lower of each eigenvalue.
    records = [record for record in found.records if record.layer == "model.norm1"]
    assert found.spectra["model.norm1"].eigvals[0] == min(record.eig_max for record in records)
    assert found.spectra["model.norm1"].eigvals[-1] == min(record.eig_min for record in records)
    wrong = call("inspect", tmp_path / "run", "--layers", "norm2")
    assert wrong.exit_code == 2 and "no layer is called 'norm2'; did you mean 'norm1'?" in one_line(wrong)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("", "'' is not a model that can be imported; write timm:resnet18"),
        ("resnet18", "'resnet18' is not a model that can be imported; write timm:resnet18"),
        ("nothing_such:make", "there is no module 'nothing_such'"),
        ("HERE.sub:make", "there is no module 'HERE.sub'"),
        ("broken:make", "importing 'broken' failed: ModuleNotFoundError: No module named 'nothing_such'"),
        ("wrong:make", "importing 'wrong' failed: SyntaxError"),
        ("HERE:plian", "'HERE' has no 'plian'; did you mean 'plain'?"),
        ("HERE:text.uper", "'HERE' has no 'text.uper'; did you mean 'upper'?"),
        ("HERE:text", "'HERE:text' is an object of class str, not a callable"),
        ("HERE:numbers", "'HERE:numbers' gave an object of class list, not a torch.nn.Module"),
        ("HERE:wants", "'HERE:wants' requires arguments path"),
        ("HERE:raises", "'HERE:raises' cannot be built: RuntimeError: no weights"),
        ("HERE:leaves", "'HERE:leaves' cannot be built: SystemExit: 3"),
        ("HERE:rgb", "'HERE:rgb' fails on images of 1 × 8 × 8: RuntimeError"),
        ("HERE:large", "'HERE:large' fails on images of 1 × 8 × 8: RuntimeError"),
        ("HERE:no_norm", "HERE:no_norm has no spectral layer and no norm to look at; choose --layers"),
    ],
)
def test_a_model_that_is_none_is_one_line(here: str, model: str, says: str) -> None:
    result = call("inspect", "--model", model.replace("HERE", here), "--batches", "1", "--out", "a.csv")
    assert result.exit_code == 2
    assert one_line(result).startswith(f"error: {says.replace('HERE', here)}")
    assert not Path("a.csv").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--picture", "a.pdf"], "the picture is PNG and SVG, got 'a.pdf'"),
        (["--picture", "nowhere/a"], "there is no folder 'nowhere' for the picture"),
        (["--layers", "8.*"], "no layer is called '8.*'"),
        (["--batch-size", "9999"], "'digits': a batch of 9999"),
        (["--batches", "0"], "batches must be at least 1, got 0"),
        (["--split", "tets"], "unknown split 'tets'; did you mean 'test'?"),
        (["--image-size", "0"], "image_size must be at least 1, got 0"),
    ],
)
def test_a_wrong_option_is_one_line_before_anything_is_written(here: str, options: list[str], says: str) -> None:
    before = {path.name for path in Path().iterdir()}
    result = call("inspect", "--model", f"{here}:plain", *options)
    assert result.exit_code == 2 and one_line(result).startswith(f"error: {says}")
    assert {path.name for path in Path().iterdir()} - {"__pycache__"} == before - {"__pycache__"}
    both = call("inspect", "somewhere", "--model", f"{here}:plain")
    assert both.exit_code == 2 and "give a run or a --model, not both" in one_line(both)


@pytest.mark.parametrize("library", ["timm", "torchvision", "transformers"])
def test_a_library_that_is_not_installed_is_named(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)  # importing it raises ModuleNotFoundError
    result = call("inspect", "--model", f"{library}:resnet18")
    assert result.exit_code == 2
    assert one_line(result) == (
        f"error: '{library}:resnet18' needs the package '{library}', which is not installed: pip install {library}"
    )


LIKE = {
    "timm": """
from torch import nn
def list_models(): return ["resnet18", "vit_tiny"]
def create_model(name, pretrained=False, num_classes=1000, in_chans=3):
    assert name == "resnet18.a1" and not pretrained and num_classes == 10
    return nn.Sequential(nn.Conv2d(in_chans, 4, 3), nn.BatchNorm2d(4))
""",
    "torchvision": """
from torch import nn
class models:
    list_models = staticmethod(lambda: ["resnet18.a1", "vgg11"])
    @staticmethod
    def get_model(name, weights=None, num_classes=1000):
        assert name == "resnet18.a1" and weights is None and num_classes == 10
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
""",
}


@pytest.mark.parametrize("library", LIKE)
def test_a_library_is_asked_for_its_model_with_the_classes_of_the_data(library, tmp_path, monkeypatch) -> None:
    """By a stand-in with the documented signatures of the functions that are called; neither is needed here."""
    (tmp_path / f"{library}.py").write_text(LIKE[library])
    monkeypatch.delitem(sys.modules, library, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert list(inspect_model(f"{library}:resnet18.a1", batches=1).layers) == ["1"]
        with pytest.raises(ValueError, match=rf"unknown model of {library} 'resent18'; did you mean 'resnet18"):
            inspect_model(f"{library}:resent18", batches=1)
    finally:
        sys.modules.pop(library, None)


def test_an_image_model_of_transformers_by_the_type_of_its_configuration() -> None:
    pytest.importorskip("transformers")
    found = inspect_model("transformers:resnet", batches=1, batch_size=20, image_size=16, layers=["*.stages.0.*.norm*"])
    assert found.layers and all(".stages.0." in name for name in found.layers)
    with pytest.raises(ValueError, match="did you mean 'resnet'"):
        inspect_model("transformers:resnt")
    with pytest.raises(ValueError, match="'transformers:bert' cannot be built: ValueError: Unrecognized"):
        inspect_model("transformers:bert")


def test_a_layer_norm_is_looked_at_along_the_dimensions_that_it_normalises() -> None:
    """Tokens are samples there; a batch norm has its channels second."""
    x = torch.randn(5, 7, 4, 3)
    for layer, want in (
        (nn.LayerNorm(3), x.reshape(-1, 3).T),
        (nn.RMSNorm((4, 3)), x.reshape(-1, 12).T),
        (nn.BatchNorm2d(7), x.transpose(0, 1).reshape(7, -1)),
        (nn.LayerNorm(7), x.transpose(0, 1).reshape(7, -1)),  # whose forward has moved the channels itself
    ):
        features, eps = observed_features(layer, (x,), {})
        assert relative_error(features, want) == 0 and eps == (layer.eps or 0.0)


@pytest.mark.parametrize("layers", [1, 8, 9, 60])
def test_the_picture_holds_a_line_a_layer_up_to_its_rank(layers: int) -> None:
    spectra = {
        f"a.rather.long.name.of.a.layer.{i}": LayerSpectrum(tuple(10.0**-k for k in range(30)), 30 - i % 3)
        for i in range(layers)
    }
    spectra["nothing"] = LayerSpectrum((0.0, 0.0), 0)
    figure = spectra_figure(spectra, "a title")
    axis = figure.axes[0]
    lines = [line for line in axis.lines if len(line.get_xdata()) > 1]
    assert len(lines) == layers and axis.get_yscale() == "log"
    for line, found in zip(lines, spectra.values(), strict=False):
        assert len(line.get_xdata()) == found.numerical_rank
        assert (line.get_xdata()[-1] == 1.0) == (found.numerical_rank == 30)
        assert line.get_ydata()[0] == 1.0 and min(line.get_ydata()) >= 1e-16
    assert len({str(line.get_color()) + str(line.get_linestyle()) for line in lines}) == layers
    assert bool(figure.legends) == (layers < 8)  # of nine and more, a bar of colours
    if layers >= 8:
        assert any("layer." in label.get_text() for label in figure.axes[1].get_yticklabels())


def test_long_names_leave_the_ends_of_the_spectrum_out_of_the_terminal() -> None:
    values = dict.fromkeys(("kappa", "kappa_max", "kappa_eps", "effective_rank", "eig_max", "eig_min"), 1.0)
    for name, wide in (("short", 0), ("model." + "long." * 5, 3)):
        layers = {name: {**values, "numerical_rank": 2.0, "dim": 2.0, "failures": 0.0}}
        table = Inspection("net", "digits", "train", 1, (), layers, ()).table()
        assert sum(column.wide for column in table.columns) == wide and len(table.rows[0]) == 9
