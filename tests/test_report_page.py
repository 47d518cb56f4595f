"""The page of a report in a browser: from a file, without a word on the console, it sorts and reads figures out."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from small_runs import small
from wellcond.experiments.compare import compare
from wellcond.experiments.files import read_csv
from wellcond.experiments.report import report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a comparison of three configurations, one seed each."""
    out = tmp_path_factory.mktemp("page")
    compare([small(epochs=2, treat=treat) for treat in ("none", "nog", "ow")], out / "comparison")
    return report([out / "comparison"], out / "report")[0]


def after(page: Path, script: str, tmp_path: Path, width: int = 1200) -> tuple[str, str]:
    """The document once the page and then ``script`` have run, and what came on the console."""
    acted = tmp_path / "acted.html"
    acted.write_text(page.read_text().replace("</html>", f"<script>//<![CDATA[\n{script}\n//]]></script></html>"))
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--log-level=0"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},1600", "--dump-dom", acted.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def first_table(document: str) -> list[list[str]]:
    body = document.split("<tbody>")[1].split("</tbody>")[0]
    rows = [re.findall(r"<td.*?>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", body, re.DOTALL)]
    return [[re.sub("<.*?>", "", cell) for cell in row] for row in rows]


def test_a_click_on_a_heading_sorts_by_its_numbers(page: Path, tmp_path: Path) -> None:
    once, console = after(page, "document.querySelectorAll('th')[4].click()", tmp_path)
    assert console == ""
    found = [float(row[4]) for row in first_table(once)]
    assert found == sorted(found) and len(found) == 3
    twice, _ = after(page, "const th = document.querySelectorAll('th')[4]; th.click(); th.click()", tmp_path)
    assert first_table(twice) == first_table(once)[::-1]
    assert re.search(r'<th[^>]*aria-sort="descending"', twice)


@pytest.mark.parametrize("width", [1200, 500])
def test_the_pointer_on_a_figure_reads_all_curves_out(page: Path, tmp_path: Path, width: int) -> None:
    """At the left end of the first panel: the first recorded step, with the values of ``condition.csv``."""
    script = """
const frame = document.querySelector(".frame"), box = frame.getBoundingClientRect();
const found = JSON.parse(document.getElementById("readout-1").textContent);
const panel = (matchMedia("(max-width: 40rem)").matches ? found.stacked : found.beside)[0];
frame.dispatchEvent(new PointerEvent("pointermove", {
  clientX: box.left + box.width * (panel.left + 0.001),
  clientY: box.top + box.height * (panel.top + panel.bottom) / 2,
}));
"""
    document, console = after(page, script, tmp_path, width)
    assert console == ""
    said = re.search(r'<div class="said" style.*?>(.*?)</div></div>', document, re.DOTALL)
    assert said is not None
    assert said[1].startswith("<b>0</b>")
    for run, label in (("zca", "zca"), ("zca+nog", "zca+nog"), ("zca+ow", "zca+ow")):
        first = read_csv(page.parents[1] / "comparison" / "runs" / f"{run}-seed0" / "condition.csv")[0]
        value = float(first["kappa"])
        text = f"{label}: " + (f"{value:.2e}".replace("e+0", "e+") if value >= 1e4 else f"{value:.4g}")
        assert text in said[1]
    gone, _ = after(page, script + 'frame.dispatchEvent(new PointerEvent("pointerleave"));', tmp_path, width)
    assert '<div class="said" style' not in gone or 'hidden=""' in gone.split('class="said"')[1][:120]
