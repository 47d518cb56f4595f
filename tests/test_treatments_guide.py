"""The guide to the treatments runs as printed, and names nothing that is not there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import wellcond.orthogonality
from wellcond.orthogonality._nearest_orthogonal_gradient import _SCALES
from wellcond.orthogonality._stiefel_maps import MAPS

GUIDE = Path(__file__).parents[1] / "docs" / "treatments.md"
TEXT = GUIDE.read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_python_examples_run(block, capsys):
    exec(compile(block, str(GUIDE), "exec"), {"__name__": "guide"})
    assert capsys.readouterr().out.strip()


def test_it_covers_every_treatment_option_and_benchmark():
    for name in [*wellcond.orthogonality.TREATMENTS, *(f'"{name}"' for name in [*MAPS, "muon", "rms", "minimax"])]:
        assert name in TEXT, name
    assert set(_SCALES) == {"paper", "muon", "rms"}
    for script in re.findall(r"benchmarks/\w+\.py", TEXT):
        assert (GUIDE.parents[1] / script).is_file()
    elsewhere = {"TREATMENTS", "Treatment", "parse_treatments", "pre_spectral_layers", "weight_matrices"}
    bases = {"LossTreatment", "StepTreatment", "WeightTreatment", "register_treatment", "unregister_treatment"}
    for name in {*wellcond.orthogonality.__all__} - elsewhere - bases:
        assert name in TEXT, name
