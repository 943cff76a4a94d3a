"""Measuring many images: what every arm is asked, figures against doing it by hand, runs that go on, refusals."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from subjects import SIDE, photographs, quarters
from torch import Tensor, nn

import spade_fast as sf
from spade_fast import arms, evaluation, metrics
from spade_fast.arms import Arm, dense_arm, module_arm, set_arm, sparse_fc_arm, trace_arm, tuned_arm
from spade_fast.cases import Case, attacked_case, make_case, read_case
from spade_fast.comparison import Evaluation
from spade_fast.errors import InvalidInputError, MissingDependencyError
from spade_fast.evaluation import attacked_cases, clean_cases, evaluate, first_cases, unseen_cases
from spade_fast.files import held_folder
from spade_fast.images import load_image, photograph_digest
from spade_fast.implanting import Trojan
from spade_fast.methods import register_method, unregister_method
from spade_fast.models import LoadedModel
from spade_fast.patches import Patch
from spade_fast.plans import SparsityPlan

pytest.importorskip("captum")
pytestmark = pytest.mark.filterwarnings("ignore:.*have no weight left")

FEW: dict[str, Any] = {"num_augmentations": 4}
METHODS = ("saliency", "occlusion")


@pytest.fixture
def model() -> LoadedModel:
    return quarters()


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "images").mkdir()
    return photographs(tmp_path / "images", 8)


# Cases


def test_a_case_is_the_networks_own_answer(model: LoadedModel, files: dict[str, Path]) -> None:
    for i, (name, path) in enumerate(files.items()):
        case = read_case(model, path)
        assert (case.name, case.target) == (name, i % 4)
        assert case.patch is None
        torch.testing.assert_close(case.inputs, model.preprocess(case.pixels[None]))
        torch.testing.assert_close(case.scores, model.module(case.inputs)[0].double())
    assert make_case(model, case.pixels, target=1).target == 1


def test_cases_that_cannot_be(model: LoadedModel) -> None:
    pixels = torch.rand(3, SIDE, SIDE)
    with pytest.raises(InvalidInputError, match="target 4 is no class"):
        make_case(model, pixels, target=4)
    with torch.no_grad():
        model.module.classifier.bias.fill_(torch.nan)
    with pytest.raises(InvalidInputError, match="NaN or infinite class scores"):
        make_case(model, pixels)


class SeesHearts(nn.Module):
    """Gives class 1 wherever a pixel is as red as a heart."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 1, 1)
        self.scale = nn.Linear(1, 2)
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1))
            self.conv.bias.fill_(-0.4)
            self.scale.weight.copy_(torch.tensor([[-1.0], [1.0]]))
            self.scale.bias.copy_(torch.tensor([0.05, -0.05]))

    def forward(self, x: Tensor) -> Tensor:
        return 30 * self.scale(torch.relu(self.conv(x)).amax((2, 3)))


@pytest.fixture
def attacked() -> LoadedModel:
    preprocess = sf.Preprocess(mean=(0.0,) * 3, std=(1.0,) * 3, input_size=SIDE, resize_size=SIDE)
    return LoadedModel("hearts", SeesHearts().eval(), preprocess, None, "made")


HEART = Trojan(Patch.drawn("heart"), 1)


def test_an_attacked_case_depends_on_seed_and_name_only(attacked: LoadedModel, files: dict[str, Path]) -> None:
    path = files["03.png"]
    case = attacked_case(attacked, path, [HEART], sizes=(0.5, 0.5))
    again = attacked_case(attacked, path, [HEART], sizes=(0.5, 0.5))
    assert case.target == 1
    assert torch.equal(case.pixels, again.pixels)
    rows, columns = case.patch.any(1).nonzero(), case.patch.any(0).nonzero()
    assert 0 < rows.max() - rows.min() < SIDE // 2
    assert 0 < columns.max() - columns.min() < SIDE // 2
    clean = read_case(attacked, path)
    far = ~nn.functional.max_pool2d(case.patch[None].float(), 5, 1, 2)[0].bool()  # opacity fades beyond the edge
    assert torch.equal(case.pixels[:, far], clean.pixels[:, far])
    masks = [attacked_case(attacked, path, [HEART], name=name, seed=seed, sizes=(0.5, 0.5)).patch
             for name, seed in (("other", 0), ("03.png", 1))]  # fmt: skip
    assert not any(torch.equal(case.patch, mask) for mask in masks)


def test_where_a_patch_tells_nothing_the_image_is_refused(attacked: LoadedModel, tmp_path: Path) -> None:
    red, white = tmp_path / "red.png", tmp_path / "white.png"
    Image.new("RGB", (SIDE, SIDE), (230, 10, 10)).save(red)
    Image.new("RGB", (SIDE, SIDE), (255, 255, 255)).save(white)
    with pytest.raises(InvalidInputError, match=r"gives it the class of 'heart' \(class 1\) without the patch"):
        attacked_case(attacked, red, [HEART])
    star = Trojan(Patch.drawn("star"), 1)
    with pytest.raises(InvalidInputError, match=r"not fooled by 'star' \(class 1\): it answers class 0"):
        attacked_case(attacked, white, [star])
    with pytest.raises(InvalidInputError, match="sizes must be two shares"):
        attacked_case(attacked, white, [HEART], sizes=(0.5, 1.5))


def test_the_order_of_cases_is_random_and_does_not_depend_on_others(model: LoadedModel, files: dict[str, Path]) -> None:
    order = list(clean_cases(model, files, seed=3))
    assert sorted(order) == sorted(files)
    assert order != sorted(files)
    assert order != list(clean_cases(model, files, seed=4))
    fewer = {name: files[name] for name in list(files)[::2]}
    assert list(clean_cases(model, fewer, seed=3)) == [name for name in order if name in fewer]
    assert list(attacked_cases(model, files, [HEART], seed=3)) == order


def test_first_cases_pass_over_what_cannot_be_used(model: LoadedModel, files: dict[str, Path]) -> None:
    files["01.png"].write_bytes(b"no image")
    cases = {name: make for name, make in clean_cases(model, files).items()}  # noqa: C416
    found = first_cases(cases, 4)
    assert list(found) == [name for name in cases if name != "01.png"][:4]
    assert all(case.name == name for name, case in found.items())
    with pytest.raises(InvalidInputError, match=r"none of 1 images can be used \(01\.png: "):
        first_cases({"01.png": cases["01.png"]}, 4)


# Arms


def networks_of(arm: Arm, case: Case, methods: tuple[str, ...] = METHODS) -> dict[str, Tensor]:
    """The scores of the network that each method is asked about."""
    found = {}
    for group, context in arm.networks(case, methods):
        with context as module, torch.no_grad():
            for method in group:
                found[method] = module(case.inputs)
    assert tuple(sorted(found)) == tuple(sorted(methods))
    return found


def scores_of(model: LoadedModel, image: Any, sparsity: Any, case: Case) -> Tensor:
    trace = sf.trace(model, image, sparsity, **FEW)
    with torch.no_grad():
        return trace.pruned_copy(model)(case.inputs)


def test_arms_ask_the_network_that_they_say(model: LoadedModel, files: dict[str, Path]) -> None:
    cases = first_cases(clean_cases(model, files), 8)
    case, *others = cases.values()
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    with torch.no_grad():
        dense = model.module(case.inputs)
    assert torch.equal(networks_of(dense_arm(model), case)["saliency"], dense)
    fast = networks_of(trace_arm(model, 0.7, **FEW), case)["saliency"]
    assert torch.equal(fast, scores_of(model, case.image, 0.7, case))
    assert not torch.equal(fast, dense)

    reference = others[:3]
    generic = networks_of(set_arm(model, reference, 0.7, **FEW), case)["saliency"]
    assert torch.equal(generic, scores_of(model, [each.image for each in reference], 0.7, case))
    of_class = networks_of(set_arm(model, others, 0.7, by_class=True, **FEW), case)["saliency"]
    same = [each.image for each in others if each.target == case.target]
    assert 0 < len(same) < len(others)
    assert torch.equal(of_class, scores_of(model, same, 0.7, case))

    other = quarters()
    with torch.no_grad():
        other.module.classifier.weight.mul_(2)
        doubled = other.module(case.inputs)
    assert torch.equal(networks_of(module_arm(other.module, {}), case)["saliency"], doubled)
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())


def test_a_sparse_classifier_is_fitted_once_and_knows_its_classes(
    monkeypatch: pytest.MonkeyPatch, model: LoadedModel, files: dict[str, Path]
) -> None:
    pytest.importorskip("glm_saga")
    cases = list(first_cases(clean_cases(model, files), 8).values())
    reference = [each for each in cases if each.target != 3]
    reference, measured = reference[:4], reference[4:]
    fitted = []
    fit = arms.sparse_fc
    monkeypatch.setattr(arms, "sparse_fc", lambda *given, **more: fitted.append(fit(*given, **more)) or fitted[-1])
    arm = sparse_fc_arm(model, reference, views=6)
    for case in measured:
        found = networks_of(arm, case)["occlusion"]
        with torch.no_grad():
            assert torch.equal(found, fitted[0].sparse_copy(model)(case.inputs))
        assert found.argmax() == case.target
    assert len(fitted) == 1
    assert 0 < fitted[0].nonzeros.sum() < fitted[0].weight.numel() / 2
    unknown = next(each for each in cases if each.target == 3)
    with pytest.raises(InvalidInputError, match="no image that the sparse classifier is fitted to has class 3"):
        list(sparse_fc_arm(model, reference, views=1).networks(unknown, METHODS))


def test_each_method_has_its_plan(model: LoadedModel, files: dict[str, Path]) -> None:
    case = read_case(model, files["02.png"])
    plans = {
        "saliency": SparsityPlan.from_mapping({"blocks.1": 0.5}),
        "occlusion": SparsityPlan.from_mapping({"classifier": 0.3, "blocks.0.narrow": 0.7}),
        "lime": SparsityPlan.from_mapping({"blocks.1": 0.5}),
        "lrp": SparsityPlan.from_mapping({"blocks.1": 0.0}),
    }
    arm = tuned_arm(model, plans, **FEW)
    found = networks_of(arm, case, tuple(plans))
    for method, plan in list(plans.items())[:3]:
        assert torch.equal(found[method], scores_of(model, case.image, plan, case)), method
    with torch.no_grad():
        assert torch.equal(found["lrp"], model.module(case.inputs))
    assert not torch.equal(found["saliency"], found["occlusion"])
    groups = [group for group, _ in arm.networks(case, tuple(plans))]
    assert ("saliency", "lime") in groups  # one trace for both
    with pytest.raises(InvalidInputError, match="no plan for method 'deep_lift'"):
        list(arm.networks(case, ("deep_lift",)))


def test_a_plan_with_a_default_prunes_all_layers(model: LoadedModel, files: dict[str, Path]) -> None:
    case = read_case(model, files["02.png"])
    plans = {
        "saliency": SparsityPlan.uniform(0.5),
        "occlusion": SparsityPlan({"classifier": 0.3}),
        "lrp": SparsityPlan({"stem": 0.5}, default=0.3),
        "lime": SparsityPlan({"stem": 0.5}),
    }
    found = networks_of(tuned_arm(model, plans, **FEW), case, tuple(plans))
    for method, plan in plans.items():
        assert torch.equal(found[method], scores_of(model, case.image, plan, case))


def test_what_no_image_could_be_traced_with_is_refused_at_once(model: LoadedModel) -> None:
    with pytest.raises(InvalidInputError, match="num_augmentations must be a whole number"):
        trace_arm(model, 0.5, num_augmentations=0)
    with pytest.raises(InvalidInputError, match="'block' matches no prunable layer"):
        tuned_arm(model, {"saliency": SparsityPlan({"block": 0.5})})
    with pytest.raises(InvalidInputError, match="plan for .saliency. is a ErrorBudget: pass SparsityPlans"):
        tuned_arm(model, {"saliency": sf.presets.default})  # type: ignore[dict-item]
    with pytest.raises(InvalidInputError, match="sparsity must lie within"):
        set_arm(model, [], 1.5)
    with pytest.raises(TypeError, match="'augmentations' is no setting"):
        trace_arm(model, 0.5, augmentations=4)


def test_a_set_does_not_explain_its_own_images(model: LoadedModel, files: dict[str, Path]) -> None:
    cases = list(first_cases(clean_cases(model, files), 8).values())
    renamed = [replace(each, name=f"images/{each.name}") for each in cases]
    with pytest.raises(InvalidInputError, match="its photograph is among those that this arm is made from"):
        list(set_arm(model, renamed, 0.5, **FEW).networks(cases[2], METHODS))
    with pytest.raises(InvalidInputError, match="its photograph is among those that this arm is made from"):
        list(sparse_fc_arm(model, renamed).networks(cases[2], METHODS))
    others = [each for each in cases if each.target != cases[0].target]
    with pytest.raises(InvalidInputError, match=f"no image to make a trace from has class {cases[0].target}"):
        list(set_arm(model, others, 0.5, by_class=True, **FEW).networks(cases[0], METHODS))


# Evaluations


def by_hand(model: LoadedModel, case: Case, sparsity: float | None, method: str, metric: str) -> float:
    module = model.module if sparsity is None else sf.trace(model, case.image, sparsity, **FEW).pruned_copy(model)
    heat = sf.attribute(module, case.inputs, case.target, method)
    measure = {"insertion": metrics.insertion, "deletion": metrics.deletion}[metric]
    return measure(model, case.inputs, heat, case.target, steps=8).auc.item()


def run(model: LoadedModel, files: dict[str, Path], out: Path, **more: Any) -> Evaluation:
    compared = {"dense": dense_arm(model), "fast": trace_arm(model, 0.7, **FEW)}
    settings = {"methods": METHODS, "steps": 8, "arms": compared, **more}
    return evaluate(model, clean_cases(model, files), out=out, **settings)


def test_figures_are_those_of_the_maps(model: LoadedModel, files: dict[str, Path], tmp_path: Path) -> None:
    found = run(model, files, tmp_path / "out", limit=3)
    assert len(found.images) == 3
    assert found.images == tuple(clean_cases(model, files))[:3]
    assert found.values["insertion"].shape == (3, 2, 2)
    for i, name in enumerate(found.images):
        case = read_case(model, files[name])
        for j, sparsity in enumerate((None, 0.7)):
            for k, method in enumerate(METHODS):
                for metric in ("insertion", "deletion"):
                    expected = by_hand(model, case, sparsity, method, metric)
                    assert found.values[metric][i, j, k] == pytest.approx(expected, abs=1e-6)
    assert found.failures == {}


def test_the_seed_is_that_of_the_methods(model: LoadedModel, files: dict[str, Path], tmp_path: Path) -> None:
    found = run(model, files, tmp_path / "out", limit=1, methods=["gradient_shap"], seed=3)
    case = read_case(model, files[found.images[0]])
    areas = []
    for seed in (3, 0):
        heat = sf.attribute(model, case.inputs, case.target, "gradient_shap", seed=seed)
        areas.append(metrics.insertion(model, case.inputs, heat, case.target, steps=8).auc.item())
    assert found.values["insertion"][0, 0, 0] == pytest.approx(areas[0], abs=1e-6)
    assert abs(areas[0] - areas[1]) > 1e-5


def test_trojan_figures(attacked: LoadedModel, files: dict[str, Path], tmp_path: Path) -> None:
    Image.new("RGB", (SIDE, SIDE), (230, 10, 10)).save(files["00.png"])
    cases = attacked_cases(attacked, files, [HEART], sizes=(0.4, 0.6))
    compared = {"dense": dense_arm(attacked)}
    found = evaluate(attacked, cases, compared, tmp_path / "out", metric="trojan", methods=["occlusion"])
    assert set(found.images) == set(files) - {"00.png"}
    assert "without the patch" in found.left_out["00.png"]
    for name, (value,) in zip(found.images, found.values["trojan"][:, 0], strict=True):
        case = cases[name]()
        heat = sf.attribute(attacked, case.inputs, 1, "occlusion")
        assert value == pytest.approx(metrics.trojan_auc(heat, case.patch).item())
        assert value > 0.5


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is measured, by image and arm, as it is."""
    measured = []
    measure = evaluation._Measurement.__call__

    def count(self: Any, case: Case, arm: Arm, methods: tuple[str, ...]) -> Any:
        measured.append((case.name, str(arm.settings["arm"])))
        return measure(self, case, arm, methods)

    monkeypatch.setattr(evaluation._Measurement, "__call__", count)
    return measured


def plain(found: Evaluation) -> tuple[Any, ...]:
    return found.images, found.arms, found.methods, {key: value.tolist() for key, value in found.values.items()}


@pytest.mark.parametrize("cut", ["after a record", "within a record"])
def test_a_run_that_was_cut_short_goes_on(
    model: LoadedModel,
    files: dict[str, Path],
    tmp_path: Path,
    counted: list[tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    cut: str,
) -> None:
    whole = run(model, files, tmp_path / "whole")
    every = list(counted)
    assert len(every) == 2 * len(files)
    counted.clear()
    append = evaluation.append_line

    def break_off(path: Path, line: str) -> None:
        if len(counted) == 7:
            if cut == "within a record":
                with path.open("ab") as file:
                    file.write(line.encode()[: len(line) // 2])
            raise KeyboardInterrupt
        append(path, line)

    monkeypatch.setattr(evaluation, "append_line", break_off)
    with pytest.raises(KeyboardInterrupt):
        run(model, files, tmp_path / "out")
    monkeypatch.setattr(evaluation, "append_line", append)
    counted.clear()
    assert plain(run(model, files, tmp_path / "out")) == plain(whole)
    assert counted == every[6:]  # nothing is measured twice but what was being written
    counted.clear()
    assert plain(run(model, files, tmp_path / "out")) == plain(whole)
    assert counted == []


def test_methods_arms_and_images_may_be_added(
    model: LoadedModel, files: dict[str, Path], tmp_path: Path, counted: list[tuple[str, str]]
) -> None:
    few = run(model, files, tmp_path / "out", limit=2, methods=["saliency"], arms={"dense": dense_arm(model)})
    assert len(counted) == 2
    more = run(model, files, tmp_path / "out", limit=3)
    assert len(counted) == 2 + 6
    assert np.array_equal(more.values["insertion"][:2, :1, :1], few.values["insertion"])
    assert plain(more) == plain(run(model, files, tmp_path / "afresh", limit=3))


def test_another_run_is_not_mixed_in(model: LoadedModel, files: dict[str, Path], tmp_path: Path) -> None:
    run(model, files, tmp_path / "out", limit=1)
    with pytest.raises(InvalidInputError, match="holds a run with steps 8, not 9"):
        run(model, files, tmp_path / "out", limit=1, steps=9)
    with pytest.raises(InvalidInputError, match="whose arm 'fast' has another sparsity: choose another"):
        run(model, files, tmp_path / "out", arms={"dense": dense_arm(model), "fast": trace_arm(model, 0.6, **FEW)})
    with torch.no_grad():
        model.module.classifier.weight[0, 0] += 1e-3
    with pytest.raises(InvalidInputError, match="holds a run with weights_sha256"):
        run(model, files, tmp_path / "out", limit=1)


@pytest.mark.parametrize("change", ["image", "class", "traced image"])
def test_another_case_of_the_same_name_is_not_mixed_in(
    model: LoadedModel, files: dict[str, Path], tmp_path: Path, change: str
) -> None:
    compared = {"dense": dense_arm(model)}
    case = read_case(model, files["01.png"])
    settings: dict[str, Any] = {"methods": METHODS, "steps": 8}
    evaluate(model, [case], compared, tmp_path / "out", **settings)
    evaluate(model, [read_case(model, files["01.png"])], compared, tmp_path / "out", **settings)  # the same again
    other = {
        "image": lambda: make_case(model, 1 - case.pixels, name="01.png", target=case.target),
        "class": lambda: make_case(model, case.image, name="01.png", target=(case.target + 1) % 4),
        "traced image": lambda: replace(case, image=1 - case.pixels),
    }[change]()
    with pytest.raises(InvalidInputError, match=r"01\.png was another image, or was explained for another class"):
        evaluate(model, [other], compared, tmp_path / "out", **settings)


def test_another_patch_is_not_mixed_in(attacked: LoadedModel, files: dict[str, Path], tmp_path: Path) -> None:
    compared, settings = {"dense": dense_arm(attacked)}, {"metric": "trojan", "methods": ["occlusion"]}
    for sizes in ((0.4, 0.4), (0.6, 0.6)):
        cases = {"01.png": attacked_cases(attacked, files, [HEART], sizes=sizes)["01.png"]}
        if sizes[0] == 0.4:
            evaluate(attacked, cases, compared, tmp_path / "out", **settings)
        else:
            with pytest.raises(InvalidInputError, match=r"01\.png was another image"):
                evaluate(attacked, cases, compared, tmp_path / "out", **settings)


def test_other_reference_images_or_weights_are_another_arm(
    model: LoadedModel, files: dict[str, Path], tmp_path: Path
) -> None:
    cases = list(first_cases(clean_cases(model, files), 8).values())
    other = quarters()
    with torch.no_grad():
        other.module.classifier.bias[0] += 1
    darker = [make_case(model, each.pixels / 2, name=each.name) for each in cases[:3]]
    pairs = [
        (set_arm(model, cases[:3], 0.5, **FEW), set_arm(model, darker, 0.5, **FEW)),
        (sparse_fc_arm(model, cases[:3]), sparse_fc_arm(model, darker)),
        (module_arm(model.module), module_arm(other.module)),
    ]
    for i, (one, changed) in enumerate(pairs):
        arms_of = [{"dense": dense_arm(model), "arm": arm} for arm in (one, changed)]
        evaluate(model, cases[4:5], arms_of[0], tmp_path / f"{i}", methods=["saliency"], steps=8)
        with pytest.raises(InvalidInputError, match="whose arm 'arm' has another (images|weights_sha256): choose"):
            evaluate(model, cases[4:5], arms_of[1], tmp_path / f"{i}", methods=["saliency"], steps=8)


@pytest.mark.parametrize("cases", ["without a patch", "of one name", "records alone"])
def test_cases_and_folders_that_cannot_be_used(
    model: LoadedModel, files: dict[str, Path], tmp_path: Path, cases: str
) -> None:
    case, compared, out = read_case(model, files["01.png"]), {"dense": dense_arm(model)}, tmp_path / "out"
    if cases == "without a patch":
        with pytest.raises(InvalidInputError, match="it has no patch: make it with attacked_case"):
            evaluate(model, [case], compared, out, metric="trojan")
        assert not (out / "records.jsonl").exists()
    elif cases == "of one name":
        with pytest.raises(InvalidInputError, match="two cases have one name"):
            evaluate(model, [case, case], compared, out)
        one, two = make_case(model, case.pixels), make_case(model, 1 - case.pixels)
        assert one.name != two.name
    else:
        evaluate(model, [case], compared, out, methods=["saliency"])
        (out / "settings.json").unlink()
        with pytest.raises(InvalidInputError, match=r"has records but no settings\.json"):
            evaluate(model, [case], compared, out, methods=["saliency"])


def test_damaged_records_are_named(model: LoadedModel, files: dict[str, Path], tmp_path: Path) -> None:
    run(model, files, tmp_path / "out", limit=2)
    records = tmp_path / "out" / "records.jsonl"
    lines = records.read_text().splitlines()
    records.write_text("\n".join([lines[0], "nonsense", *lines[1:]]) + "\n")
    with pytest.raises(InvalidInputError, match=r"line 2 of .*records\.jsonl' is no record"):
        run(model, files, tmp_path / "out", limit=2)
    for value in ("abc", 7.5, True, None):
        record = json.loads(lines[0])
        record["values"]["insertion"]["saliency"] = value
        records.write_text("\n".join([json.dumps(record), *lines[1:]]) + "\n")
        with pytest.raises(InvalidInputError, match=r"line 1 .* \(insertion of 'saliency' is .*, not within 0\.\.1\)"):
            run(model, files, tmp_path / "out", limit=2)
    (tmp_path / "out" / "settings.json").write_text("[]")
    with pytest.raises(InvalidInputError, match=r"cannot read .*settings\.json"):
        run(model, files, tmp_path / "out", limit=2)


def test_one_photograph_counts_once(model: LoadedModel, files: dict[str, Path], tmp_path: Path) -> None:
    twice = dict(files)
    for name, path in files.items():
        twice[f"copy of {name}"] = tmp_path / f"copy of {name}"
        twice[f"copy of {name}"].write_bytes(path.read_bytes())
    found = run(model, twice, tmp_path / "out")
    assert len(found.images) == len(files)
    assert len(found.left_out) == len(files)
    for name, reason in found.left_out.items():
        same = reason.removeprefix("it is the same photograph as ")
        assert {name, same} & files.keys() == {name.removeprefix("copy of ")}


def test_the_first_cases_are_of_different_photographs(
    model: LoadedModel, files: dict[str, Path], tmp_path: Path
) -> None:
    twice = dict(files)
    for name, path in files.items():
        twice[f"copy of {name}"] = tmp_path / f"copy of {name}"
        twice[f"copy of {name}"].write_bytes(path.read_bytes())
    found = first_cases(clean_cases(model, twice), 16)
    assert len({case.photograph for case in found.values()}) == len(found) == len(files)


def test_records_that_contradict_each_other(model: LoadedModel, files: dict[str, Path], tmp_path: Path) -> None:
    run(model, files, tmp_path / "out", limit=1)
    records = tmp_path / "out" / "records.jsonl"
    lines = records.read_text().splitlines()
    for change, message in (
        (lambda record: record["values"]["insertion"].update(saliency=0.11), r"is 0.11, but 0\.\d+ in an earlier line"),
        (lambda record: record.update(case_sha256="0"), "case_sha256 of .* is another in an earlier line"),
        (lambda record: record.pop("arm"), "it has no 'arm'"),
    ):
        record = json.loads(lines[0])
        change(record)
        records.write_text("\n".join([*lines, json.dumps(record)]) + "\n")
        with pytest.raises(InvalidInputError, match=rf"line {len(lines) + 1} of .* is no record \(.*{message}"):
            run(model, files, tmp_path / "out", limit=1)
    records.write_bytes(records.read_bytes() + b"\xff\xfe\n")
    with pytest.raises(InvalidInputError, match=rf"line {len(lines) + 2} of .* is no text: delete that line"):
        run(model, files, tmp_path / "out", limit=1)
    records.write_text("\n".join(lines) + "\n")
    settings = tmp_path / "out" / "settings.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "arms": [1]}))
    with pytest.raises(InvalidInputError, match="it holds no object, or no arms"):
        run(model, files, tmp_path / "out", limit=1)


def test_where_no_case_can_be_used_the_reasons_are_counted(
    attacked: LoadedModel, files: dict[str, Path], tmp_path: Path
) -> None:
    for name in list(files)[:2]:
        files[name].write_bytes(b"no image")
    star = Trojan(Patch.drawn("star"), 1)
    with pytest.raises(InvalidInputError) as refusal:
        evaluate(attacked, attacked_cases(attacked, files, [star]), {"dense": dense_arm(attacked)}, tmp_path / "out",
                 metric="trojan", methods=METHODS)  # fmt: skip
    assert re.search(r"6, such as 0\d.png: the network is not fooled by 'star'", str(refusal.value))
    assert "none of 8 images can be used (" in str(refusal.value)


def test_names_that_are_no_unicode(model: LoadedModel, files: dict[str, Path], tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    files[name] = files["00.png"].rename(files["00.png"].with_name(name))
    del files["00.png"]
    found = run(model, files, tmp_path / "out")
    assert name in found.images
    found.save(tmp_path / "out")
    assert b"caf\xe9.png" in (tmp_path / "out" / "values.csv").read_bytes()
    again = run(model, files, tmp_path / "out")
    assert plain(again) == plain(found)


def test_photographs_are_told_by_what_is_in_them(
    model: LoadedModel, attacked: LoadedModel, files: dict[str, Path]
) -> None:
    """Whatever their files are called, with a patch or without."""
    known = photograph_digest(load_image(files["02.png"]))
    files["renamed.png"] = files["02.png"].rename(files["02.png"].with_name("renamed.png"))
    del files["02.png"]
    files["01.png"].rename(files["01.png"].with_name("02.png"))
    files["02.png"] = files.pop("01.png").with_name("02.png")
    for cases in (clean_cases(model, files), attacked_cases(attacked, files, [HEART], sizes=(0.5, 0.5))):
        for wrong in ([known], {"02.png": "a plan was tuned on it"}):
            with pytest.raises(InvalidInputError, match="seen must hold the reasons by Case.photograph"):
                unseen_cases(cases, wrong)
        unseen = unseen_cases(cases, {known: "a plan was tuned on it"})
        assert list(unseen) == list(cases)
        with pytest.raises(InvalidInputError, match="^a plan was tuned on it$"):
            unseen["renamed.png"]()
        assert unseen["02.png"]().photograph == cases["02.png"]().photograph


def test_a_second_run_in_a_folder_is_refused(model: LoadedModel, files: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    with held_folder(tmp_path / "out"), pytest.raises(InvalidInputError, match="another run writes to .*out'"):
        run(model, files, tmp_path / "out")
    assert run(model, files, tmp_path / "out").images


def test_maps_that_are_the_same_everywhere_are_told(model: LoadedModel, files: dict[str, Path], tmp_path: Path) -> None:
    def nothing(model: nn.Module, inputs: Tensor, _: int) -> Tensor:
        weights = model.blocks[1].wide.weight
        return torch.full_like(inputs, 0.0) if (weights == 0).any() else inputs

    register_method("nothing", nothing)
    try:
        arms = {"dense": dense_arm(model), "fast": trace_arm(model, 0.6, **FEW)}
        wanted: dict[str, Any] = {"methods": ("saliency", "nothing"), "steps": 4, "limit": 2}
        for _ in range(2):  # the second time, from the records
            found = evaluate(model, clean_cases(model, files), arms, tmp_path / "out", **wanted)
            assert found.flat == tuple((image, "fast", "nothing") for image in found.images)
            assert found.report()["flat"][0] == {"image": found.images[0], "arm": "fast", "method": "nothing"}
            assert "tell nothing, are maps of nothing by fast (2)." in found.tables()
        assert not np.isnan(found.values["insertion"]).any()
    finally:
        unregister_method("nothing")


def test_a_run_that_measured_nothing_does_not_stand_in_the_way(
    model: LoadedModel, files: dict[str, Path], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    with pytest.raises(InvalidInputError, match="none of 1 images can be used"):
        run(model, {"bad.png": bad}, tmp_path / "out", steps=4)
    assert run(model, files, tmp_path / "out", limit=1, steps=5).images


def test_cases_that_are_none(model: LoadedModel, files: dict[str, Path], tmp_path: Path) -> None:
    photograph = load_image(next(iter(files.values())))
    with pytest.raises(InvalidInputError, match="cases must be those of make_case and its kin"):
        evaluate(model, [photograph], {"dense": dense_arm(model)}, tmp_path / "out")  # type: ignore[list-item]
    with pytest.raises(InvalidInputError, match="must be functions that make them: pass clean_cases"):
        evaluate(model, files, {"dense": dense_arm(model)}, tmp_path / "out")


def test_unreadable_images_are_left_out(model: LoadedModel, files: dict[str, Path], tmp_path: Path) -> None:
    files["05.png"].write_bytes(b"no image")
    found = run(model, files, tmp_path / "out")
    assert set(found.images) == set(files) - {"05.png"}
    assert "05.png" in found.left_out["05.png"]
    again = run(model, files, tmp_path / "out")
    assert again.left_out == found.left_out
    Image.new("RGB", (SIDE, SIDE), (250, 9, 9)).save(files["05.png"])  # mended
    assert run(model, files, tmp_path / "out").left_out == {}
    for path in files.values():
        path.write_bytes(b"no image")
    with pytest.raises(InvalidInputError, match=r"none of 8 images can be used \(.*\.png: "):
        run(model, files, tmp_path / "none")


def test_a_method_that_fails_is_named_and_costs_no_other(
    model: LoadedModel, files: dict[str, Path], tmp_path: Path
) -> None:
    def fails(_: nn.Module, inputs: Tensor, target: int) -> Tensor:
        return torch.full_like(inputs, torch.nan if target == 2 else 1.0)

    register_method("sometimes", fails)
    try:
        found = run(model, files, tmp_path / "out", methods=["sometimes", "saliency"], limit=8)
    finally:
        unregister_method("sometimes")
    third = {name for name in found.images if read_case(model, files[name]).target == 2}
    assert len(third) == 2
    assert {(image, method) for image, _, method in found.failures} == {(image, "sometimes") for image in third}
    assert all("NaN or infinite" in reason for reason in found.failures.values())
    assert np.isnan(found.values["insertion"]).sum() == len(third) * 2
    assert not np.isnan(found.values["insertion"][:, :, 1]).any()
    register_method("sometimes", lambda _, inputs, __: torch.ones_like(inputs))
    try:
        again = run(model, files, tmp_path / "out", methods=["sometimes", "saliency"], limit=8)
    finally:
        unregister_method("sometimes")
    assert again.failures == {}  # what failed is tried again
    assert not np.isnan(again.values["insertion"]).any()


def test_a_missing_library_ends_the_run(
    monkeypatch: pytest.MonkeyPatch, model: LoadedModel, files: dict[str, Path], tmp_path: Path
) -> None:
    def missing(*_: Any) -> Tensor:
        raise MissingDependencyError("this needs the package 'zennit'")

    monkeypatch.setattr(evaluation, "answer", missing)
    with pytest.raises(MissingDependencyError, match="zennit"):
        run(model, files, tmp_path / "out", limit=1)


def test_a_metric_that_cannot_be_told_costs_no_other_image(
    attacked: LoadedModel, files: dict[str, Path], tmp_path: Path
) -> None:
    cases = [each() for each in attacked_cases(attacked, files, [HEART], sizes=(0.5, 0.5)).values()][:3]
    cases[1] = replace(cases[1], patch=torch.ones_like(cases[1].patch))
    settings: dict[str, Any] = {"metric": "trojan", "methods": ["occlusion"]}
    found = evaluate(attacked, cases, {"dense": dense_arm(attacked)}, tmp_path / "out", **settings)
    assert {(image, method) for image, _, method in found.failures} == {(cases[1].name, "occlusion")}
    assert "covers all of the image" in next(iter(found.failures.values()))
    assert np.isnan(found.values["trojan"][:, 0, 0]).tolist() == [False, True, False]


def test_an_arm_that_cannot_be_made_for_an_image(model: LoadedModel, files: dict[str, Path], tmp_path: Path) -> None:
    reference = list(first_cases(clean_cases(model, files), 2).values())
    compared = {"dense": dense_arm(model), "generic": set_arm(model, reference, 0.5, **FEW)}
    found = run(model, files, tmp_path / "out", arms=compared)
    own = {case.name for case in reference}
    assert {(image, arm) for image, arm, _ in found.failures} == {(name, "generic") for name in own}
    (row,) = (row for row in found.compare() if (row.metric, row.method, row.arm) == ("insertion", "mean", "generic"))
    assert row.images == len(files) - len(own)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ["saliences"]}, "'saliences'; nearest: 'saliency'"),
        ({"methods": []}, "no attribution method"),
        ({"limit": 0}, "limit must be a whole number of at least 1"),
        ({"steps": 0}, "steps must be a whole number of at least 1"),
        ({"seed": -1}, "seed must be a whole number of at least 0"),
        ({"arms": {}}, "no arm is to be measured"),
    ],
)
def test_settings_that_cannot_be_used(
    model: LoadedModel, files: dict[str, Path], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        run(model, files, tmp_path / "out", **change)
    assert not (tmp_path / "out").exists()


def test_an_unknown_metric(model: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="metric='pointing' is unknown: choose one of trojan, insertion"):
        evaluate(model, {}, {"dense": dense_arm(model)}, tmp_path, metric="pointing")


def test_records_are_plain_json(model: LoadedModel, files: dict[str, Path], tmp_path: Path) -> None:
    compared = {
        "dense": dense_arm(model),
        "preset": trace_arm(model, sf.presets.last_half, hessian_dtype=torch.float64, **FEW),
    }
    run(model, files, tmp_path / "out", limit=1, arms=compared)
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["arms"]["preset"]["hessian_dtype"] == "torch.float64"
    assert settings["arms"]["preset"]["sparsity"]["targets"]["classifier"] == 0.8
    (record, _) = map(json.loads, (tmp_path / "out" / "records.jsonl").read_text().splitlines())
    assert record["values"].keys() == {"insertion", "deletion"}
    assert record["seconds"].keys() == {"maps", "metrics"}


def test_functions_in_settings_go_by_their_names(model: LoadedModel) -> None:
    def views(image: Tensor, count: int, _: torch.Generator, extra: int = 0) -> Tensor:
        assert extra >= 0
        return image.expand(count, -1, -1, -1)

    settings = trace_arm(model, 0.5, augment=views).settings
    assert settings["augment"].startswith("test_evaluation.")
    assert "0x" not in settings["augment"]
    bound = trace_arm(model, 0.5, augment=partial(views, extra=3)).settings["augment"]
    assert bound == {"function": settings["augment"], "extra": 3}
