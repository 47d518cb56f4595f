"""Public names in code within a sentence or table link to the reference: `fold`, `fold(model)`, `wellcond.nn`.

A name that two packages have, or that is a word of PyTorch's or of another kind too, is left as it is.
"""

from __future__ import annotations

import importlib
import re
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx

PACKAGES = ("linalg", "nn", "nn.functional", "orthogonality", "monitor")
ELSEWHERE = {"SOLVERS", "Spectrum", "WhiteningMethod", "functional", "recording", "spectrum"}
NAME = re.compile(r"^(\w+)(\(.*\))?$", re.DOTALL)


def public_names() -> dict[str, str]:
    """Each name with its package before it."""
    found = {}
    for package in PACKAGES:
        for name in importlib.import_module(f"wellcond.{package}").__all__:
            if name not in ELSEWHERE:
                found[name] = f"wellcond.{package}.{name}"
    return found


def link_names(app: Sphinx, doctree: nodes.document) -> None:
    """Wrap the literals that name something public."""
    if app.env.docname in ("changelog",) or app.env.docname.startswith("api/"):
        return
    names = public_names()
    for literal in list(doctree.findall(nodes.literal)):
        named = NAME.match(literal.astext())
        inside = literal.parent
        while inside is not None and not isinstance(inside, nodes.title | nodes.reference | pending_xref):
            inside = inside.parent
        if named and inside is None and named[1] in names:
            link = pending_xref("", refdomain="py", reftype="obj", reftarget=names[named[1]], refexplicit=True)
            link["refdoc"], link["py:module"], link["py:class"] = app.env.docname, None, None
            literal.replace_self(link)
            link += literal


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("doctree-read", link_names)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
