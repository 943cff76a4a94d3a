"""The examples run from a clean state, and the walkthrough keeps its pictures."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"
for needed in ("captum", "zennit", "sklearn", "skimage", "timm", "lucent", "matplotlib"):
    pytest.importorskip(needed)


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def texts(notebook: Any) -> list[str]:
    return [output.text for output in outputs(notebook) if output.output_type == "stream"]


@pytest.fixture(scope="module")
def walkthrough() -> Any:
    nbformat = pytest.importorskip("nbformat")
    return nbformat.read(EXAMPLES / "walkthrough.ipynb", as_version=4)


def test_the_walkthrough_keeps_its_pictures(walkthrough: Any) -> None:
    found = outputs(walkthrough)
    assert [output for output in found if output.output_type == "error" or output.get("name") == "stderr"] == []
    assert sum("image/jpeg" in output.get("data", {}) for output in found) == 5
    assert all(cell.execution_count for cell in walkthrough.cells if cell.cell_type == "code")


def test_the_walkthrough_runs_from_a_clean_state(walkthrough: Any, tmp_path: Path) -> None:
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    nbformat = pytest.importorskip("nbformat")
    fresh = nbformat.from_dict(walkthrough)
    for cell in fresh.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbclient.NotebookClient(fresh, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert sum("image/jpeg" in output.get("data", {}) for output in outputs(fresh)) == 5
    assert "the trace answers: espresso" in "".join(texts(fresh))


def test_figures_are_made_by_one_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["figures.py", "--out", str(tmp_path / "new"), "--steps", "2"])
    runpy.run_path(str(EXAMPLES / "figures.py"), run_name="__main__")
    made = sorted((tmp_path / "new").iterdir())
    assert [path.name for path in made] == ["demo.jpg", "figure1_left.jpg", "figure1_right.jpg", "figure2.jpg"]
    for path in made:
        with Image.open(path) as picture:
            assert picture.width > 500
