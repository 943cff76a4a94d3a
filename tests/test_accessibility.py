"""The checker of pages finds what is wrong."""

from __future__ import annotations

from typing import Any

from accessibility import serious_findings

PAGE = "<!doctype html><html lang='en'><title>A page</title><main><h1>A page</h1>{}</main>"


def test_findings_name_the_element(chromium: Any) -> None:
    page = chromium.new_page()
    page.set_content(PAGE.format("<p>text</p>"))
    assert serious_findings(page) == []
    page.set_content(PAGE.format("<img src='data:,'><p style='color:#ccc;background:#fff'>faint</p>"))
    found = serious_findings(page)
    assert [rule.partition(":")[0] for rule in found] == ["color-contrast", "image-alt"]
    assert "data:," in found[1]
    page.close()
