"""What users may rely on changes only where somebody meant it to: `public_api.txt` is the list."""

from __future__ import annotations

import difflib
import pkgutil

import public_api
import wellcond
from wellcond.linalg import NotSymmetricError, sqrtm

INTERNAL = {"_shared", "cli", "experiments", "bench"}


def test_the_public_names_and_signatures_are_those_that_are_kept():
    kept = public_api.KEPT.read_text(encoding="utf-8").splitlines()
    changes = [
        line
        for line in difflib.unified_diff(kept, public_api.public_api().splitlines(), n=0, lineterm="")
        if not line.startswith(("---", "+++", "@@"))
    ]
    assert not changes, (
        "the public names or signatures have changed. What is added goes into the changelog; what goes is deprecated "
        "first, with a message. If it is meant: python tests/public_api.py\n" + "\n".join(changes)
    )


def test_every_package_of_ours_is_public_or_said_to_be_internal():
    tops = {module.name for module in pkgutil.iter_modules(wellcond.__path__)}
    assert tops == INTERNAL | {name.split(".")[0] for name in public_api.PACKAGES}


def test_a_changed_default_and_a_new_parameter_would_be_seen():
    assert public_api.signature(sqrtm) == "(P, *, eps=0.0, solver='auto', rank='ridge')"
    assert public_api.signature(lambda P, *, eps=1e-5, new=None: P) == "(P, *, eps=1e-05, new=None)"


def test_the_class_that_an_error_is_caught_by_is_in_the_list():
    assert issubclass(NotSymmetricError, ValueError)
    lines = public_api.public_api().splitlines()
    assert "class wellcond.linalg.NotSymmetricError < ValueError" in lines
    assert "$ wellcond train" in lines and "    --resume" in lines
