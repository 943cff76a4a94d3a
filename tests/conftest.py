"""What every test module shares."""

from __future__ import annotations

from typing import Any


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
