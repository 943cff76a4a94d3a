"""A page as a parser reads it."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path


@dataclass
class Cell:
    text: str = ""
    value: str | None = None


@dataclass
class Page(HTMLParser):
    """Elements, text outside of style and script, these, and tables by caption: those of the last of one caption."""

    path: Path
    elements: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    text: str = ""
    inline: dict[str, str] = field(default_factory=dict)
    tables: dict[str, list[list[Cell]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        self._rows: list[list[Cell]] = []
        self._caption: str | None = None
        self._in_cell = False
        self._inside = ""  # the element that has just begun
        self.feed(self.path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag
        self.elements.append((tag, dict(attrs)))
        if tag == "table":
            self._rows = []
        elif tag == "caption":
            self._caption = ""
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append(Cell())
            self._in_cell = True
        elif tag == "data":
            self._rows[-1][-1].value = dict(attrs)["value"]

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""
        if tag in ("td", "th"):
            self._rows[-1][-1].text = self._rows[-1][-1].text.strip()
            self._in_cell = False
        if tag == "table":
            self._rows = []
        if tag == "caption" and self._caption is not None:
            self.tables[self._caption], self._caption = self._rows, None

    def handle_data(self, data: str) -> None:
        if self._inside in ("style", "script"):
            self.inline[self._inside] = self.inline.get(self._inside, "") + data
            return
        self.text += data
        if self._caption is not None:
            self._caption += data
        elif self._in_cell:
            self._rows[-1][-1].text += data

    @property
    def words(self) -> str:
        """The text, with one space between words."""
        return " ".join(self.text.split())

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]
