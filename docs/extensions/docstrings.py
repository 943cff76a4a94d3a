"""Docstrings as they are read in the code: without help two things would become something else."""

from __future__ import annotations

import importlib
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

import spade_fast


def _keep_sentences(app: Sphinx, what: str, name: str, value: object, options: object, lines: list[str]) -> None:  # noqa: ARG001
    """Keep "The names, in order: ..." of a property from being read as a type and a description.

    napoleon does so on the first line only, so there is an empty comment before it.
    """
    if what in ("attribute", "data", "property"):
        lines[:0] = ["..", ""]


def _find_by_object(
    app: Sphinx,
    env: BuildEnvironment,
    node: addnodes.pending_xref,
    content: nodes.Element,
) -> nodes.Element | None:
    """Resolve the name that a thing has where it is defined, if it is described as one of ``spade_fast`` itself."""
    module = node.get("py:module")
    target = node["reftarget"] if "." in node["reftarget"] else f"{module}.{node['reftarget']}"
    home, _, name = target.rpartition(".")
    if node.get("refdomain") != "py" or name not in spade_fast.__all__:
        return None
    try:
        found = getattr(importlib.import_module(home), name, None)
    except ImportError:
        return None
    if found is not getattr(spade_fast, name):
        return None
    whole = f"spade_fast.{name}"
    return env.domains.python_domain.resolve_xref(
        env, node["refdoc"], app.builder, node["reftype"], whole, node, content
    )


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", _keep_sentences, priority=400)
    app.connect("missing-reference", _find_by_object)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
