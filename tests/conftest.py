"""What every test module shares."""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import Any

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
