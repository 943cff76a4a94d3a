"""Links from pages to Markdown files of the repository that are no pages: results of benchmarks, as a rule.

Sphinx copies any other file that a page links to, and fails where it is missing. Of what looks like a page, MyST
expects that it is one. Here it becomes a file like the others.
"""

from __future__ import annotations

import os
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx


def _make_files(app: Sphinx, document: nodes.document) -> None:
    for link in list(document.findall(addnodes.pending_xref)):
        # MyST gives what lies outside of the pages by an absolute path, without its suffix, and only if it exists.
        path = f"{link['reftarget']}.md"
        if link.get("reftype") == "myst" and os.path.isabs(path) and not link.get("reftargetid"):
            target = f"/{os.path.relpath(path, app.srcdir)}"
            link.replace_self(addnodes.download_reference("", "", *link.children, reftarget=target))


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("doctree-read", _make_files, priority=400)  # before Sphinx looks for files to copy
    return {"parallel_read_safe": True, "parallel_write_safe": True}
