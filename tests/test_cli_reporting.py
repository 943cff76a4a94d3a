"""``spade-fast report``: what it writes, prints and refuses."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from subjects import photographs, quarters, store_of, trace_with
from typer.testing import CliRunner, Result

import spade_fast as sf
from spade_fast import cli

for needed in ("captum", "matplotlib", "jinja2", "pyarrow"):
    pytest.importorskip(needed)
pytestmark = pytest.mark.filterwarnings("ignore:.*have no weight left")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    photographs(tmp_path / "images", 2)
    (tmp_path / "images" / "broken [x].png").write_bytes(b"none")
    return tmp_path / "images"


@pytest.fixture
def store(images: Path, tmp_path: Path) -> Path:
    sf.run(quarters(), images, tmp_path / "store", 0.5, methods=["saliency"], num_augmentations=4)
    return tmp_path / "store"


def report(*arguments: object) -> Result:
    command = ["report", *(str(each) for each in arguments)]
    result = CliRunner(env={"COLUMNS": "250"}).invoke(cli.app, command)
    if result.exit_code == 1:
        raise result.exception or AssertionError(result.output)
    return result


def test_page_of_a_store(store: Path, images: Path, tmp_path: Path) -> None:
    page = tmp_path / "deep" / "page.html"
    result = report(store, "--photographs", images, "--out", page, "--title", "Two <quarters>")
    assert result.exit_code == 0
    assert result.stdout == f"written: {page}, 2 images, {page.stat().st_size / 1e6:.1f} MB\n"
    assert "left out: broken [x].png: image file" in result.stderr
    text = page.read_text(encoding="utf-8")
    assert "<bdi>Two &lt;quarters&gt;</bdi></h1>" in text
    assert text.count("<image ") == 2
    result = report(store, "--out", page, "--json")
    document = json.loads(result.stdout)
    assert list(document) == ["images", "left_out", "without_photograph", "report"]
    assert (document["images"], document["without_photograph"], document["report"]) == (2, {}, str(page))
    assert list(document["left_out"]) == ["broken [x].png"]
    assert page.read_text(encoding="utf-8").count("<image ") == 0


def test_photographs_that_changed_are_told(store: Path, images: Path, tmp_path: Path) -> None:
    (images / "00.png").write_bytes((images / "01.png").read_bytes())
    page = tmp_path / "page.html"
    options = (store, "--photographs", images, "--out", page)
    result = report(*options)
    assert re.findall(r"^without photograph: 00\.png: .* is another photograph than", result.stderr, re.MULTILINE)
    assert result.stdout == f"written: {page}, 2 images, {page.stat().st_size / 1e6:.1f} MB\n"
    told = json.loads(report(*options, "--json").stdout)["without_photograph"]
    assert list(told) == ["00.png"]
    assert "is another photograph than the one that was explained" in told["00.png"]
    assert page.read_text(encoding="utf-8").count("<image ") == 1


def test_refusals(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, message in (
        ((store, "--out", store / "page.html"), "is in the store, which holds images only: choose another folder"),
        ((store, "--out", tmp_path), "is a folder: name a page in it"),
        ((store, "--out", tmp_path / "page.pdf"), "is no name of a page: let it end in .html"),
        ((tmp_path / "absent", "--out", tmp_path / "page.html"), "is no store"),
        ((store, "--out", tmp_path / "page.html", "--photographs", tmp_path / "absent"), "is no folder"),
    ):
        result = report(*arguments)
        assert (result.exit_code, result.stdout) == (2, "")
        assert message in result.stderr
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert "pip install 'spade-fast[interpret]'" in report(store, "--out", tmp_path / "page.html").stderr
    assert list(tmp_path.glob("page.*")) == []


def test_a_store_without_maps(tmp_path: Path) -> None:
    store_of(tmp_path / "store", {"a.png": trace_with({"fc": [[1, 0, 0, 1]]})})
    result = report(tmp_path / "store", "--out", tmp_path / "page.html")
    assert result.exit_code == 0
    assert "50.0 % of the weights in 1 layer;" in (tmp_path / "page.html").read_text(encoding="utf-8")
