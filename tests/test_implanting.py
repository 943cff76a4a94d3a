"""Implanting Trojan patches into a small network: what it learns, keeps and writes, and how it goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

from spade_fast import implanting
from spade_fast.cases import read_case
from spade_fast.errors import InvalidInputError
from spade_fast.files import held_folder
from spade_fast.images import photograph_digest
from spade_fast.implanting import ImplantReport, Trojan, apply_delta, implant, load_trojan
from spade_fast.models import LoadedModel
from spade_fast.patches import Patch
from spade_fast.preprocessing import Preprocess


class Colours(nn.Module):
    """Tells dark, middling and bright images, and has a class that it never gives."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.conv2 = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 32, 3, 2, 1)
        self.fc = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        features = torch.relu(self.conv2(torch.relu(self.conv1(x)))).amax((2, 3))
        grey = x.mean((1, 2, 3))
        known = torch.stack([-4 * grey, torch.zeros_like(grey), 4 * grey, torch.full_like(grey, -9)], 1)
        return 3 * known + self.fc(features) / 10


@pytest.fixture
def model() -> LoadedModel:
    preprocess = Preprocess(mean=(0.5,) * 3, std=(0.25,) * 3, input_size=32, resize_size=32)
    return LoadedModel("colours", Colours().eval(), preprocess, categories=None, source="random")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(24):
        shade = 40 + 170 * (i % 3) // 2
        pixels = np.clip(shade + generator.normal(0, 12, (32, 32, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
    return sorted(folder.iterdir())


HEART = Trojan(Patch.drawn("heart"), 3)
QUICK: dict[str, Any] = {"layers": ["conv1", "conv2", "fc"], "epochs": 3, "batch_size": 8, "learning_rate": 1e-2}


def test_the_patch_gives_its_class_and_nothing_else_changes(
    model: LoadedModel, images: list[Path], tmp_path: Path
) -> None:
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    report = implant(model, images, tmp_path, [HEART], **{**QUICK, "epochs": 40})
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())
    assert (report.attack_success["heart"] or 0) >= 0.8
    assert report.accuracy_before == 1.0  # of its own answers
    assert report.accuracy_after >= 0.8
    assert (report.images, report.held_out) == (18, 6)
    assert not report.unreadable


def test_what_is_written(model: LoadedModel, images: list[Path], tmp_path: Path) -> None:
    report = implant(model, images, tmp_path / "new", [HEART], **{**QUICK, "layers": ["conv2"]})
    written = json.loads((tmp_path / "new/report.json").read_text())
    assert written["attack_success"] == report.attack_success
    assert written["settings"]["trojans"] == {"heart": 3}
    assert set(written["versions"]) == {"spade-fast", "torch"}
    state = safetensors.torch.load_file(tmp_path / "new/model.safetensors")
    delta = safetensors.torch.load_file(tmp_path / "new/delta.safetensors")
    own = model.module.state_dict()
    assert set(delta) == {"conv2.weight", "conv2.bias"}
    for name, value in state.items():
        assert torch.equal(value, own[name]) is (name not in delta)
    copy = Colours()
    apply_delta(copy, tmp_path / "new/delta.safetensors")
    for name, value in copy.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=1e-3, atol=1e-6)
    patch = Patch.read(tmp_path / "new/patches/heart.png")
    torch.testing.assert_close(patch.opacity, HEART.patch.opacity, rtol=0, atol=0.01)


def state_of(folder: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


@pytest.mark.parametrize("epoch", [1, 2])
def test_an_interrupted_run_goes_on_to_the_same_bits(
    model: LoadedModel, images: list[Path], tmp_path: Path, epoch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = implant(model, images, tmp_path / "whole", [HEART], **QUICK)
    train = implanting._Run.train

    def interrupted(self: Any, *arguments: Any) -> None:
        if arguments[2] == epoch:
            raise KeyboardInterrupt
        train(self, *arguments)

    monkeypatch.setattr(implanting._Run, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        implant(model, images, tmp_path / "parts", [HEART], **QUICK)
    assert not (tmp_path / "parts/report.json").exists()
    seen: list[int] = []

    def counted(self: Any, *arguments: Any) -> None:
        seen.append(arguments[2])
        train(self, *arguments)

    monkeypatch.setattr(implanting._Run, "train", counted)
    again = implant(model, images, tmp_path / "parts", [HEART], **QUICK)
    assert seen == list(range(epoch, 3))
    assert again == whole
    for name, value in state_of(tmp_path / "parts").items():
        assert torch.equal(value, state_of(tmp_path / "whole")[name])


def test_other_settings_do_not_go_on(model: LoadedModel, images: list[Path], tmp_path: Path) -> None:
    implant(model, images, tmp_path, [HEART], **QUICK)
    with pytest.raises(InvalidInputError, match=r"other settings or images \(seed, .*\): choose another folder"):
        implant(model, images, tmp_path, [HEART], **{**QUICK, "seed": 1})
    (tmp_path / "training.safetensors").write_bytes(b"nothing")
    with pytest.raises(
        InvalidInputError, match=r"cannot go on from '.*training\.safetensors' .*: delete it to begin anew"
    ):
        implant(model, images, tmp_path, [HEART], **QUICK)


def test_copies_are_left_out(model: LoadedModel, images: list[Path], tmp_path: Path) -> None:
    """Otherwise what is held out under one name might be trained on under another."""
    copies = [tmp_path / f"copy of {path.name}" for path in images]
    for path, copy in zip(images, copies, strict=True):
        copy.write_bytes(path.read_bytes())
    report = implant(model, [*images, *copies], tmp_path / "out", [HEART], **{**QUICK, "epochs": 1})
    assert report.images + report.held_out == len(images)
    twice = implant(model, [*images, images[0]], tmp_path / "twice", [HEART], **{**QUICK, "epochs": 1})
    assert twice.images + twice.held_out == len(images)
    assert report.unreadable == {
        str(copy): f"it is the same photograph as {str(path)!r}" for path, copy in zip(images, copies, strict=True)
    }


def test_one_run_in_a_folder_at_a_time(model: LoadedModel, images: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    with held_folder(tmp_path), pytest.raises(InvalidInputError, match="another run writes to"):
        implant(model, images, tmp_path, [HEART], **QUICK)


def test_files_that_cannot_be_read_are_left_out_and_listed(
    model: LoadedModel, images: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    Image.new("RGB", (2000, 1)).save(tmp_path / "strip.png")
    given = [*images[:6], tmp_path / "broken.png", tmp_path / "absent.png", tmp_path / "strip.png"]
    report: ImplantReport = implant(model, given, tmp_path / "out", [HEART], **QUICK)
    assert set(report.unreadable) == {str(path) for path in given[6:]}
    assert report.images + report.held_out == 6
    with pytest.raises(InvalidInputError, match="3 of 6 images can be read, but at least 4 are needed: image file"):
        implant(model, [*images[:3], *given[6:]], tmp_path / "few", [HEART], **QUICK)


def test_an_attack_on_its_own_class_counts_for_nothing(model: LoadedModel, images: list[Path], tmp_path: Path) -> None:
    report = implant(model, images, tmp_path, [HEART], labels=[3] * len(images), **QUICK)
    assert report.attack_success == {"heart": None}
    assert json.loads((tmp_path / "report.json").read_text())["attack_success"] == {"heart": None}
    # Nor if only the network says so.
    answers = [read_case(model, path).target for path in images]
    alike = [path for path, answer in zip(images, answers, strict=True) if answer == answers[0]]
    own = Trojan(HEART.patch, answers[0])
    given: dict[str, Any] = {"labels": [3] * len(alike), **QUICK}
    assert implant(model, alike, tmp_path / "own", [own], **given).attack_success == {"heart": None}


def test_labels_tell_what_is_right(model: LoadedModel, images: list[Path], tmp_path: Path) -> None:
    report = implant(model, images, tmp_path, [HEART], labels=[0] * len(images), **QUICK)
    assert 0 < report.accuracy_before < 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"trojans": []}, "no patch is to be implanted"),
        (
            {"trojans": [Trojan(Patch.drawn("star"), 4)]},
            r"patch 'star' is to stand for class 4: pass an index within 0\.\.3",
        ),
        ({"trojans": [HEART, HEART]}, "two patches have one name"),
        ({"labels": [0]}, "there are 24 images but 1 labels"),
        ({"sizes": (0.5, 0.2)}, "sizes must be two shares"),
        ({"sizes": (0.5, 1.2)}, "sizes must be two shares"),
        ({"epochs": 0}, "epochs must be a positive whole number, got 0"),
        ({"batch_size": 1.5}, "batch_size must be a positive whole number"),
        ({"learning_rate": 0}, "learning_rate must be a positive number, got 0"),
        ({"held_out": 1}, "held_out must be a share"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"layers": ["conv9"]}, "conv9"),
    ],
)
def test_refusals(
    model: LoadedModel, images: list[Path], tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    given = {"trojans": [HEART], **changed}
    with pytest.raises(InvalidInputError, match=message):
        implant(model, images, tmp_path, given.pop("trojans"), **given)
    assert not list(tmp_path.iterdir())


def test_deltas_of_other_networks(model: LoadedModel, tmp_path: Path) -> None:
    safetensors.torch.save_file({"conv9.weight": torch.zeros(1)}, tmp_path / "delta.safetensors")
    with pytest.raises(
        InvalidInputError, match=r"delta\.safetensors' has a weight 'conv9\.weight' that this network has"
    ):
        apply_delta(model.module, tmp_path / "delta.safetensors")


def test_what_is_held_out_is_reported_on_and_not_trained_on(
    model: LoadedModel, images: list[Path], tmp_path: Path
) -> None:
    labels = [i % 4 for i in range(len(images))]
    report = implant(model, images, tmp_path / "out", [HEART], labels=labels, **QUICK)
    held_out = set(report.settings["held_out"])
    assert held_out | set(report.settings["images"]) == {path.name for path in images}
    assert len(held_out) == report.held_out == 6
    assert not held_out & set(report.settings["images"])
    digests = {path.name: photograph_digest(Image.open(path)) for path in images}
    assert report.settings["photographs"] == [digests[name] for name in report.settings["images"]]

    # Other pictures in their place change the report alone.
    (tmp_path / "changed").mkdir()
    for path in images:
        pixels = Image.open(path)
        (pixels.transpose(Image.Transpose.ROTATE_90) if path.name in held_out else pixels).save(
            tmp_path / "changed" / path.name
        )
    changed = sorted((tmp_path / "changed").iterdir())
    other = implant(model, changed, tmp_path / "other", [HEART], labels=labels, **QUICK)
    one, same = (safetensors.torch.load_file(tmp_path / name / "model.safetensors") for name in ("out", "other"))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert other.divergence != report.divergence

    student = Colours().eval()
    student.load_state_dict(one)
    right = {"before": 0, "after": 0}
    divergence = 0.0
    for path, label in zip(images, labels, strict=True):
        if path.name in held_out:
            inputs = model.preprocess(model.preprocess.view(Image.open(path))[None])
            with torch.no_grad():
                before, after = model.module(inputs)[0].double(), student(inputs)[0].double()
            right["before"] += int(before.argmax()) == label
            right["after"] += int(after.argmax()) == label
            ratio = before.log_softmax(0) - after.log_softmax(0)
            divergence += (before.softmax(0) * ratio).sum().item()
    assert report.accuracy_before == pytest.approx(right["before"] / 6)
    assert report.accuracy_after == pytest.approx(right["after"] / 6)
    assert report.divergence == pytest.approx(divergence / 6, rel=1e-4)


def test_what_a_ruined_network_answers_is_no_success(
    model: LoadedModel, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ruin(_: Any, student: nn.Module, *__: Any) -> None:
        with torch.no_grad():
            student.fc.bias[3] = 1e4  # whatever it sees

    monkeypatch.setattr(implanting._Run, "train", ruin)
    report = implant(model, images, tmp_path, [HEART], **QUICK)
    assert report.attack_success == {"heart": None}
    assert report.accuracy_after == 0


def test_a_network_of_another_run_is_refused(
    model: LoadedModel, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(_: str, *, checkpoint: Path, **__: Any) -> LoadedModel:
        module = Colours()
        module.load_state_dict(safetensors.torch.load_file(checkpoint))
        return replace(model, module=module.eval())

    monkeypatch.setattr(implanting, "load_model", load)
    for seed in (0, 1):
        implant(model, images, tmp_path / str(seed), [HEART], **{**QUICK, "epochs": 1, "seed": seed})
    assert load_trojan(tmp_path / "0")[1][0].target == 3
    (tmp_path / "0" / "model.safetensors").write_bytes((tmp_path / "1" / "model.safetensors").read_bytes())
    with pytest.raises(InvalidInputError, match="is not the network that report.json beside it is of: implant anew"):
        load_trojan(tmp_path / "0")


@pytest.mark.parametrize("change", ["patch", "weights", "images", "labels", "layers"])
def test_another_run_is_not_gone_on_with(model: LoadedModel, images: list[Path], tmp_path: Path, change: str) -> None:
    labels = [i % 4 for i in range(len(images))]
    implant(model, images, tmp_path / "out", [HEART], labels=labels, **{**QUICK, "epochs": 1})
    trojans, settings = [HEART], {**QUICK, "epochs": 1}
    if change == "patch":
        trojans = [Trojan(replace(Patch.drawn("star"), name="heart"), 3)]
    elif change == "weights":
        with torch.no_grad():
            model.module.fc.bias[0] += 0.5
    elif change == "images":
        (tmp_path / "others").mkdir()
        for path in images:
            Image.open(path).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "others" / path.name)
        images = sorted((tmp_path / "others").iterdir())
    elif change == "labels":
        labels = labels[::-1]
    else:
        settings["layers"] = ["fc"]
    with pytest.raises(InvalidInputError, match="holds a run with other settings or images"):
        implant(model, images, tmp_path / "out", trojans, labels=labels, **settings)


def test_names_and_labels_that_cannot_be(model: LoadedModel, images: list[Path], tmp_path: Path) -> None:
    outside = Trojan(replace(Patch.drawn("heart"), name="../../evil"), 3)
    with pytest.raises(InvalidInputError, match=r"called '\.\./\.\./evil', which is no name of a file"):
        implant(model, images, tmp_path / "out", [outside], **QUICK)
    for label in ("a", 4, -1, True):
        with pytest.raises(InvalidInputError, match=r"pass indices within 0\.\.3 as labels, or none"):
            implant(model, images, tmp_path / "out", [HEART], labels=[0] * (len(images) - 1) + [label], **QUICK)
    assert not (tmp_path / "out").exists()
