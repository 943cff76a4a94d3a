"""What tests read from pages."""

from __future__ import annotations

from pathlib import Path

from pages import Cell, Page


def test_cells_have_their_own_text_alone(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(
        "<title>t</title><script>x < 1</script><p>  one\n two</p> <table><caption>Numbers</caption>\n"
        "<tr><th>of</th> <th>is</th></tr>\n"
        '<tr><th><b>a</b> <i>b</i>\n</th>  <td><data value="0.5">50 %</data></td>\n</tr>'
        "</table> after",
        encoding="utf-8",
    )
    found = Page(path)
    assert found.tables == {"Numbers": [[Cell("of"), Cell("is")], [Cell("a b"), Cell("50 %", "0.5")]]}
    assert found.words == "t one two Numbers of is a b 50 % after"
    assert found.inline == {"script": "x < 1"}
    assert [len(found.of(tag)) for tag in ("th", "td", "data", "img")] == [3, 1, 1, 0]
