"""Tuning plans: what is tried and taken, that a known best is found, the guard, runs that go on, refusals."""

from __future__ import annotations

import json
import math
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
from spade_fast import metrics, search, tuning
from spade_fast.cases import Case
from spade_fast.errors import InvalidInputError
from spade_fast.evaluation import clean_cases, first_cases
from spade_fast.files import held_file
from spade_fast.models import LoadedModel
from spade_fast.plans import SparsityPlan
from spade_fast.tuning import Tuner, Tuning, blocks_of, tune, tuning_record

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


def test_what_a_search_finds_has_to_do_best_on_other_images_too(
    monkeypatch: pytest.MonkeyPatch, model: LoadedModel, cases: list[Case]
) -> None:
    held_out = {case.name for case in Tuner(model, cases, "insertion", **FEW).held_out}
    wanted = Wanted(monkeypatch, model, blocks_0_wide=0.3, blocks_1_wide=0.9)
    # From there, one target for all blocks is 0.6 away and the dense network 1.2: on other images that is the best.
    uniform = 0.6

    def misleading(model: LoadedModel, case: Case, maps: Tensor) -> Tensor:
        values = wanted(model, case, maps)
        return -(values + uniform).abs() if case.name in held_out else values

    found = tune(model, cases, misleading, "saliency", **FEW)
    choice = {step.name: step for step in found.history if step.stage == "choice"}
    assert choice["tuned"].images == len(held_out) == 3
    assert choice["tuned"].gain == pytest.approx(0, abs=4)
    seen = next(step for step in reversed(found.history) if step.stage == "search" and step.chosen)
    assert seen.gain > 100  # it is the best of all on what the search has seen
    assert not choice["tuned"].chosen
    assert found.name in {step.name for step in found.history if step.stage == "untuned"}
    assert choice[found.name].images == 12
    assert found.gain == choice[found.name].gain > 50


def test_a_gain_that_is_not_sure_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, model: LoadedModel, cases: list[Case]
) -> None:
    wanted = Wanted(monkeypatch, model, blocks_1_wide=0.9)
    tuner = Tuner(model, cases, wanted, **FEW)
    # Better on as many images as it is worse on, by a little more: what a coin might do.
    worse = {case.name for case in [*tuner.cases[1::2], *tuner.held_out[1::2]]}

    def uneven(model: LoadedModel, case: Case, maps: Tensor) -> Tensor:
        return wanted(model, case, maps) * (-1 if case.name in worse else 1)

    found = tune(model, cases, uneven, "saliency", **FEW)
    last = {step.name: step for step in found.history if step.stage == "choice"}
    best = max(last.values(), key=lambda step: step.gain)
    assert best.gain > 10
    assert best.gain < 2 * best.error
    assert found.name == "dense"


def test_the_search_goes_from_the_last_block_to_the_first_and_then_once_more(
    monkeypatch: pytest.MonkeyPatch, model: LoadedModel, cases: list[Case]
) -> None:
    wanted = Wanted(monkeypatch, model, blocks_0_wide=0.3, blocks_1_wide=0.5, classifier=0.9)
    found = tune(model, cases, wanted, "saliency", **FEW)
    for stage in ("search", "refinement"):
        tried = dict.fromkeys(step.name.split(" ")[0] for step in found.history if step.stage == stage)
        assert list(tried) == ["classifier", "blocks.1", "blocks.0"], stage
    assert found.plan.target("blocks.1.wide") == 0.5  # not in the grid, but next to what is
    # It begins with the best of what needs no tuning, and with one block of that changed.
    untuned = [step for step in found.history if step.stage == "untuned" and step.chosen]
    best = max(untuned, key=lambda step: step.gain)
    first = next(step for step in found.history if step.stage == "search")
    assert {**first.targets, "classifier": 0} == {**best.targets, "classifier": 0}


def test_plans_that_need_no_tuning(model: LoadedModel, cases: list[Case]) -> None:
    tuner = Tuner(model, cases, "insertion", **FEW)
    plans = tuner.untuned_plans()
    assert list(tuner.blocks) == ["blocks.0", "blocks.1", "classifier"]
    assert tuner.told(plans["uniform"]["all blocks at 0.6"]) == dict.fromkeys(tuner.blocks, 0.6)
    assert tuner.told(plans["last half"]["last half at 0.3"]) == {"blocks.1": 0.3, "classifier": 0.3}
    sweeps = [tuner.sweep(case) for case in tuner.cases]
    for budget in tuning.BUDGETS:
        plan = dict(zip(tuner.layers, plans["error budget"][f"error budget {budget:g}"], strict=True))
        for layer, share in plan.items():
            errors = np.mean([each.errors[layer] for each in sweeps], axis=0)
            within = [each for each, error in zip(sweeps[0].grid, errors, strict=True) if error <= budget]
            assert share == max(within, default=0.0)
        first_half = {layer: share for layer, share in plan.items() if share and layer.startswith("blocks.0")}
        by_half = plans["error budget, first half"][f"error budget {budget:g}, first half"]
        assert {layer: share for layer, share in zip(tuner.layers, by_half, strict=True) if share} == first_half
    assert len({*plans["error budget"].values()}) > 3
    assert any(map(any, plans["error budget, first half"].values()))


def test_without_a_search_the_best_untuned_plan_is_taken(
    monkeypatch: pytest.MonkeyPatch, model: LoadedModel, cases: list[Case]
) -> None:
    shares = {layer.replace(".", "_"): 0.6 for layer in ("blocks.0.wide", "blocks.1.wide", "classifier")}
    found = tune(model, cases, Wanted(monkeypatch, model, **shares), "saliency", search=False, **FEW)
    assert found.name == "all blocks at 0.6"
    assert {step.stage for step in found.history} == {"untuned", "choice"}
    assert {step.images for step in found.history if step.stage == "choice"} == {len(cases)}
    assert set(found.plan.targets.values()) == {0.6}


def test_plans_that_coincide_race_once(model: LoadedModel, cases: list[Case]) -> None:
    found = tune(model, cases, "insertion", "saliency", blocks=["classifier"], steps=6, search=False, **FEW)
    tried = [tuple(step.targets.items()) for step in found.history if step.stage == "untuned"]
    kinds = [step.name.rpartition(" at ")[0] or "error budget" for step in found.history if step.stage == "untuned"]
    assert () not in tried  # what prunes nothing is the dense network
    assert len(set(zip(kinds, tried, strict=True))) == len(tried)
    assert not any("first half" in step.name for step in found.history)  # one block has none


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
    blocks = ["blocks.1", "classifier"]
    found = tune(model, cases, "insertion", method, blocks=blocks, steps=6, search=False, **FEW)
    step = next(step for step in found.history if step.name == "all blocks at 0.9")
    tuner = Tuner(model, cases, "insertion", blocks=blocks, steps=6, **FEW)
    gains = []
    for case in tuner.cases[: step.images]:
        plan = SparsityPlan.from_mapping(dict.fromkeys(("blocks.1.wide", "blocks.1.narrow", "classifier"), 0.9))
        sparse = sf.trace(model, case.image, plan, num_augmentations=4).pruned_copy(model)
        maps = [sf.attribute(each, case.inputs, case.target, method) for each in (sparse, model)]
        values = metrics.insertion(model, case.inputs, torch.stack(maps), case.target, steps=6).auc
        gains.append(100 * (values[0] - values[1]).item())
    assert np.abs(gains).max() > 0.05
    assert step.gain == pytest.approx(np.mean(gains), abs=1e-3)
    assert step.error == pytest.approx(np.std(gains, ddof=1) / len(gains) ** 0.5, abs=1e-3)


def test_deletion_gains_where_the_area_falls(model: LoadedModel, cases: list[Case]) -> None:
    tuner = Tuner(model, cases, "deletion", **FEW)
    case = cases[0]
    maps = torch.rand(2, *case.pixels.shape[1:], generator=torch.Generator().manual_seed(0))
    areas = metrics.deletion(model, case.inputs, maps, case.target, steps=tuning.STEPS).auc
    assert tuner.score(case, list(maps)) == pytest.approx((-areas).tolist())
    patch = torch.zeros(*case.pixels.shape[1:], dtype=torch.bool)
    patch[2:5, 3:9] = True
    attacked = [replace(each, patch=patch) for each in cases]
    tuner = Tuner(model, attacked, "trojan", **FEW)
    assert tuner.score(attacked[0], list(maps)) == pytest.approx(metrics.trojan_auc(maps, patch).tolist())


def test_a_run_that_was_cut_short_goes_on(
    monkeypatch: pytest.MonkeyPatch, model: LoadedModel, cases: list[Case], tmp_path: Path
) -> None:
    settings = {"blocks": ["blocks.1", "classifier"], "steps": 6, **FEW}
    whole = tune(model, cases, "insertion", "saliency", log=tmp_path / "whole.jsonl", **settings)
    append, written = search.append_line, []

    def break_off(path: Path, line: str) -> None:
        if len(written) == 9:
            raise KeyboardInterrupt
        written.append(line)
        append(path, line)

    log = tmp_path / "log.jsonl"
    monkeypatch.setattr(search, "append_line", break_off)
    with pytest.raises(KeyboardInterrupt):
        tune(model, cases, "insertion", "saliency", log=log, **settings)
    monkeypatch.setattr(search, "append_line", append)
    with log.open("ab") as file:
        file.write(b'{"image": "01.pn')  # cut within a line
    asked = []
    answer = tuning.answer
    monkeypatch.setattr(tuning, "answer", lambda *given: asked.append(1) or answer(*given))
    resumed = tune(model, cases, "insertion", "saliency", log=log, **settings)
    assert resumed.report() == whole.report()
    before = sum(len(json.loads(line)["values"]) for line in written[1:])  # the first line tells the settings
    assert len(asked) == whole.evaluations - before
    assert log.read_text() == (tmp_path / "whole.jsonl").read_text()
    first, second, *rest = log.read_text().splitlines()
    record = json.loads(second)
    for value, message in (("abc", "'abc' is no number"), (math.nan, "nan is no insertion"), (7.5, "7.5 is no insert")):
        record["values"][0][1] = value
        (tmp_path / "edited.jsonl").write_text("\n".join([first, json.dumps(record), *rest]) + "\n")
        with pytest.raises(InvalidInputError, match=rf"line 2 of .*edited\.jsonl' is no record \({message}"):
            tune(model, cases, "insertion", "saliency", log=tmp_path / "edited.jsonl", **settings)
    (tmp_path / "edited.jsonl").write_text("\n".join([first, "{}", *rest]) + "\n")
    with pytest.raises(InvalidInputError, match=r"is no record \(it has no 'values'\): delete that file"):
        tune(model, cases, "insertion", "saliency", log=tmp_path / "edited.jsonl", **settings)
    with pytest.raises(InvalidInputError, match="is of a run whose 'method' differs: delete it"):
        tune(model, cases, "insertion", "occlusion", log=log, **settings)
    for change in ({"inputs": cases[-1].inputs / 2}, {"image": 1 - cases[-1].pixels}, {"target": 9}):
        others = [*cases[:-1], replace(cases[-1], **change)]
        with pytest.raises(InvalidInputError, match="is of a run whose 'images' differs: delete it"):
            tune(model, others, "insertion", "saliency", log=log, **settings)
    changed = quarters()
    with torch.no_grad():
        changed.module.classifier.bias[0] += 1
    for network, change, what in (
        (changed, {}, "weights_sha256"),
        (model, {"seed": 1}, "seed"),
        (model, {"steps": 7}, "steps"),
        (model, {"blocks": ["blocks.1"]}, "layers"),
        (model, {"num_augmentations": 5}, "trace"),
        (model, {"grid": (0.0, 0.25)}, "shares"),
    ):
        with pytest.raises(InvalidInputError, match=f"is of a run whose '{what}' differs: delete it"):
            tune(network, cases, "insertion", "saliency", log=log, **{**settings, **change})
    log.write_text(log.read_text() + "nonsense\n")
    with pytest.raises(InvalidInputError, match=r"line \d+ of .*log\.jsonl' is no record"):
        tune(model, cases, "insertion", "saliency", log=log, **settings)


def test_one_run_writes_a_log_at_a_time(model: LoadedModel, cases: list[Case], tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    log = tmp_path / "logs" / "log.jsonl"
    for content in ("", "as it was"):  # nothing is written, to a new log neither
        with held_file(log):
            log.write_text(content)
            with pytest.raises(InvalidInputError, match=r"another run writes to .*log\.jsonl'"):
                tune(model, cases, "insertion", "saliency", log=log, search=False, **FEW)
            assert log.read_text() == content


def test_what_a_later_run_could_not_tell_from_others_goes_into_no_log(
    model: LoadedModel, cases: list[Case], tmp_path: Path
) -> None:
    def last(_model: LoadedModel, _case: Case, maps: Tensor) -> Tensor:
        return maps[:, -1, -1]

    settings: dict[str, Any] = {**FEW, "blocks": ["classifier"], "search": False}
    assert tune(model, cases, lambda *given: last(*given), **settings).metric.endswith("<lambda>")
    with pytest.raises(InvalidInputError, match="metric=.*<lambda> cannot be told from others in a later run"):
        tune(model, cases, lambda *given: last(*given), log=tmp_path / "log.jsonl", **settings)
    assert tune(model, cases, last, log=tmp_path / "log.jsonl", **settings).evaluations


def test_plans_tell_their_photographs(tmp_path: Path) -> None:
    for told in ({}, {"photographs": 3}, {"photographs": [1, None]}):
        (tmp_path / "old.json").write_text(json.dumps({"targets": {}, "tuning": {"images": {"a.png": ""}, **told}}))
        with pytest.raises(InvalidInputError, match=r"old\.json.*photographs that it was tuned on: tune it anew"):
            tuning_record(tmp_path / "old.json")


def test_a_log_does_not_take_the_place_of_another_file(model: LoadedModel, cases: list[Case], tmp_path: Path) -> None:
    for content, message in (("my notes", "is another file, not the log of a tuning"), ("my\nnotes\n", "is no record")):
        (tmp_path / "notes.txt").write_text(content)
        with pytest.raises(InvalidInputError, match=message):
            tune(model, cases, "insertion", "saliency", log=tmp_path / "notes.txt", **FEW)
        assert (tmp_path / "notes.txt").read_text() == content
    (tmp_path / "cut.jsonl").write_text('{"settings": {"mod')  # of ours, cut short at once
    settings = {**FEW, "blocks": ["classifier"], "search": False}
    tune(model, cases, "insertion", "saliency", log=tmp_path / "cut.jsonl", **settings)


def test_metrics_that_are_none(model: LoadedModel, cases: list[Case]) -> None:
    with pytest.raises(InvalidInputError, match="gives 1 values for .* maps: it must give one each"):
        tune(model, cases, lambda *_: torch.zeros(1), "saliency", blocks=["classifier"], **FEW)

    def mostly_nan(_: LoadedModel, case: Case, maps: Tensor) -> Tensor:
        is_dense = torch.zeros(len(maps), dtype=torch.bool)
        is_dense[0] = case.name not in seen
        seen.add(case.name)
        return torch.where(is_dense, 0.0, torch.nan)

    seen: set[str] = set()
    found = tune(model, cases, mostly_nan, "saliency", blocks=["classifier"], **FEW)
    assert (found.name, found.gain) == ("dense", 0.0)
    with pytest.raises(InvalidInputError, match=r"\d\d\.png, dense network: .*nothing is NaN or infinite"):
        tune(model, cases, nothing, "saliency", blocks=["classifier"], **FEW)


def nothing(_: LoadedModel, __: Case, maps: Tensor) -> Tensor:
    return torch.full((len(maps),), torch.nan)


def test_tied_layers_have_one_target(cases: list[Case]) -> None:
    tied = quarters()
    tied.module.blocks[1]["wide"].weight = tied.module.blocks[0]["wide"].weight
    tuner = Tuner(tied, cases, **FEW)
    assert tuner.blocks["blocks.0"] == ("blocks.0.wide", "blocks.0.narrow", "blocks.1.wide")
    assert tuner.blocks["blocks.1"] == ("blocks.1.narrow",)
    found = tune(tied, cases, "insertion", "saliency", search=False, steps=6, **FEW)
    sf.trace(tied, cases[0].image, found.plan, num_augmentations=4) if found.plan.targets else None
    assert any(step.name == "all blocks at 0.6" for step in found.history)


def test_networks_that_cannot_be_prepared_are_tuned_for_methods_that_do_not_look_inside(
    monkeypatch: pytest.MonkeyPatch, model: LoadedModel, cases: list[Case]
) -> None:
    def refuse(_: object) -> None:
        raise InvalidInputError("cannot be prepared")

    monkeypatch.setattr(tuning, "prepare", refuse)
    settings = {**FEW, "blocks": ["classifier"], "search": False}
    tune(model, cases, "insertion", "saliency", **settings)
    with pytest.raises(InvalidInputError, match="cannot be prepared"):
        tune(model, cases, "insertion", "lrp", **settings)


def test_images_without_a_name_are_called_by_their_pixels(model: LoadedModel, cases: list[Case]) -> None:
    images = [case.pixels for case in cases]
    found = tune(model, (image for image in images), blocks=["classifier"], search=False, steps=6, **FEW)
    assert len(found.settings["images"]) == len(cases)
    assert all(name.startswith("image ") for name in found.settings["images"])


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
    record = tuning_record(written["saliency.json"])
    assert (record["method"], record["metric"], record["model"]) == ("saliency", "insertion", "quarters")
    assert record["photographs"] == [case.photograph for case in cases]
    assert sorted(record["images"]) == sorted(case.name for case in cases)
    content = json.loads(written["saliency.json"].read_text())
    assert len(content["tuning"]["history"]) == len(tuned.history)
    tuned.plan.to_json(tmp_path / "plain.json")
    assert tuning_record(tmp_path / "plain.json") == {}
    with pytest.raises(InvalidInputError, match=r"none\.json"):
        tuning_record(tmp_path / "none.json")
    (tmp_path / "odd.json").write_text('{"tuning": 3}')
    with pytest.raises(InvalidInputError, match="its tuning is no object"):
        tuning_record(tmp_path / "odd.json")


def test_the_figure_shows_what_was_tried(tuned: Tuning) -> None:
    tried, choice, plan = tuned.figure().axes
    points = sum(len(collection.get_offsets()) for collection in tried.collections)
    assert points == sum(step.stage != "choice" for step in tuned.history)
    names = [label.get_text() for label in choice.get_yticklabels()]
    assert names == [f"{step.name} ({step.images} images)" for step in tuned.history if step.stage == "choice"]
    assert names[0].startswith("dense")
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
        ({"blocks": ["blocks.1", "blocks.1.wide"]}, "blocks: 'blocks.1.wide' is a part of 'blocks.1'"),
        ({"blocks": ["blocks.1", "classifier", "blocks.1"]}, "blocks: 'blocks.1' is there twice"),
        ({"metric": lambda *_: 0.5}, r"gives a float for \d maps: it must give a value each, as a tensor \[\d\]"),
        ({"held_out": 1.0}, "held_out must be a share of the images above 0 and below 1"),
        ({"steps": 0}, "steps must be a whole number"),
        ({"num_augmentations": -1}, "num_augmentations must be a whole number of at least 1, got -1"),
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
    copy = replace(cases[0], name="copy.png")
    with pytest.raises(InvalidInputError, match=f"copy.png is the same photograph as {cases[0].name}: leave one out"):
        tune(model, [*cases, copy], **FEW)
    with pytest.raises(InvalidInputError, match="told by `blocks`: leave `layers` out"):
        tune(model, cases, layers=["classifier"], **FEW)
    with pytest.raises(InvalidInputError, match="pass what spade_fast.load_model returns"):
        tune(model.module, cases, **FEW)


def test_depthwise_layers_are_pruned_where_they_are_named(model: LoadedModel, cases: list[Case]) -> None:
    tuner = Tuner(model, cases, blocks=["blocks.1.depthwise", "blocks.0"], **FEW)
    assert tuner.blocks == {
        "blocks.1.depthwise": ("blocks.1.depthwise",),
        "blocks.0": ("blocks.0.wide", "blocks.0.narrow"),
    }
