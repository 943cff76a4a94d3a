"""What axe, the checker behind Lighthouse's accessibility audit, finds wrong with a page."""

from __future__ import annotations

from typing import Any

import pytest


def serious_findings(page: Any) -> list[str]:
    """The rules that a page in Chromium breaks in a serious or critical way, with the elements that do."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    broken = axe.run(page).response["violations"]
    return [
        f"{rule['id']}: {[node['html'] for node in rule['nodes']]}"
        for rule in broken
        if rule["impact"] in ("serious", "critical")
    ]
