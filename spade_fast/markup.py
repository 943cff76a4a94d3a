"""HTML pages from the templates of the package: text from elsewhere is escaped, style and script are inside."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import unicodedata
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from spade_fast.errors import require

_DIRECTIONS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def rendered(name: str, values: Mapping[str, Any]) -> str:
    """A page that needs no other file.

    Parameters
    ----------
    name
        Of the template, ``"report"`` for ``pages/report.html``, with the style and the script of that name.
    values
        For the template, beside ``style``, ``script``, their hashes for a Content-Security-Policy, and ``version``.

    Raises
    ------
    MissingDependencyError
        If jinja2 is not installed.
    """
    jinja2, markupsafe = require("jinja2", "interpret"), require("markupsafe", "interpret")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_read),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_legible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=_percent, figures=_figures)
    style, script = _read(f"{name}.css"), _read(f"{name}.js")
    page = environment.get_template(f"{name}.html").render(
        **values,
        version=version("spade-fast"),
        style=markupsafe.Markup(style),
        script=markupsafe.Markup(script),
        style_hash=_source_hash(style),
        script_hash=_source_hash(script),
    )
    return str(page)


def _read(name: str) -> str:
    return (importlib.resources.files("spade_fast") / "pages" / name).read_text(encoding="utf-8")


def _source_hash(text: str) -> str:
    """As a Content-Security-Policy names what it allows."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _legible(value: Any) -> Any:
    """What a template writes, with control characters, which no page may hold or which turn text around, spelt out."""
    if type(value) is not str or value.isprintable():  # a number, what is escaped already, or nothing to look at
        return value
    return "".join(ascii(each)[1:-1] if _is_control(each) else each for each in value)


def _is_control(each: str) -> bool:
    """Whether it is a control character, a lone surrogate, or one that changes the direction of text."""
    return (unicodedata.category(each) in ("Cc", "Cs") and each not in "\n\t") or each in _DIRECTIONS


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _figures(value: float) -> str:
    """Four significant figures."""
    return f"{value:.4g}"
