"""The examples of the docs run as printed, and the guide to the treatments names all that is there."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

import wellcond.orthogonality
from wellcond.orthogonality import _registry
from wellcond.orthogonality._nearest_orthogonal_gradient import _SCALES
from wellcond.orthogonality._stiefel_maps import MAPS

DOCS = Path(__file__).parents[1] / "docs"
GUIDE = DOCS / "treatments.md"
TEXT = GUIDE.read_text(encoding="utf-8")
BLOCKS = [
    pytest.param(block, id=f"{page.name}-{i}")
    for page in sorted(DOCS.glob("*.md"))
    for i, block in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_python_examples_run(block, capsys, monkeypatch):
    monkeypatch.setattr(_registry, "_classes", dict(_registry._classes))
    known = dict(wellcond.orthogonality.TREATMENTS)
    module = ModuleType("guide")
    monkeypatch.setitem(sys.modules, "guide", module)  # where the compiler looks for it
    try:
        exec(compile(block, "<docs>", "exec"), vars(module))
    finally:
        wellcond.orthogonality.TREATMENTS.clear()
        wellcond.orthogonality.TREATMENTS.update(known)
    printed = capsys.readouterr().out.strip()
    assert printed or "set_parallel_batches" in block
    promised = re.findall(r"# → (.+)$", block, re.M)
    assert not promised or printed.splitlines() == promised


def test_it_covers_every_treatment_option_and_benchmark():
    for name in [*wellcond.orthogonality.TREATMENTS, *(f'"{name}"' for name in [*MAPS, "muon", "rms", "minimax"])]:
        assert name in TEXT, name
    assert set(_SCALES) == {"paper", "muon", "rms"}
    for script in re.findall(r"benchmarks/\w+\.py", TEXT):
        assert (GUIDE.parents[1] / script).is_file()
    for name in {*wellcond.orthogonality.__all__} - {"Treatment", "parse_treatments", "pre_spectral_layers"}:
        assert name in TEXT, name
