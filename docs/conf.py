"""How the site is made: Sphinx, MyST for Markdown, the PyData theme; everything it needs is in this folder.

python docs/build.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import wellcond

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))
from inventory import write_inventories  # noqa: E402

project = "wellcond"
author = "the wellcond developers"
project_copyright = author
version = release = wellcond.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx_design",
    "command_options",
    "docstrings",
    "mathml",
    "public_names",
]
exclude_patterns = ["_build", "results/*/*", "outputs/*"]  # what other pages include
templates_path = ["_templates"]
default_role = "literal"  # `name` in a docstring is code, as in Markdown
nitpicky = True
nitpick_ignore_regex = [
    ("py:class", r"(wellcond\.)?.*\b_\w+\..*"),  # a type that is private, and named for the reader of a signature alone
    ("py:class", r"Model|Normalisation|Running|BatchNorm|.*\.Image(Data|Set)|.*\._BatchNorm"),
]

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
myst_links_external_new_tab = False

# API pages: one entry per public name, in the order of the pages; signatures show the names of types as written.
autosummary_generate = False
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_typehints = "signature"
autodoc_default_options = {"exclude-members": "forward, __new__, __init__"}
maximum_signature_line_length = 88
python_use_unqualified_type_names = True
add_module_names = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_param = False
napoleon_use_rtype = False

# Names of PyTorch and Python that our pages refer to; kept here, since nothing is fetched when the site is built.
intersphinx_mapping = write_inventories(HERE / "references.txt", Path(tempfile.mkdtemp(prefix="wellcond-docs-")))
intersphinx_disabled_reftypes: list[str] = []

html_theme = "pydata_sphinx_theme"
html_title = "wellcond"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["copy.js"]
html_show_sourcelink = False
html_copy_source = False
html_show_search_summary = False  # which is fetched page by page, and cannot be from the disk
html_sidebars = {"**": ["whole-site.html"]}
html_context = {"default_mode": "auto"}  # light or dark as the reader's system has it
html_theme_options = {
    "logo": {"text": "wellcond"},
    "navbar_center": [],
    "navbar_end": ["theme-switcher"],
    "show_prev_next": True,
    "secondary_sidebar_items": ["page-toc"],
    "show_toc_level": 2,
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
