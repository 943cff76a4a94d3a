"""Tuning plans: what is tried and taken, that a known best is found, the guard, runs that go on, refusals."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from subjects import photographs, quarters
from torch import Tensor

import spade_fast as sf
from spade_fast import metrics, tuning
from spade_fast.cases import Case
from spade_fast.errors import InvalidInputError
from spade_fast.evaluation import clean_cases, first_cases
from spade_fast.models import LoadedModel
from spade_fast.plans import SparsityPlan
from spade_fast.tuning import Tuner, Tuning, blocks_of, tune, tuned_on

pytest.importorskip("captum")
pytestmark = pytest.mark.filterwarnings("ignore:.*have no weight left")

GRID = (0.0, 0.3, 0.6, 0.9)
FEW: dict[str, Any] = {"num_augmentations": 4, "grid": GRID}


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return quarters()


@pytest.fixture(scope="module")
def cases(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    files = photographs(tmp_path_factory.mktemp("images"), 12)
    return list(first_cases(clean_cases(model, files), 12).values())


@pytest.mark.parametrize(
    ("names", "blocks"),
    [
        (["conv1", "layer4.2.conv1", "layer4.2.downsample.0", "fc"], ["conv1", "layer4.2", "fc"]),
        (["blocks.3.0.conv_pw", "blocks.3.0.se.conv", "blocks.3.1.conv_pw"], ["blocks.3.0", "blocks.3.1"]),
        (["features.0", "features.2", "classifier.6"], ["features.0", "features.2", "classifier.6"]),
        (["features.3.conv.0.0", "features.7.1.block.0"], ["features.3", "features.7.1"]),
        (["stages.2.blocks.5.mlp.fc1", "stages.2.downsample.1"], ["stages.2.blocks.5", "stages.2"]),
        (["encoder.layers.encoder_layer_3.mlp.0"], ["encoder.layers.encoder_layer_3"]),
        (["features.denseblock1.denselayer2.conv1"], ["features.denseblock1.denselayer2"]),
    ],
)
def test_blocks_are_read_from_names(names: list[str], blocks: list[str]) -> None:
    found = blocks_of(names)
    assert list(found) == blocks
    assert [layer for layers in found.values() for layer in layers] == names


# A metric with a known best: what is left of two blocks, against what is wanted of them. It sees the plan through the
# weights that are in the network while the map is made.


class Wanted:
    """Makes the metric of a map the distance of the plan, whose weights the network has then, from a wanted one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model: LoadedModel, **shares: float) -> None:
        self.shares, self.model = {name.replace("_", "."): share for name, share in shares.items()}, model
        self.asked: Counter[str] = Counter()
        answer = tuning.answer

        def with_distance(question: Any, name: str, method: Any) -> Tensor:
            return answer(question, name, method) * 0 + self.distance()

        monkeypatch.setattr(tuning, "answer", with_distance)

    def distance(self) -> float:
        modules = dict(self.model.module.named_modules())
        found = 0.0
        for name, share in self.shares.items():
            weight = modules[name].weight
            found += abs((weight == 0).float().mean().item() - share)
        return found

    def __call__(self, model: LoadedModel, case: Case, maps: Tensor) -> Tensor:
        assert model is self.model
        self.asked[case.name] += len(maps)
        return -maps.mean(dim=(1, 2)).double()


def test_a_plan_with_a_known_best_is_found(
    monkeypatch: pytest.MonkeyPatch, model: LoadedModel, cases: list[Case]
) -> None:
    wanted = Wanted(monkeypatch, model, blocks_0_wide=0.3, blocks_1_wide=0.9, classifier=0.0)
    found = tune(model, cases, wanted, "saliency", **FEW)
    assert found.name == "tuned"
    targets = [found.plan.target(layer) or 0.0 for layer in ("blocks.0.wide", "blocks.1.wide", "classifier")]
    assert targets == [0.3, 0.9, 0.0]
    assert found.plan.target("stem") is None  # called first
    assert found.plan.target("blocks.1.depthwise") is None
    dense, best = 30 + 90, 0
    assert found.gain == pytest.approx(dense - best, abs=2)  # in points; masks round to whole weights
    low, high = found.interval
    assert low <= found.gain <= high


def test_the_network_is_not_made_worse(monkeypatch: pytest.MonkeyPatch, model: LoadedModel, cases: list[Case]) -> None:
    wanted = Wanted(monkeypatch, model, blocks_0_wide=0, blocks_0_narrow=0, blocks_1_wide=0, classifier=0)
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    found = tune(model, cases, wanted, "saliency", blocks=["blocks.0", "classifier"], **FEW)
    assert (found.name, found.plan, found.gain) == ("dense", SparsityPlan({}), 0.0)
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())


def test_a_gain_that_is_not_there_on_other_images_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, model: LoadedModel, cases: list[Case]
) -> None:
    order = Tuner(model, cases, "insertion", **FEW)
    held_out = {case.name for case in order.held_out}
    assert len(held_out) == 3
    wanted = Wanted(monkeypatch, model, blocks_1_wide=0.9)

    def misleading(model: LoadedModel, case: Case, maps: Tensor) -> Tensor:
        values = wanted(model, case, maps)
        return -values if case.name in held_out else values

    found = tune(model, cases, misleading, "saliency", **FEW)
    assert found.name == "dense"
    taken = [step for step in found.history if step.stage == "held out"]
    assert {step.images for step in taken} == {3}
    assert next(step.gain for step in taken if step.name == "tuned") < 0
    assert [step.name for step in taken if step.chosen] == ["dense"]


def test_without_a_search_the_best_untuned_plan_is_taken(
    monkeypatch: pytest.MonkeyPatch, model: LoadedModel, cases: list[Case]
) -> None:
    shares = {layer.replace(".", "_"): 0.6 for layer in ("blocks.0.wide", "blocks.1.wide", "classifier")}
    found = tune(model, cases, Wanted(monkeypatch, model, **shares), "saliency", search=False, **FEW)
    assert found.name == "all blocks at 0.6"
    assert {step.stage for step in found.history} == {"untuned", "held out"}
    assert set(found.plan.targets.values()) == {0.6}


def test_the_search_sees_each_case_and_map_once(
    monkeypatch: pytest.MonkeyPatch, model: LoadedModel, cases: list[Case]
) -> None:
    wanted = Wanted(monkeypatch, model, blocks_0_wide=0.3, blocks_1_wide=0.9)
    sweeps: Counter[str] = Counter()
    sweep = tuning.sweep

    def counted(model: LoadedModel, image: Any, *more: Any, **settings: Any) -> Any:
        sweeps[next(case.name for case in cases if case.image is image)] += 1
        return sweep(model, image, *more, **settings)

    monkeypatch.setattr(tuning, "sweep", counted)
    grid = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9)
    found = tune(model, cases, wanted, "saliency", **{**FEW, "grid": grid})
    assert sweeps == dict.fromkeys((case.name for case in cases), 1)
    assert found.evaluations == wanted.asked.total()
    # Only the best few of a race go on to all images.
    races = [step for step in found.history if step.stage == "search" and step.name.startswith("blocks.1 at")]
    assert len(races) == len(grid) - 1
    assert sorted(step.images for step in races) == [4, 4, 9, 9, 9]


@pytest.mark.parametrize("method", ["saliency", "deep_lift", "lrp", "guided_backprop"])
def test_gains_are_those_of_the_metric(model: LoadedModel, cases: list[Case], method: str) -> None:
    found = tune(model, cases, "insertion", method, blocks=["blocks.1"], steps=6, search=False, **FEW)
    step = next(step for step in found.history if step.name == "all blocks at 0.6")
    tuner = Tuner(model, cases, "insertion", blocks=["blocks.1"], steps=6, **FEW)
    gains = []
    for case in tuner.cases[: step.images]:
        plan = SparsityPlan.from_mapping({"blocks.1.wide": 0.6, "blocks.1.narrow": 0.6})
        sparse = sf.trace(model, case.image, plan, num_augmentations=4).pruned_copy(model)
        maps = [sf.attribute(each, case.inputs, case.target, method) for each in (sparse, model)]
        values = metrics.insertion(model, case.inputs, torch.stack(maps), case.target, steps=6).auc
        gains.append(100 * (values[0] - values[1]).item())
    assert step.gain == pytest.approx(np.mean(gains), abs=1e-4)
    assert step.error == pytest.approx(np.std(gains, ddof=1) / len(gains) ** 0.5, abs=1e-4)


def test_deletion_gains_where_the_area_falls(model: LoadedModel, cases: list[Case]) -> None:
    tuner = Tuner(model, cases, "deletion", **FEW)
    case = cases[0]
    maps = torch.rand(2, *case.pixels.shape[1:], generator=torch.Generator().manual_seed(0))
    areas = metrics.deletion(model, case.inputs, maps, case.target, steps=tuning.STEPS).auc
    assert tuner.score(case, list(maps)) == pytest.approx((-areas).tolist())


def test_a_run_that_was_cut_short_goes_on(
    monkeypatch: pytest.MonkeyPatch, model: LoadedModel, cases: list[Case], tmp_path: Path
) -> None:
    settings = {"blocks": ["blocks.1", "classifier"], "steps": 6, **FEW}
    whole = tune(model, cases, "insertion", "saliency", log=tmp_path / "whole.jsonl", **settings)
    append, written = tuning.append_line, []

    def break_off(path: Path, line: str) -> None:
        if len(written) == 30:
            raise KeyboardInterrupt
        written.append(line)
        append(path, line)

    log = tmp_path / "log.jsonl"
    monkeypatch.setattr(tuning, "append_line", break_off)
    with pytest.raises(KeyboardInterrupt):
        tune(model, cases, "insertion", "saliency", log=log, **settings)
    monkeypatch.setattr(tuning, "append_line", append)
    with log.open("ab") as file:
        file.write(b'{"targets": [0.3')  # cut within a line
    resumed = tune(model, cases, "insertion", "saliency", log=log, **settings)
    assert resumed.evaluations == whole.evaluations - 29  # the first line tells the settings
    assert (resumed.plan, resumed.history, resumed.gain) == (whole.plan, whole.history, whole.gain)
    assert log.read_text() == (tmp_path / "whole.jsonl").read_text()
    with pytest.raises(InvalidInputError, match="belongs to a run with another method: delete it"):
        tune(model, cases, "insertion", "occlusion", log=log, **settings)
    others = [*cases[:-1], replace(cases[-1], inputs=cases[-1].inputs / 2)]
    with pytest.raises(InvalidInputError, match="belongs to a run with another inputs_sha256: delete it"):
        tune(model, others, "insertion", "saliency", log=log, **settings)
    log.write_text(log.read_text() + "nonsense\n")
    with pytest.raises(InvalidInputError, match=r"line \d+ of .*log\.jsonl' is no record"):
        tune(model, cases, "insertion", "saliency", log=log, **settings)


def test_a_candidate_on_which_the_method_fails_is_never_taken(
    monkeypatch: pytest.MonkeyPatch, model: LoadedModel, cases: list[Case]
) -> None:
    wanted = Wanted(monkeypatch, model, blocks_1_wide=0.9)
    answer = tuning.answer

    def fails(question: Any, name: str, method: Any) -> Tensor:
        if wanted.distance() < 0.5:
            raise InvalidInputError("no map")
        return answer(question, name, method)

    monkeypatch.setattr(tuning, "answer", fails)
    found = tune(model, cases, wanted, "saliency", **FEW)
    assert found.plan.target("blocks.1.wide") == 0.3  # 0.6 and 0.9 fail
    assert np.isneginf([step.gain for step in found.history if step.name == "all blocks at 0.9"]).all()
    assert isinstance(found.figure(), Figure)
    monkeypatch.setattr(wanted, "distance", lambda: 0.0)
    with pytest.raises(InvalidInputError, match=r"\d\d\.png, dense network: no map"):
        tune(model, cases, wanted, "saliency", **FEW)


@pytest.fixture(scope="module")
def tuned(model: LoadedModel, cases: list[Case]) -> Tuning:
    return tune(model, cases, "insertion", "saliency", blocks=["blocks.1", "classifier"], steps=6, **FEW)


def test_files_hold_plan_history_and_chart(tuned: Tuning, cases: list[Case], tmp_path: Path) -> None:
    written = tuned.save(tmp_path / "plans" / "saliency.json")
    assert set(written) == {"saliency.json", "saliency.png"}
    assert written["saliency.png"].read_bytes().startswith(b"\x89PNG")
    assert SparsityPlan.from_json(written["saliency.json"]) == tuned.plan
    assert sorted(tuned_on(written["saliency.json"])) == sorted(case.name for case in cases)
    content = json.loads(written["saliency.json"].read_text())
    assert len(content["tuning"]["history"]) == len(tuned.history)
    tuned.plan.to_json(tmp_path / "plain.json")
    assert tuned_on(tmp_path / "plain.json") == []
    with pytest.raises(InvalidInputError, match=r"none\.json"):
        tuned_on(tmp_path / "none.json")


def test_the_figure_shows_what_was_tried(tuned: Tuning) -> None:
    tried, choice, plan = tuned.figure().axes
    points = sum(len(collection.get_offsets()) for collection in tried.collections)
    assert points == sum(step.stage != "held out" for step in tuned.history)
    names = [label.get_text() for label in choice.get_yticklabels()]
    assert names == [step.name for step in tuned.history if step.stage == "held out"]
    assert names[0] == "dense"
    assert [label.get_text() for label in plan.get_xticklabels()] == list(tuned.plan.targets)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "pointing"}, "metric='pointing' is unknown: choose insertion, deletion, trojan"),
        ({"metric": "trojan"}, "metric 'trojan' needs cases with a patch"),
        ({"method": "saliences"}, "'saliences'; nearest: 'saliency'"),
        ({"grid": [0.0]}, "must hold one above 0"),
        ({"grid": [2]}, "must lie within 0"),
        ({"blocks": ["block.1"]}, "blocks: 'block.1' matches no prunable layer"),
        ({"held_out": 1.0}, "held_out must be a share of the images within 0..1"),
        ({"steps": 0}, "steps must be a whole number"),
        ({"seed": -1}, "seed must be a whole number"),
    ],
)
def test_settings_that_cannot_be_used(
    model: LoadedModel, cases: list[Case], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        tune(model, cases, **{**FEW, **change})


def test_cases_that_cannot_be_tuned_on(model: LoadedModel, cases: list[Case]) -> None:
    with pytest.raises(InvalidInputError, match="3 images are too few to tune on: pass at least 4"):
        tune(model, cases[:3], **FEW)
    with pytest.raises(InvalidInputError, match="two cases have one name"):
        tune(model, [*cases[:4], cases[0]], **FEW)
    with pytest.raises(InvalidInputError, match="pass what spade_fast.load_model returns"):
        tune(model.module, cases, **FEW)


def test_depthwise_layers_are_pruned_where_they_are_named(model: LoadedModel, cases: list[Case]) -> None:
    tuner = Tuner(model, cases, blocks=["blocks.1.depthwise", "blocks.0"], **FEW)
    assert tuner.blocks == {
        "blocks.1.depthwise": ("blocks.1.depthwise",),
        "blocks.0": ("blocks.0.wide", "blocks.0.narrow"),
    }
