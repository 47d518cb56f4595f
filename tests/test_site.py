"""The site is built without a warning, is whole, says what is there, and reads well in a browser from a file."""

from __future__ import annotations

import ast
import importlib.util
import inspect
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


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_reads_it_from_a_file(site: Path, tmp_path: Path, theme: str, width: int) -> None:
    """In a frame, since a window of Chromium is never as narrow as a phone; the page tells its size to the frame."""
    script = """
document.documentElement.dataset.mode = document.documentElement.dataset.theme = "THEME";
const shown = (kind) => [...document.querySelectorAll(`img.only-${kind}`)].filter((i) => i.offsetWidth > 100).length;
parent.postMessage(JSON.stringify([
  innerWidth, document.documentElement.scrollWidth, getComputedStyle(document.body).backgroundColor,
  shown("light"), shown("dark"), document.querySelectorAll("math").length,
]), "*");
"""
    script = f"<script>addEventListener('load', () => {{{script.replace('THEME', theme)}}});</script></body>"
    inner, frame = site / f"{theme}-{width}.html", tmp_path / "frame.html"
    inner.write_text((site / "index.html").read_text().replace("</body>", script))
    frame.write_text(
        "<body><script>addEventListener('message', (e) => document.body.append(`said ${e.data}`))</script>"
        f'<iframe src="{inner.as_uri()}" style="border:0;width:{width}px;height:900px"></iframe></body>'
    )
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--log-level=0"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1000", "--virtual-time-budget=5000"]
    done = subprocess.run(
        [*command, "--dump-dom", frame.as_uri()], capture_output=True, text=True, timeout=60, check=True
    )
    inner.unlink()
    # The theme says which one it chose; that is all there may be.
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line and "[PST]: Changed to" not in line] == []
    said = re.search(r"said (\[.*?\])", done.stdout)
    assert said is not None, done.stdout[-2000:]
    seen, wide, background, light, dark, formulas = ast.literal_eval(said[1])
    assert seen == width
    assert wide <= width  # nothing to scroll sideways for
    assert (light, dark) == ((2, 0) if theme == "light" else (0, 2))
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) > 600) == (theme == "light")
    assert formulas > 3


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
def test_the_figures_are_drawn_by_their_scripts(figure: str, tmp_path: Path) -> None:
    script = DOCS / "figures" / f"{figure}.py"
    subprocess.run([sys.executable, str(script), "--quick", "--out", str(tmp_path)], check=True, capture_output=True)
    for page in ("light", "dark"):
        text = (tmp_path / f"{figure}-{page}.svg").read_text()
        assert text.startswith("<?xml") and (DOCS / "images" / f"{figure}-{page}.svg").is_file()
