"""``spade-fast run``: what it prints, writes, goes on with and refuses."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from subjects import photographs, replace_networks
from typer.testing import CliRunner, Result

import spade_fast as sf
from spade_fast import cli, running
from spade_fast.cli import running as command

pytest.importorskip("pyarrow")
pytest.importorskip("captum")
pytestmark = pytest.mark.filterwarnings("ignore:.*have no weight left")

QUICK = ("--num-augmentations", 4, "--methods", "saliency", "--sparsity", 0.5)


@pytest.fixture(autouse=True)
def loads(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments that networks are asked for with, in whose place a small one is."""
    return replace_networks(monkeypatch)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    photographs(tmp_path / "images", 3)
    (tmp_path / "images" / "broken.png").write_bytes(b"none")
    return tmp_path / "images"


def run(*arguments: object) -> Result:
    result = CliRunner(env={"COLUMNS": "250"}).invoke(cli.app, ["run", *(str(argument) for argument in arguments)])
    if result.exit_code == 1:
        raise result.exception or AssertionError(result.output)
    return result


def test_a_run_and_the_next(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(folder, "--out", out, *QUICK)
    assert result.exit_code == 0
    assert result.stdout.startswith("4 images: 3 made, 0 kept, 1 refused; ")
    assert f"written: {out}" in result.stdout
    assert "refused: broken.png: image file" in result.stderr
    assert list(sf.Store(out)) == ["00.png", "01.png", "02.png"]
    store = sf.Store(out)
    store.file_of("01.png").write_bytes(b"damaged")
    again = run(folder, "--out", out, *QUICK, "--json")
    found = json.loads(again.stdout)
    assert {key: found[key] for key in ("images", "made", "kept")} == {"images": 4, "made": 1, "kept": 2}
    assert list(found["refused"]) == ["broken.png"]
    assert list(found["remade"]) == ["01.png"]
    assert found["store"] == str(out)
    (folder / "00.png").unlink()
    last = run(folder, "--out", out, *QUICK)
    assert "3 images: 0 made, 2 kept, 1 refused; " in last.stdout
    assert "a second" not in last.stdout
    assert f"written: {out}, with 1 image of other lists in it" in last.stdout


def test_every_option_reaches_the_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loads: list[dict[str, Any]]
) -> None:
    given: dict[str, Any] = {}

    def keep(_: Any, images: Path, out: Path, sparsity: Any, **more: Any) -> running.RunSummary:
        given.update(more, images=images, out=out, sparsity=sparsity)
        return running.RunSummary(1, 1, 0, {}, {}, 1.0)

    monkeypatch.setattr(running, "run", keep)
    manifest = tmp_path / "list.csv"
    manifest.write_text("image\n00.png\n")
    options: dict[str, Any] = {
        "metrics": ("insertion, deletion", ("insertion", "deletion")),
        "methods": ("saliency,lrp", ("saliency", "lrp")),
        "num_augmentations": (8, 8),
        "views": ("partial", None),
        "damping": (0.1, 0.1),
        "solver": ("exact", "exact"),
        "block_layout": ("channels", "channels"),
        "steps": (7, 7),
        "root": (folder, folder),
        "in_flight": (3, 3),
        "threads": (2, 2),
        "seed": (9, 9),
        "sparsity": (0.25, 0.25),
    }
    flags = [part for name, (text, _) in options.items() for part in (f"--{name.replace('_', '-')}", text)]
    assert (
        run(manifest, "--out", tmp_path / "out", "--model", "timm:resnet18", "--device", "cpu", *flags).exit_code == 0
    )
    for name, (_, expected) in options.items():
        if name != "views":
            assert given[name] == expected, name
    assert given["augment"] == sf.Augmentation.partial(16, (0.5,) * 3)
    assert given["distributed"] is False
    assert (given["images"], given["out"]) == (str(manifest), tmp_path / "out")
    assert loads == [{"name": "timm:resnet18", "checkpoint": None, "num_classes": None, "device": "cpu"}]
    assert run(folder, "--out", tmp_path / "out", "--ray", "auto", "--workers", 5).exit_code == 0
    assert (given["ray"], given["workers"], given["in_flight"]) == ("auto", 5, None)
    elsewhere = {"images", "out", "model", "arch", "checkpoint", "num_classes", "device", "as_json", "ray", "workers"}
    assert set(inspect.signature(command.run).parameters) == set(options) | elsewhere


def test_traces_alone(folder: Path, tmp_path: Path) -> None:
    assert run(folder, "--out", tmp_path / "out", *QUICK, "--methods", "none").exit_code == 0
    assert dict(sf.Store(tmp_path / "out")["00.png"].dense) == {}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--methods", "salience"), "no attribution method goes by the name 'salience'"),
        (("--metrics", "insertion,trojan"), "metric 'trojan' is unknown"),
        (("--methods", "none", "--metrics", "insertion"), "metrics are of maps"),
        (("--in-flight", 0), "--in-flight must be a whole number of at least 1, got 0"),
        (("--threads", 0), "--threads must be a whole number"),
        (("--workers", 2), "--workers is for --ray"),
        (("--ray", "auto", "--in-flight", 2), "--in-flight is not for --ray"),
        (("--ray", "here"), "no Ray cluster can be reached at 'here' (it is no HOST:PORT)"),
        (("--root", "."), "root is for a manifest"),
        (("--solver", "exat"), "solver"),
        (("--metrics", "insertion,"), "metric '' is unknown"),
        (("--checkpoint", "x.pt"), "--checkpoint needs --arch"),
    ],
)
def test_refusals(folder: Path, tmp_path: Path, more: tuple[object, ...], message: str) -> None:
    result = run(folder, "--out", tmp_path / "out", *QUICK, *more)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_images_that_are_refused_before_a_network_is_loaded(tmp_path: Path, loads: list[Any]) -> None:
    manifest = tmp_path / "list.csv"
    manifest.write_text("image\n../../etc/passwd\n")
    for images, message in ((tmp_path / "nowhere", "is no folder"), (manifest, "is outside of")):
        result = run(images, "--out", tmp_path / "out", *QUICK)
        assert result.exit_code == 2
        assert message in result.stderr
    assert loads == []


def test_where_no_image_can_be_used_the_run_has_failed(tmp_path: Path) -> None:
    only = tmp_path / "only"
    only.mkdir()
    (only / "broken.png").write_bytes(b"none")
    result = run(only, "--out", tmp_path / "out", *QUICK)
    assert result.exit_code == 2
    assert "none of 1 image can be used (broken.png: image file" in result.stderr
    assert list(sf.Store(tmp_path / "out").refused) == ["broken.png"]


def test_a_pickle_that_could_run_code_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")
    monkeypatch.undo()  # with the real loader

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    options = ("--arch", "torchvision:resnet18", "--checkpoint", tmp_path / "evil.pt")
    result = run(folder, "--out", tmp_path / "out", *QUICK, *options)
    assert result.exit_code == 2
    assert "evil.pt: refused, because it needs pickle for" in result.stderr
    assert not (tmp_path / "ran").exists()


def test_by_torchrun_the_first_process_tells_it_all(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loads: list[dict[str, Any]]
) -> None:
    given: list[bool] = []

    def keep(*_: Any, distributed: bool, **__: Any) -> running.RunSummary:
        given.append(distributed)
        return running.RunSummary(1, 1, 0, {}, {}, 1.0)

    monkeypatch.setattr(running, "run", keep)
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for rank, told in (("0", "1 image: 1 made"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert run(folder, "--out", tmp_path / "out", *QUICK, "--device", "cuda").stdout.startswith(told)
        assert loads[-1]["device"] == f"cuda:{rank}"
    assert run(folder, "--out", tmp_path / "out", *QUICK).stdout == ""
    assert given == [True] * 3


def test_two_processes_on_one_store(folder: Path, tmp_path: Path) -> None:
    holds = (
        "import sys\nfrom spade_fast.files import held_folder\n"
        "with held_folder(sys.argv[1]):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    line = [sys.executable, "-c", holds, str(tmp_path / "out")]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        result = run(folder, "--out", tmp_path / "out", *QUICK)
        other.kill()
    assert result.exit_code == 2
    assert "another run writes to" in result.stderr
    assert run(folder, "--out", tmp_path / "out", *QUICK).exit_code == 0
