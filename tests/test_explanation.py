"""Explanations: both arms, the model as it was, the files, the figure, and refusals before any work."""

from __future__ import annotations

import copy
import io
import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from spade_fast import attribution, figures, tracer
from spade_fast.attribution import METHODS, Method, attribute
from spade_fast.errors import InvalidInputError, MissingDependencyError
from spade_fast.explanation import Explanation, Prediction, explain
from spade_fast.methods import DEFAULT_METHODS, Question
from spade_fast.models import LoadedModel
from spade_fast.preprocessing import Preprocess
from spade_fast.traces import Trace

pytest.importorskip("captum")
pytest.importorskip("matplotlib")

QUICK: dict[str, Any] = {"sparsity": {"conv": 0.5, "fc": 0.25}, "num_augmentations": 4}


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.unused = nn.Embedding(2, 2)
        self.norm = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        return self.fc((x + torch.relu(self.conv(x))).mean(dim=(2, 3)))


def load_tiny() -> LoadedModel:
    torch.manual_seed(0)
    preprocess = Preprocess(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), input_size=16, resize_size=18)
    names = ("ant", "bee", "a cat of a breed with a very long name")
    return LoadedModel("tiny", Tiny().eval(), preprocess, names, "random")


@pytest.fixture
def loaded() -> LoadedModel:
    return load_tiny()


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def explanation(photo: Image.Image) -> Explanation:
    return explain(load_tiny(), photo, **QUICK)


def state(network: nn.Module) -> tuple[object, ...]:
    """Everything about a network that an explanation might leave changed; tensors by identity and by value."""
    return (
        [(name, id(parameter), parameter.requires_grad) for name, parameter in network.named_parameters()],
        [value.tolist() for value in network.state_dict().values()],
        [None if parameter.grad is None else parameter.grad.tolist() for parameter in network.parameters()],
        [module.training for module in network.modules()],
        [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in network.modules()],
    )


def test_dense_arm_is_the_network_and_spade_arm_the_trace(
    loaded: LoadedModel, photo: Image.Image, explanation: Explanation
) -> None:
    view = loaded.preprocess.view(photo)
    inputs = loaded.preprocess(view[None])
    assert torch.equal(explanation.image, view)
    pruned = explanation.trace.pruned_copy(loaded)
    arms = (
        (loaded.module, explanation.dense, explanation.dense_predictions),
        (pruned, explanation.spade, explanation.spade_predictions),
    )
    for network, maps, predictions in arms:
        assert list(maps) == list(DEFAULT_METHODS)
        for method, heat in maps.items():
            assert torch.equal(heat, attribute(network, inputs, explanation.target, method))
        with torch.no_grad():
            probability, index = network(inputs)[0].softmax(dim=0).sort(descending=True)
        assert [prediction.index for prediction in predictions] == index.tolist()
        assert [prediction.probability for prediction in predictions] == pytest.approx(probability.tolist())
        assert [prediction.name for prediction in predictions] == [loaded.category(place) for place in index.tolist()]
    assert explanation.target == explanation.dense_predictions[0].index
    assert explanation.target_name == loaded.category(explanation.target)


def test_trace_is_the_one_that_trace_makes(loaded: LoadedModel, photo: Image.Image, explanation: Explanation) -> None:
    expected = tracer.trace(loaded, photo, **QUICK)
    assert expected.rows() == explanation.trace.rows()
    again = explain(loaded, photo, trace=expected)
    assert again.trace is expected
    assert all(torch.equal(again.spade[method], heat) for method, heat in explanation.spade.items())


def test_target_methods_and_top_are_as_asked_for(loaded: LoadedModel, photo: Image.Image) -> None:
    found = explain(loaded, photo, target=2, methods=["saliency", "saliency"], top=2, **QUICK)
    assert (found.target, list(found.dense), list(found.spade)) == (2, ["saliency"], ["saliency"])
    assert len(found.dense_predictions) == len(found.spade_predictions) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_plain_module_on_a_tensor_image(dtype: torch.dtype) -> None:
    image = torch.rand(3, 9, 11, generator=torch.Generator().manual_seed(0))
    found = explain(load_tiny().module.to(dtype), image, preprocess=nn.Identity(), **QUICK)
    assert torch.equal(found.image, image)
    assert found.target_name == f"class {found.target}"
    assert found.settings["model"] == "Tiny"
    assert {(heat.dtype, heat.shape) for heat in (*found.dense.values(), *found.spade.values())} == {
        (torch.float32, (9, 11))
    }


def test_works_in_inference_mode(loaded: LoadedModel, photo: Image.Image, explanation: Explanation) -> None:
    with torch.inference_mode():
        found = explain(loaded, photo, **QUICK)
    assert all(torch.equal(found.spade[method], heat) for method, heat in explanation.spade.items())


def test_layers_are_in_the_order_of_the_model(explanation: Explanation) -> None:
    assert explanation.layer_order == ("stem", "unused", "conv", "fc")


@pytest.mark.parametrize("failing_call", [None, 1, 2])
def test_model_is_left_as_it_was(
    loaded: LoadedModel, photo: Image.Image, failing_call: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fail(question: Question) -> Tensor:
        calls.append(question.forward(question.inputs)[0, question.target])
        if len(calls) == failing_call:
            raise RuntimeError("a method failed")
        return METHODS["saliency"].compute(question)

    monkeypatch.setattr(attribution, "METHODS", MappingProxyType({"failing": Method("Failing", fail)}))
    loaded.module.train()
    loaded.module.norm.eval()  # type: ignore[union-attr]
    loaded.module.stem.weight.grad = torch.ones(8, 3, 3, 3)  # type: ignore[union-attr]
    loaded.module.fc.weight.requires_grad_(False)  # type: ignore[union-attr]
    before = state(loaded.module)
    if failing_call is None:
        explain(loaded, photo, methods=["failing"], **QUICK)
    else:
        with pytest.raises(InvalidInputError, match="method 'failing' fails on Tiny .RuntimeError: a method failed"):
            explain(loaded, photo, methods=["failing"], **QUICK)
        assert len(calls) == failing_call
    assert state(loaded.module) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"methods": ["salency"]}, "no attribution method goes by the name 'salency'; nearest: 'saliency'"),
        ({"methods": "saliency"}, r"pass \['saliency'\]"),
        ({"methods": "ALL"}, r"methods must be 'all' or a sequence of names, got 'ALL': such as \['saliency', 'lrp'\]"),
        ({"methods": None}, "methods must be 'all' or a sequence of names, got None"),
        ({"trace": "trace"}, "trace is a str: pass what spade_fast.trace returns"),
        ({"methods": []}, "no attribution method is asked for"),
        ({"target": 3}, r"target 3 is no class of this model: pass an index, a whole number within 0\.\.2"),
        ({"target": -1}, "target -1 is no class"),
        ({"top": 0}, "top must be a positive whole number, got 0"),
        ({"trace": Trace({}), "damping": 1}, r"both trace= and settings for making one \(damping\)"),
    ],
)
def test_refusals_come_before_any_work(
    loaded: LoadedModel,
    photo: Image.Image,
    arguments: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tracer, "trace", lambda *_, **__: pytest.fail("a trace was made"))
    with pytest.raises(InvalidInputError, match=message):
        explain(loaded, photo, **arguments)


def test_missing_captum_is_noticed_before_any_work(
    loaded: LoadedModel, photo: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracer, "trace", lambda *_, **__: pytest.fail("a trace was made"))
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'spade-fast\[interpret\]'"):
        explain(loaded, photo)


def test_network_that_answers_with_nan(loaded: LoadedModel, photo: Image.Image) -> None:
    with torch.no_grad():
        loaded.module.fc.bias[0] = torch.nan  # type: ignore[union-attr,index]
    with pytest.raises(InvalidInputError, match="Tiny answers this image with NaN or infinite class scores"):
        explain(loaded, photo, **QUICK)


def test_threads_share_a_network(loaded: LoadedModel, photo: Image.Image) -> None:
    photos = [photo, photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)] * 2
    settings: dict[str, Any] = {"methods": ["saliency", "occlusion"], **QUICK}
    before = state(loaded.module)
    expected = [explain(loaded, each, **settings) for each in photos]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda each: explain(loaded, each, **settings), photos))
    assert state(loaded.module) == before
    for one, other in zip(found, expected, strict=True):
        assert one.spade_predictions == other.spade_predictions
        for name in settings["methods"]:
            assert torch.equal(one.dense[name], other.dense[name])
            assert torch.equal(one.spade[name], other.spade[name])


def test_networks_that_cannot_be_copied_get_the_weights_themselves(photo: Image.Image, loaded: LoadedModel) -> None:
    settings: dict[str, Any] = {"methods": ["saliency"], **QUICK}
    expected = explain(loaded, photo, **settings)
    loaded.module.lock = threading.Lock()
    before = state(loaded.module)
    found = explain(loaded, photo, **settings)
    assert state(loaded.module) == before
    assert torch.equal(found.spade["saliency"], expected.spade["saliency"])


@pytest.mark.parametrize("in_place", ["network", "preprocess"])
def test_images_are_the_callers_own(in_place: str) -> None:
    class Greedy(Tiny):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.sub_(0.45).div_(0.2) if in_place == "network" else x)

    def normalise(batch: Tensor) -> Tensor:
        return batch.sub_(0.45).div_(0.2) if in_place == "preprocess" else batch

    torch.manual_seed(0)
    image, module = torch.rand(3, 16, 16), Greedy().eval()
    before = image.clone()
    found = explain(module, image, preprocess=normalise, methods=["saliency"], **QUICK)
    assert torch.equal(image, before)
    image.zero_()
    assert torch.equal(found.image, before)
    seen = before[None] if in_place == "network" else normalise(before[None].clone())
    assert torch.equal(found.dense["saliency"], attribute(module, seen, found.target, "saliency"))
    scores = module(seen.clone())[0].softmax(0)
    assert found.dense_probability == pytest.approx(scores[found.target].item())
    sparse = found.trace.pruned_copy(module)
    assert torch.equal(found.spade["saliency"], attribute(sparse, seen, found.target, "saliency"))


def test_the_seed_is_that_of_all_that_is_random(loaded: LoadedModel, photo: Image.Image) -> None:
    found = explain(loaded, photo, methods=["gradient_shap"], seed=3, **QUICK)
    assert found.settings["seed"] == found.trace.settings["seed"] == 3
    inputs = loaded.preprocess(loaded.preprocess.view(photo)[None])
    for maps, module in ((found.dense, loaded.module), (found.spade, found.trace.pruned_copy(loaded))):
        assert torch.equal(maps["gradient_shap"], attribute(module, inputs, found.target, "gradient_shap", seed=3))
        assert not torch.equal(maps["gradient_shap"], attribute(module, inputs, found.target, "gradient_shap"))


def test_gallery_knows_the_probability_of_any_class(loaded: LoadedModel, photo: Image.Image) -> None:
    asked = explain(loaded, photo, methods=["saliency"], target=2, top=1, **QUICK)
    assert asked.dense_predictions[0].index != 2
    texts = [text.get_text() for text in figures.gallery([asked]).texts]
    assert f"dense: {100 * asked.dense_probability:.0f} %" in texts
    assert asked.dense_probability > 0.05


def test_trace_of_another_network(loaded: LoadedModel, photo: Image.Image, explanation: Explanation) -> None:
    other = copy.deepcopy(loaded)
    other.module.fc = nn.Linear(8, 5)
    with pytest.raises(InvalidInputError, match="'fc' has shape"):
        explain(other, photo, trace=explanation.trace)


def test_report_is_plain_json(explanation: Explanation) -> None:
    report = json.loads(json.dumps(explanation.report(), allow_nan=False))
    assert report == explanation.report()
    assert report["target"] == {
        "index": explanation.target,
        "name": explanation.target_name,
        "probability": {"dense": explanation.dense_probability, "spade": explanation.spade_probability},
    }
    assert explanation.dense_probability == explanation.dense_predictions[0].probability
    assert report["settings"]["seed"] == 0
    assert [row["index"] for row in report["predictions"]["dense"]] == [p.index for p in explanation.dense_predictions]
    assert [row["layer"] for row in report["layers"]] == ["conv", "fc"]
    assert report["dense_layers"] == {"stem": "not in the plan", "unused": "Embedding is not pruned"}
    assert report["settings"]["methods"] == list(DEFAULT_METHODS)
    assert report["settings"]["image_size"] == [16, 16]
    assert Preprocess.from_dict(report["settings"]["preprocess"]).input_size == 16
    assert report["trace_settings"]["num_augmentations"] == 4
    assert set(report["versions"]) == {"spade_fast", "torch", "captum", "python"}


def test_save_writes_everything(explanation: Explanation, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    explanation.save(folder)
    files = explanation.save(folder)  # again, over the first
    written = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    assert written == files  # and no temporary files
    tensors = load_file(files["maps.safetensors"])
    assert len(tensors) == 2 * len(DEFAULT_METHODS)
    for arm, maps in (("dense", explanation.dense), ("spade", explanation.spade)):
        for method, heat in maps.items():
            assert torch.equal(tensors[f"{arm}.{method}"], heat)
            assert torch.equal(torch.from_numpy(np.load(files[f"maps/{arm}_{method}.npy"])), heat)
    assert json.loads(files["report.json"].read_text(encoding="utf-8")) == explanation.report()
    with Image.open(files["explanation.png"]) as picture:
        assert picture.size == tuple(int(160 * side) for side in explanation.figure().get_size_inches())


def test_save_where_nothing_can_be_written(explanation: Explanation, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InvalidInputError, match=r"cannot write '.*explanation.png' \(Not a directory\)"):
        explanation.save(tmp_path / "file" / "folder")


def test_a_file_is_written_whole_or_not_at_all(
    explanation: Explanation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = explanation.save(tmp_path)
    before = {name: path.read_bytes() for name, path in files.items()}

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(InvalidInputError, match="No space left on device"):
        replace(explanation, target_name="another").save(tmp_path)
    assert {name: path.read_bytes() for name, path in files.items()} == before
    assert sum(path.is_file() for path in tmp_path.rglob("*")) == len(before)


def test_autocast_changes_nothing(loaded: LoadedModel, photo: Image.Image, explanation: Explanation) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found = explain(loaded, photo, **QUICK)
    for method, heat in explanation.spade.items():
        assert torch.equal(found.spade[method], heat)
        assert torch.equal(found.dense[method], explanation.dense[method])


def test_all_methods(loaded: LoadedModel, photo: Image.Image) -> None:
    explanation = explain(loaded, photo, methods="all", **QUICK)
    assert list(explanation.dense) == list(explanation.spade) == list(METHODS)
    again = explain(loaded, photo, methods="all", **QUICK)
    assert all(torch.equal(again.spade[name], heat) for name, heat in explanation.spade.items())


def test_methods_that_are_not_valid_are_refused_before_a_trace_is_made(
    photo: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracer, "trace", lambda *_, **__: pytest.fail("a trace was made"))
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    network(torch.zeros(1, 3, 16, 16))
    preprocess = Preprocess(mean=(0.5,) * 3, std=(0.5,) * 3, input_size=16, resize_size=18)
    with pytest.raises(InvalidInputError, match="method 'lrp' is not valid on this network: 1: GroupNorm normalises"):
        explain(network, photo, methods=["saliency", "lrp"], preprocess=preprocess)


# The figure


def overhang(figure: Any) -> float:
    """How far anything that is drawn reaches beyond the page, in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    drawn = figure.get_tightbbox(FigureCanvasAgg(figure).get_renderer())
    width, height = figure.get_size_inches()
    return max(-drawn.x0, -drawn.y0, drawn.x1 - width, drawn.y1 - height)


@pytest.mark.parametrize("methods", [1, 2, 3, 4, 10])
def test_nothing_in_the_figure_is_clipped(explanation: Explanation, methods: int) -> None:
    maps = {f"method_{index}_with_quite_a_long_name": explanation.dense["saliency"] for index in range(methods)}
    name = "a $class$ whose name goes on and on and on, and then some more"
    predictions = (Prediction(0, name, 0.75), Prediction(1, name, 0.25))
    long = replace(
        explanation,
        dense=maps,
        spade=maps,
        target_name=name,
        dense_predictions=predictions,
        spade_predictions=predictions,
        settings={"model": "an_architecture_with_a_name_as_long_as_they_come"},
    )
    figure = long.figure()
    assert overhang(figure) < 0
    assert len([axes for axes in figure.axes if axes.images]) == 2 * methods + 2  # photograph and scale


def test_clipped_text_would_be_noticed(explanation: Explanation) -> None:
    figure = explanation.figure()
    figure.text(0.99, 0.5, "reaches out")
    assert overhang(figure) > 0.5


def test_figure_shows_what_was_pruned(explanation: Explanation) -> None:
    conv = explanation.trace.layers["conv"]
    trace = replace(
        explanation.trace, layers={**explanation.trace.layers, "conv": replace(conv, requested_sparsity=0.9)}
    )
    chart = replace(explanation, trace=trace).figure().axes[-1]
    assert [bar.get_height() for bar in chart.patches] == [conv.sparsity, trace.layers["fc"].sparsity]
    assert [label.get_text() for label in chart.get_xticklabels()] == ["stem", "unused", "conv", "fc"]
    assert [text.get_text() for text in chart.get_legend().get_texts()] == ["pruned", "asked for", "left dense"]
    asked, dense = chart.collections
    assert asked.get_offsets().tolist() == [[2, 0.9]]
    assert dense.get_offsets().tolist() == [[0, 0], [1, 0]]


def test_figure_of_a_trace_that_pruned_nothing(explanation: Explanation) -> None:
    figure = replace(explanation, trace=Trace({}, {"stem": "why"}), layer_order=()).figure()
    assert figure.axes[-1].get_title(loc="left") == "Pruned: none of 1 layers"
    assert replace(explanation, trace=Trace({}), layer_order=()).figure() is not None


def test_maps_are_scaled_by_their_own_percentile() -> None:
    heat = torch.arange(1001.0).view(7, 143)
    assert figures.scaled(heat).max() == 1
    assert figures.scaled(heat).flatten()[500] == pytest.approx(500 / 995)
    assert figures.scaled(torch.zeros(3, 3)).max() == 0
    single = torch.zeros(100, 100)
    single[4, 5] = 2.0
    assert figures.scaled(single)[4, 5] == 1


@pytest.mark.parametrize("methods", [1, 3, 12])
def test_gallery_holds_everything(explanation: Explanation, methods: int) -> None:
    maps = {name: torch.rand(16, 16) for name in list(METHODS)[:methods]}
    first = replace(explanation, dense=maps, spade=maps)
    figure = figures.gallery({"a label that is longer than there is room for": first, "second": first})
    assert overhang(figure) < 0
    assert len([axes for axes in figure.axes if axes.images]) == 2 * (2 * methods + 1) + 1  # photographs and scale
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == [METHODS[name].title for name in maps]


def test_gallery_is_labelled_by_the_classes(explanation: Explanation) -> None:
    texts = [text.get_text() for text in figures.gallery([explanation, explanation]).texts]
    assert texts[0] == texts[3] == figures.shortened(explanation.target_name, 20)
    assert texts[1] == f"dense: {100 * explanation.dense_predictions[0].probability:.0f} %"


def test_galleries_that_cannot_be_drawn(explanation: Explanation) -> None:
    with pytest.raises(InvalidInputError, match="no explanation to draw"):
        figures.gallery([])
    other = replace(explanation, dense={"saliency": torch.rand(16, 16)})
    with pytest.raises(InvalidInputError, match="different methods, saliency, input_x_gradient, .* and saliency: use"):
        figures.gallery({"a": explanation, "b": other})
    with pytest.raises(InvalidInputError, match="gallery draws a list or mapping of explanations, got Explanation"):
        figures.gallery(explanation)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="gallery draws what spade_fast.explain returns, got a Trace"):
        figures.gallery([explanation.trace])  # type: ignore[list-item]


def test_caption_says_what_the_maps_are(explanation: Explanation) -> None:
    assert "Maps: sum over colour channels of |attribution|." in caption(explanation)
    hiding = replace(explanation, dense={"lime": torch.rand(16, 16)}, spade={"lime": torch.rand(16, 16)})
    assert "Maps: LIME: what speaks for the class." in caption(hiding)


def caption(explanation: Explanation) -> str:
    return " ".join(text.get_text() for text in explanation.figure().texts)


def test_figure_needs_no_pyplot(explanation: Explanation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    explanation.figure()


def test_notebooks_show_figures(explanation: Explanation) -> None:
    for figure in (explanation.figure(), figures.gallery([explanation])):
        shown = Image.open(io.BytesIO(figure._repr_jpeg_()))
        assert shown.size == tuple(int(72 * side) for side in figure.get_size_inches())


def test_missing_matplotlib_names_the_cure(explanation: Explanation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'spade-fast\[interpret\]'"):
        explanation.figure()


class Unsteady(nn.Module):
    """A network whose answer depends on its mode."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.modes = load_tiny().module, []

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append(self.training)
        return self.network(x)


def test_answers_are_those_of_evaluation_mode(loaded: LoadedModel, photo: Image.Image) -> None:
    network = Unsteady().train()
    explain(network, photo, preprocess=loaded.preprocess, sparsity={"network.conv": 0.5}, num_augmentations=2)
    assert network.modes
    assert not any(network.modes)
    assert network.training


def test_a_trace_without_evidence_is_warned_of(loaded: LoadedModel, photo: Image.Image) -> None:
    with pytest.warns(UserWarning, match="map by 'saliency' is zero everywhere"):
        explain(loaded, photo, methods=["saliency"], sparsity={"fc": 1.0}, num_augmentations=2)


def test_a_preprocess_that_resizes_is_refused(loaded: LoadedModel) -> None:
    def resizing(batch: Tensor) -> Tensor:
        return nn.functional.interpolate(batch, size=(8, 8))

    with pytest.raises(InvalidInputError, match=r"turns \[12, 14\] pixels into \[8, 8\] inputs"):
        explain(loaded.module, torch.rand(3, 12, 14), preprocess=resizing, **QUICK)
