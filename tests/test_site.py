"""The site is built without a warning, is whole, says what is there, and reads well in a browser from a file."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from types import ModuleType

import pytest

import wellcond.monitor
import wellcond.nn.functional
import wellcond.orthogonality

for needed in ("sphinx", "myst_parser", "pydata_sphinx_theme", "sphinx_design", "latex2mathml"):
    pytest.importorskip(needed)

DOCS = Path(__file__).parents[1] / "docs"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PACKAGES = (wellcond.linalg, wellcond.nn, wellcond.nn.functional, wellcond.orthogonality, wellcond.monitor)
WITHOUT_EXAMPLE = {"Solver", "SolverEvents", "SpectralModule", "Observation", "ConditionRecord", "WhiteningMethod"}
WITHOUT_EXAMPLE |= {"StepTreatment", "WeightTreatment", "LossTreatment", "Treatment"}
PUBLIC = {name: getattr(package, name) for package in PACKAGES for name in package.__all__}


def load_script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BUILD = load_script(DOCS / "build.py")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built in a process of its own, as by hand; warnings are errors there."""
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, str(DOCS / "build.py"), "--out", str(out)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.mark.slow
def test_every_public_name_has_an_entry(site: Path) -> None:
    packed = (site / "objects.inv").read_bytes().split(b"zlib.\n", 1)[1]
    found = {line.split(" ")[0] for line in zlib.decompress(packed).decode().splitlines()}
    more = ("lightning", "transformers", "accelerate", "sklearn", "metrics")
    for package in (*PACKAGES, *(importlib.import_module(f"wellcond.{name}") for name in more)):
        for name in package.__all__:
            assert name == "functional" or f"{package.__name__}.{name}" in found, f"{package.__name__}.{name}"


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_what_can_be_called_has_an_example(package: ModuleType) -> None:
    """The tests of docstrings run them. Bases to derive from and records that others make have none."""
    for name in package.__all__:
        found = getattr(package, name)
        if callable(found) and not (inspect.isclass(found) and issubclass(found, BaseException)):
            assert name in WITHOUT_EXAMPLE or ">>> " in (inspect.getdoc(found) or ""), name


@pytest.mark.slow
def test_the_check_of_links_sees_what_is_wrong(site: Path, tmp_path: Path) -> None:
    assert BUILD.broken_links(site) == []
    page = '<a href="gone.html"></a><a href="#gone"></a><a id="here" href="#here"></a>'
    (tmp_path / "page.html").write_text(page + '<script src="https://elsewhere.org/x.js"></script>')
    assert BUILD.broken_links(tmp_path) == [
        "page.html links to #gone, a page without that place",
        "page.html links to gone.html, which is not there",
        "page.html loads https://elsewhere.org/x.js",
    ]
    assert (site / "external-links.txt").read_text().count("arxiv.org/abs/2207.02119")


@pytest.mark.slow
def test_mathematics_is_on_the_page_itself(site: Path) -> None:
    text = (site / "how_it_works.html").read_text()
    assert text.count("<math") > 40
    assert "MathJax" not in text and "katex" not in text.lower()
    assert "<merror" not in text


def browse(page: Path | str, profile: Path) -> tuple[str, list[str]]:
    """The document once it has run, and what came on the console but for the theme's word on its choice."""
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--log-level=0"]
    command += [f"--user-data-dir={profile}", "--window-size=1400,1000", "--virtual-time-budget=15000", "--dump-dom"]
    url = page if isinstance(page, str) else page.as_uri()
    done = subprocess.run([*command, url], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line and "[PST]: " not in line]


def in_frames(
    site: Path, pages: list[str], script: str, width: int, tmp_path: Path
) -> tuple[dict[str, list], list[str]]:
    """What ``script`` says of each page, in a frame of this width, since no window is as narrow as a phone."""
    copy = tmp_path / "copy"
    shutil.copytree(site, copy)
    frames = []
    for page in pages:
        said = f"parent.postMessage(JSON.stringify(['{page}', {script}]), '*')"
        text = (copy / page).read_text(encoding="utf-8")
        (copy / page).write_text(
            text.replace("</body>", f"<script>addEventListener('load', () => {said})</script></body>")
        )
        frames.append(f'<iframe src="copy/{page}" style="border:0;width:{width}px;height:900px"></iframe>')
    hear = "<script>addEventListener('message', (e) => document.body.append(`said ${e.data};`))</script>"
    (tmp_path / "frames.html").write_text(f"<body>{hear}{''.join(frames)}</body>")
    document, console = browse(tmp_path / "frames.html", tmp_path / "profile")
    return {page: values for page, *values in map(json.loads, re.findall(r"said (\[.*?\]);", document))}, console


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_landing_page_reads_well_from_a_file(site: Path, tmp_path: Path, theme: str, width: int) -> None:
    shown = "[...document.querySelectorAll('img.only-KIND')].filter((i) => i.offsetWidth > 100).length"
    script = (
        f"document.documentElement.dataset.theme = '{theme}', innerWidth, document.documentElement.scrollWidth, "
        f"getComputedStyle(document.body).backgroundColor, {shown.replace('KIND', 'light')}, "
        f"{shown.replace('KIND', 'dark')}"
    )
    said, console = in_frames(site, ["index.html"], script, width, tmp_path)
    _, seen, wide, background, light, dark = said["index.html"]
    assert console == []
    assert seen == width
    assert wide <= width  # nothing to scroll sideways for
    assert (light, dark) == ((2, 0) if theme == "light" else (0, 2))
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) > 600) == (theme == "light")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
def test_no_page_scrolls_sideways_on_a_phone_or_has_an_error(site: Path, tmp_path: Path) -> None:
    pages = sorted(str(path.relative_to(site)) for path in site.rglob("*.html") if "_static" not in path.parts)
    said, console = in_frames(site, pages, "document.documentElement.scrollWidth", 390, tmp_path)
    assert console == []
    assert sorted(said) == pages
    assert {page: wide for page, (wide,) in said.items() if wide > 390} == {}


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
def test_the_search_works_from_a_file(site: Path, tmp_path: Path) -> None:
    document, console = browse(f"{(site / 'search.html').as_uri()}?q=covariance_sqrtm", tmp_path / "profile")
    assert console == []
    assert 'href="api/linalg.html#wellcond.linalg.covariance_sqrtm"' in document


def calls(page: str) -> list[str]:
    """The calls that stand as code in the tables of a page."""
    rows = [line for line in (DOCS / page).read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    return sorted({code for row in rows for code in re.findall(r"`(\w+\([^`]*\))`", row)})


@pytest.mark.parametrize("call", calls("which.md"))
def test_what_a_decision_table_says_can_be_called_so(call: str) -> None:
    node = ast.parse(call, mode="eval").body
    assert isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    arguments = {word.arg: word.value for word in node.keywords if word.arg}
    inspect.signature(PUBLIC[node.func.id]).bind(*node.args, **arguments)


def test_the_decision_tables_have_every_function_and_layer() -> None:
    text = (DOCS / "which.md").read_text(encoding="utf-8")
    layers = {name for name in wellcond.nn.__all__ if name[0].isupper()} - {"Observation", "SpectralModule"}
    named = {name for name in layers if name not in ("IterNorm1d", "IterNorm3d", "TokenCovariancePool")}
    for name in {*named, *wellcond.linalg.SOLVERS, *wellcond.orthogonality.TREATMENTS}:
        assert re.search(rf'[`"(+]{name}[`"(+]', text), name


@pytest.mark.parametrize("solver", sorted(wellcond.linalg.SOLVERS))
def test_the_table_of_solvers_says_which_compile_whole(solver: str) -> None:
    row = next(line for line in (DOCS / "which.md").read_text().splitlines() if f'| `"{solver}"' in line)
    cells = [cell.strip() for cell in row.split("|")]
    assert (cells[4] == "yes") == wellcond.linalg.SOLVERS[solver]().traceable


@pytest.mark.slow
@pytest.mark.parametrize("figure", ["gradient", "training"])
def test_the_figures_are_drawn_by_their_scripts(figure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS / "figures"))  # drawing.py, which both import
    monkeypatch.setattr(sys, "argv", [figure, "--quick", "--out", str(tmp_path)])
    load_script(DOCS / "figures" / f"{figure}.py").main()
    for page in ("light", "dark"):
        text = (tmp_path / f"{figure}-{page}.svg").read_text()
        assert text.startswith("<?xml") and (DOCS / "images" / f"{figure}-{page}.svg").is_file()
