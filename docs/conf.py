"""Sphinx's settings. ``make docs`` builds strictly: a broken link, name or formula fails.

The pages are plain Markdown, to be read in the repository as well. A relative link to a file outside of this folder
works in both: Sphinx copies the file beside the pages and fails where it is missing. Folders cannot be linked to. A new
page goes into a toctree of index.md; what it shows is run by tests/test_docs.py.
Nothing is fetched, neither for a build nor to read what it made.
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "extensions"))

project = "spade_fast"
author = "the spade_fast authors"
release = importlib.metadata.version("spade-fast")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "command_line",
    "docstrings",
    "mathml",
    "repository",
]
exclude_patterns = ["extensions"]
html_theme = "furo"
html_title = f"spade_fast {release}"
html_copy_source = False
html_show_copyright = False
smartquotes_action = "D"  # dashes; types would have curly quotes

# Markdown as the repository shows it: $...$ is mathematics, headings have anchors of the same names.
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
html_math_renderer = "mathml"
math_numfig = False

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
maximum_signature_line_length = 100
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Attributes", "params_style")]  # several share a description, which else became types

default_role = "code"

nitpicky = True
# Of other packages, whose own pages would have to be asked for over the network; the last three, which are imported for
# type checkers only, by their short names.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|numpy|PIL|collections|contextlib|os|pathlib|matplotlib)\..*"),
    ("py:class", r"Figure|Tensor|Image\.Image"),
]
