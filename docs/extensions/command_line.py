"""The directive ``command-line``: every command with its arguments and options, asked of the program itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.rst import escape

from spade_fast.cli import app as program


class CommandLine(SphinxDirective):
    """What ``--help`` says, in a section for each command; its options can be referred to."""

    def run(self) -> list[nodes.Node]:
        group = typer.main.get_command(program)
        lines = _commands("spade-fast", group, typer.Context(group, info_name="spade-fast"))
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)


def _commands(name: str, command: Any, context: Any) -> Iterator[str]:
    """All commands below a group, or the command if it is none."""
    if not hasattr(command, "list_commands"):
        yield from _described(name, command, context)
        return
    for each in command.list_commands(context):
        below = command.get_command(context, each)
        yield from _commands(f"{name} {each}", below, typer.Context(below, info_name=each, parent=context))


def _described(name: str, command: Any, context: Any) -> Iterator[str]:
    options, arguments = [], []
    for parameter in command.get_params(context):
        if (record := parameter.get_help_record(context)) is not None:
            (options if parameter.param_type_name == "option" else arguments).append(record)
    usage = " ".join([name, *command.collect_usage_pieces(context)])
    yield from (name, "-" * len(name), "", escape(command.help), "")
    yield from (".. code-block:: text", "", f"   {usage}", "", f".. program:: {name}", "")
    for names, text in arguments:
        yield from (f"``{names}``", f"   {escape(text)}", "")
    for names, text in options:
        names = names.replace(" / ", ", ")  # of a flag and its opposite, in Sphinx's form
        yield from (f".. option:: {names}", "", f"   {escape(text)}", "")


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("command-line", CommandLine)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
