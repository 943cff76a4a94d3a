"""What every test module shares."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

# Operators built apart from the package, by CMake under sanitizers, take the place of its own.
if "SPADE_FAST_LIBRARY" in os.environ:
    torch.ops.load_library(os.environ["SPADE_FAST_LIBRARY"])
    sys.modules["spade_fast._C"] = ModuleType("spade_fast._C")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Show what tests measured with `record_property`, which pytest would keep to itself."""
    lines = [
        f"{name}: {value:.4f}  ({report.nodeid.rpartition('::')[2]})"
        for report in terminalreporter.stats.get("passed", [])
        for name, value in report.user_properties
    ]
    if lines:
        terminalreporter.section("measured")
        for line in lines:
            terminalreporter.write_line(line)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A headless Chromium, for tests that look at pages as people do.

    Of a module, not of the session: while it is open, asyncio has a loop running in this thread.
    """
    playwright = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None and "CI" in os.environ:
        pytest.fail("needs Chromium, and continuous integration must look at pages")
    if found is None:
        pytest.skip("needs Chromium")
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=quiet)
        try:
            yield browser
        finally:
            browser.close()
