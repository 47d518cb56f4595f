"""A run by any solver and variant that the library knows; one that it does not know is a line, and nothing written."""

from __future__ import annotations

import json

import pytest

from test_cli import SMALL, call, one_line

PARTS = {"zca": ["--norm", "zca"], "gcp": ["--norm", "batch", "--head", "gcp"]}
EVERY_PART = pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)


@EVERY_PART
@pytest.mark.parametrize(
    ("solver", "says"),
    [
        ("sdv", "unknown solver 'sdv'; did you mean 'svd'?"),
        ("svd:talyor", "unknown variant 'talyor' of solver 'svd'; did you mean 'taylor'?"),
        ("eigh:taylor", "solver 'eigh' has no variants"),
    ],
)
def test_an_unknown_one_is_a_line_before_anything_is_written(solver, says, parts, tmp_path):
    for command in (["train", *parts], ["compare", *parts, "--treat", "none", "--seeds", "1"]):
        out = tmp_path / command[0]
        result = call(*command, *SMALL, "--solver", solver, "--out", out)
        assert result.exit_code == 2 and one_line(result).startswith(f"error: {says}")
        assert not [path for path in out.rglob("*") if path.is_file() and "lock" not in path.name]


@EVERY_PART
def test_a_run_is_trained_with_a_remedy_and_says_so(parts, tmp_path):
    result = call("train", *SMALL, *parts, "--solver", "svd:taylor", "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "run" / "result.json").read_text())
    assert found["config"]["solver"] == "svd:taylor"
    assert 0 <= found["test_error"] <= 1
