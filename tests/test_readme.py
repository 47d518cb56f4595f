"""The README runs as printed."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_python_examples_run(block, capsys):
    exec(compile(block, str(README), "exec"), {"__name__": "readme"})
    if "print(" in block:
        assert capsys.readouterr().out.strip()


def test_there_is_a_library_example():
    assert BLOCKS


@pytest.mark.parametrize("target", re.findall(r"\]\((?!https?:)([^)]+)\)", README.read_text(encoding="utf-8")))
def test_pictures_and_links_exist(target):
    assert (README.parent / target).is_file()
