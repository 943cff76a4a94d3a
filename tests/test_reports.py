"""Reports: what a page says, what of it is from elsewhere, and how people find it in a browser."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accessibility import serious_findings
from pages import Cell, Page
from PIL import Image
from subjects import photographs, quarters, store_of, trace_with

import spade_fast as sf
from spade_fast import figures, markup, metrics, reports
from spade_fast.errors import InvalidInputError, MissingDependencyError
from spade_fast.explanation import Prediction
from spade_fast.imagesets import ListedImage
from spade_fast.models import LoadedModel
from spade_fast.pictures import heat_map, photograph
from spade_fast.store import StoreWriter, image_bytes
from spade_fast.traces import LayerTrace
from spade_fast.visualization import Visualization

for needed in ("captum", "matplotlib", "jinja2", "pyarrow"):
    pytest.importorskip(needed)
pytestmark = pytest.mark.filterwarnings("ignore:.*have no weight left", "ignore:.*run again on its image")

HOSTILE = (
    "<script>alert(1)</script>",
    "\" onload='alert(2)' {{ 7 * 7 }} &amp; </style></summary>",
    "bell \x07, \u202eright to left, \u0634\u062c\u0631\u0629",
    f"\u732b {'very_long_' * 40}",
)
QUICK: dict[str, Any] = {"sparsity": 0.5, "num_augmentations": 4}
METHODS = {"saliency": "Gradient", "input_x_gradient": "Input \u00d7 gradient"}


def legible(name: str) -> str:
    """As a page has it, which may hold no control characters and none that turn text around."""
    return name.replace("\x07", "\\x07").replace("\u202e", "\\u202e")


def page_of(what: Any, path: Path, **options: Any) -> Page:
    return Page(sf.write_report(what, path, **options).path)


def texts(found: Page, caption: str) -> list[list[str]]:
    """What a table says, but for its head."""
    return [[cell.text for cell in row] for row in found.tables[caption][1:]]


def picture(source: str | None) -> np.ndarray[Any, Any]:
    assert source is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).convert("RGB"))


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return replace(quarters(), categories=HOSTILE)


@pytest.fixture(scope="module")
def explanation(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> sf.Explanation:
    folder = tmp_path_factory.mktemp("photographs")
    (path,) = photographs(folder, 1).values()
    return sf.explain(model, sf.load_image(path), methods=list(METHODS), **QUICK)


@pytest.fixture(scope="module")
def neuron() -> Visualization:
    images = torch.rand(3, 1, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    return Visualization(images[0], (images[1], images[2]), "<i>fc", 0, "<b>neuron", (64,), 1.0, (2.0, 3.0), {})


@pytest.fixture(scope="module")
def single(
    explanation: sf.Explanation, model: LoadedModel, neuron: Visualization, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("single") / "page.html"
    summary = sf.write_report(explanation, path, model=model, visualizations=neuron)
    assert (summary.path, summary.images, summary.left_out, summary.without_photograph) == (path, 1, {}, {})
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Photographs by hostile names, and a file that is none."""
    folder = tmp_path_factory.mktemp("images")
    files = dict(zip(HOSTILE, photographs(folder, len(HOSTILE)).values(), strict=True))
    (folder / "broken.png").write_bytes(b"none")
    return {**files, "<u>broken": folder / "broken.png"}


@pytest.fixture(scope="module")
def store(model: LoadedModel, images: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> sf.Store:
    path = tmp_path_factory.mktemp("run") / "store"
    sf.run(model, images, path, methods=list(METHODS), metrics=("insertion", "deletion"), steps=4, **QUICK)
    return sf.Store(path)


@pytest.fixture(scope="module")
def many(store: sf.Store, images: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    summary = sf.write_report(store, tmp_path_factory.mktemp("many") / "page.html", photographs=images)
    assert (summary.images, summary.left_out, summary.without_photograph) == (len(HOSTILE), store.refused, {})
    return summary.path


@pytest.fixture(params=["single", "many"])
def page(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


# What is in it


def test_nothing_is_outside_of_the_page(page: Path) -> None:
    found = Page(page)
    links = [
        value
        for _, attributes in found.elements
        for name, value in attributes.items()
        if name in ("src", "href", "action", "srcset", "data", "poster", "background")
    ]
    assert len(links) > 5
    assert [link for link in links if link is None or not link.startswith(("data:image/", "data:,", "#"))] == []
    assert "url(" not in found.inline["style"]
    assert "@import" not in found.inline["style"]
    assert re.findall(r"https?:|fetch|XMLHttp|import\(", found.inline["script"]) == []
    (policy,) = (each["content"] for each in found.of("meta") if each.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    hashes = {
        f"{kind}-src": f"'sha256-{base64.b64encode(hashlib.sha256(found.inline[kind].encode()).digest()).decode()}'"
        for kind in ("style", "script")
    }
    others = {"default-src": "'none'", "img-src": "data:", "base-uri": "'none'", "form-action": "'none'"}
    assert rules == {**others, **hashes}
    assert [name for _, attributes in found.elements for name in attributes if name.startswith(("on", "style"))] == []


def test_names_from_elsewhere_are_text(page: Path) -> None:
    found = Page(page)
    assert [len(found.of(tag)) for tag in ("script", "style", "u", "b")] == [1, 1, 0, 0]
    for name in HOSTILE:
        assert legible(name) in found.text
    assert "\x07" not in page.read_text(encoding="utf-8")


def test_every_image_and_chart_is_described(page: Path) -> None:
    found = Page(page)
    assert found.of("html") == [{"lang": "en"}]
    pictures = found.of("img")
    assert pictures
    assert all(each["alt"] for each in pictures if each.get("class") != "thumbnail")  # beside the image's name
    assert all(each["loading"] == "lazy" and "alt" in each for each in pictures)
    for chart in found.of("svg"):
        described = chart.get("role") == "img" and chart.get("aria-label")
        assert described or chart.get("aria-hidden") == "true" or "x" in chart  # the latter inside of another
    rows = [row for table in found.tables.values() for row in table]
    assert all(row for row in rows)
    assert len([each for each in found.of("th") if each.get("scope") in ("row", "col")]) == len(found.of("th"))


def test_tables_have_the_numbers_of_the_trace(single: Path, explanation: sf.Explanation) -> None:
    found = Page(single)
    tables = found.tables
    rows = tables["Pruned layers"][1:]
    assert len(rows) == len(explanation.trace.layers) > 3
    for row, expected in zip(rows, explanation.trace.rows(), strict=True):
        assert row[0].text == expected["layer"]
        assert row[1].text == " \u00d7 ".join(map(str, expected["shape"]))
        keys = ("requested_sparsity", "sparsity", "loss", "damping")
        assert [float(cell.value or "") for cell in row[2:6]] == [expected[key] for key in keys]
        assert row[3].text == f"{100 * expected['sparsity']:.1f} %"
        assert row[6].text == str(expected["empty_outputs"])
        assert row[7].text == (expected["fallback"] or "none")
    assert {row[0].text: row[1].text for row in tables["Layers left dense"][1:]} == dict(explanation.trace.dense)
    for caption, predictions in (
        ("Dense network", explanation.dense_predictions),
        ("SPADE trace", explanation.spade_predictions),
    ):
        answers = tables[caption][1:]
        assert [float(row[1].value or "") for row in answers] == [each.probability for each in predictions]
        for row, each in zip(answers, predictions, strict=True):
            assert row[0].text.startswith(legible(each.name))
            assert ("explained" in row[0].text) == (each.index == explanation.target)
    assert ["seed", "0"] in texts(found, "Explanation")
    assert ["torch", torch.__version__] in texts(found, "Versions")


def test_maps_and_photograph_are_those_of_the_explanation(single: Path, explanation: sf.Explanation) -> None:
    found = Page(single)
    maps = [each for each in found.of("img") if "map of what counts" in (each["alt"] or "")]
    expected = [arm[method] for method in METHODS for arm in (explanation.dense, explanation.spade)]
    colours = pytest.importorskip("matplotlib").colormaps["magma"]
    for shown, heat in zip(maps, expected, strict=True):
        values = np.round(255 * figures.scaled(heat)).astype(np.uint8)
        assert np.array_equal(picture(shown["src"]), colours(values, bytes=True)[..., :3])
    (photograph,) = found.of("image")
    pixels = (255 * explanation.image).permute(1, 2, 0).numpy()
    assert np.abs(picture(photograph["href"]) - pixels).mean() < 25  # JPEG of noise
    assert [each["href"] for each in found.of("use")] == [f"#{photograph['id']}"] * len(maps)
    neurons = [each["alt"] for each in found.of("img") if "answers to most" in (each["alt"] or "")]
    arms = ("Dense network", "SPADE trace 1", "SPADE trace 2")
    assert neurons == [f"What <b>neuron answers to most, {arm}" for arm in arms]


def test_insertion_is_measured_with_the_model(single: Path, explanation: sf.Explanation, model: LoadedModel) -> None:
    inputs = model.preprocess(explanation.image[None])
    stack = torch.stack([arm[method] for method in METHODS for arm in (explanation.dense, explanation.spade)])
    curves = metrics.insertion(model, inputs, stack, explanation.target)
    found = Page(single)
    rows = found.tables["Areas under the curves, by metric and method"][1:]
    areas = [float(cell.value or "") for row in rows for cell in row[2:4]]
    assert areas == pytest.approx(curves.auc.tolist())
    lines = found.of("polyline")
    assert [each["class"] for each in lines] == ["dense", "spade"] * len(METHODS)
    for line, expected in zip(lines, curves.probabilities.tolist(), strict=True):
        points = [tuple(map(float, point.split(","))) for point in (line["points"] or "").split()]
        assert points == [
            pytest.approx((x, 1 - y), abs=1e-4) for x, y in zip(curves.shares.tolist(), expected, strict=True)
        ]
    for area in curves.auc.tolist():
        assert f"{area:.3f}" in found.text


def test_without_a_model_there_are_no_curves(explanation: sf.Explanation, tmp_path: Path) -> None:
    found = page_of(explanation, tmp_path / "page.html", title="A <title>")
    assert found.of("polyline") == []
    assert "How faithful" not in found.text
    assert found.text.count("A <title>") == 2  # the window's, and the heading


def test_page_of_a_store_shows_what_its_records_hold(many: Path, store: sf.Store) -> None:
    found = Page(many)
    cards = [each for each in found.of("details") if each.get("class") == "card"]
    assert [each["data-name"] for each in cards] == [legible(name) for name in store]
    for card, name in zip(cards, store, strict=True):
        record = store.records[name]
        assert float(card["data-spade"] or "") == record["probability"]["spade"]
        assert float(card["data-sparsity"] or "") == record["sparsity"]
    means = found.tables["Mean areas under the curves, by metric and method"][1:]
    assert [row[2].text for row in means] == [str(len(store))] * 4
    (first, *_) = (store.records[name]["metrics"] for name in store)
    measured = [(metric, method) for metric, by_arm in first.items() for method in by_arm["dense"]]
    assert len(measured) == 4
    for row, (metric, method) in zip(means, measured, strict=True):
        assert row[:2] == [Cell(METHODS[method]), Cell(metric)]
        for cell, arm in zip(row[3:5], ("dense", "spade"), strict=True):
            values = [record["metrics"][metric][arm][method] for record in map(store.records.get, store) if record]
            assert float(cell.value or "") == pytest.approx(sum(values) / len(values))
    assert [row[0].text for row in found.tables["Left out"][1:]] == ["<u>broken"]
    assert found.tables["Left out"][1][1].text == store.refused["<u>broken"]
    assert len(found.of("image")) == len(store)
    assert "Without a photograph" not in found.tables


def test_damaged_files_and_other_photographs_are_told(store: sf.Store, images: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(store.path, tmp_path / "store")
    copied = sf.Store(tmp_path / "store")
    first, second, third, fourth = store
    copied.file_of(first).write_bytes(b"damaged")
    with copied.file_of(second).open("r+b") as file:  # in a tensor, so that its record can be read
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 255]))
    other = tmp_path / "other.png"
    Image.new("RGB", (16, 16)).save(other)
    summary = sf.write_report(
        tmp_path / "store", tmp_path / "page.html", photographs={third: other, "another list's": images[third]}
    )
    found = Page(summary.path)
    left_out = {row[0].text: row[1].text for row in found.tables["Left out"][1:]}
    assert len(left_out) == 3
    assert left_out == {legible(name): legible(reason) for name, reason in summary.left_out.items()}
    assert "damaged" in left_out[copied.file_of(first).name]
    assert "run again on its image" in left_out[legible(second)]
    unseen = {row[0].text: row[1].text for row in found.tables["Without a photograph"][1:]}
    assert "is another photograph than the one that was explained" in unseen[legible(third)]
    assert "have none of this name" in unseen[legible(fourth)]
    assert unseen == {legible(name): legible(reason) for name, reason in summary.without_photograph.items()}
    assert found.of("image") == found.of("use") == []
    assert len([each for each in found.of("img") if each.get("class") == "thumbnail"]) == 2  # their maps


def test_several_explanations_by_name(explanation: sf.Explanation, neuron: Visualization, tmp_path: Path) -> None:
    named = {"one": explanation, "other": replace(explanation, target=3)}
    found = page_of(named, tmp_path / "page.html", visualizations={"other": [neuron, neuron]})
    assert [each["data-name"] for each in found.of("details") if each.get("class") == "card"] == ["one", "other"]
    assert len([each for each in found.of("img") if "answers to most" in (each["alt"] or "")]) == 6
    listed = page_of([explanation], tmp_path / "page.html")
    assert [each["data-name"] for each in listed.of("details") if each.get("class") == "card"] == ["Image 1"]


@pytest.mark.parametrize(("count", "photograph", "heat"), [(12, (512, 256), (512, 256)), (13, (224, 112), (112, 56))])
def test_images_of_many_are_small(
    explanation: sf.Explanation, tmp_path: Path, count: int, photograph: tuple[int, int], heat: tuple[int, int]
) -> None:
    maps = {"m": torch.eye(512, 1024)}
    wide = replace(explanation, image=torch.zeros(3, 512, 1024), dense=maps, spade=maps)
    found = page_of([wide, *[explanation] * (count - 1)], tmp_path / "page.html")
    assert (found.of("image")[0]["width"], found.of("image")[0]["height"]) == tuple(map(str, photograph))
    shown = next(each for each in found.of("img") if "map of what counts" in (each["alt"] or ""))
    assert (shown["width"], shown["height"]) == tuple(map(str, heat))
    assert picture(shown["src"]).shape == (heat[1], heat[0], 3)


def test_a_trace_without_layers_and_an_image_without_maps(
    explanation: sf.Explanation, model: LoadedModel, tmp_path: Path
) -> None:
    bare = replace(explanation, dense={}, spade={}, trace=sf.Trace({}, {"stem": "first layer"}), layer_order=())
    found = page_of(bare, tmp_path / "page.html", model=model)
    assert "0.0 % of the weights in 0 layers" in found.text
    assert "Attribution maps" not in found.text
    stored = store_of(tmp_path / "store", {"a": trace_with({"fc": [[1, 0]]})}, answers={"a": (2, None)})
    assert "class 2" in page_of(stored, tmp_path / "page.html").text


def test_same_explanation_same_bytes(explanation: sf.Explanation, model: LoadedModel, tmp_path: Path) -> None:
    pages = [sf.write_report(explanation, tmp_path / f"{name}.html", model=model).path for name in "ab"]
    assert pages[0].read_bytes() == pages[1].read_bytes()


# Small cases, with what the page says of them written out


def layer(pruned: int, loss: float, damping: float = 0.01) -> LayerTrace:
    """Of four weights, so many of which were pruned."""
    mask = torch.tensor([[place >= pruned for place in range(4)]])
    return LayerTrace(mask.float(), mask, 0.5, loss, damping)


LEMON, TABBY = Prediction(1, "Lemon", 0.75), Prediction(0, "tabby", 0.25)


@pytest.fixture
def small() -> sf.Explanation:
    """Explained is the dense network's answer; the trace has another."""
    layers = {"a": layer(3, 0.001), "c": layer(1, 1.0, 0.0123456), "d": layer(2, 0.1), "e": layer(0, 0.0)}
    return sf.Explanation(
        image=torch.full((3, 8, 8), 0.5),
        target=1,
        target_name="Lemon",
        dense={"saliency": torch.eye(8)},
        spade={"saliency": torch.ones(8, 8)},
        dense_predictions=(LEMON, TABBY),
        spade_predictions=(replace(TABBY, probability=0.625), replace(LEMON, probability=0.375)),
        dense_probability=0.75,
        spade_probability=0.375,
        trace=sf.Trace(layers, {"b": "its input is dead"}, {"noise": {"kind": {"name": "blur"}, "images": 4}}),
        settings={"seed": 5, "nothing": {}},
        layer_order=("a", "b", "c", "d", "e"),
    )


def agreeing(explanation: sf.Explanation, pruned: int) -> sf.Explanation:
    """As the explanation, with a trace that gives the explained class."""
    return replace(
        explanation, spade_predictions=(LEMON,), trace=sf.Trace({"a": layer(pruned, 0.1)}), layer_order=("a",)
    )


def stored(folder: Path, images: dict[str, dict[str, Any]], settings: dict[str, Any] | None = None) -> sf.Store:
    """A store of images by hand: the small explanation's answers, and what else their records say, or `maps`."""
    folder.mkdir()
    writer = StoreWriter(folder, settings or {}, {"torch": "made up"})
    for name, more in images.items():
        listed = ListedImage(name, folder / name, labels=more.get("labels", {}))
        trace = sf.Trace({"a": layer(2, 0.1)}, {"b": "its input is dead"})
        dense = {"index": 1, "name": "Lemon", "probability": 0.75}
        spade = {"index": 0, "name": "tabby", "probability": 0.625}
        record = {
            **writer.known(listed),
            "target": 1,
            "target_name": "Lemon",
            "sparsity": trace.sparsity,
            "probability": {"dense": 0.75, "spade": 0.375},
            "answers": {"dense": [dense], "spade": [spade]},
            "metrics": more.get("metrics", {}),
        }
        writer.put(listed, image_bytes(record, trace, *more.get("maps", ({}, {}))))
    return sf.Store(folder)


def chart_bars(found: Page) -> list[tuple[str | None, ...]]:
    """Of both charts of layers: place, upper end, height and class."""
    return [
        tuple(each.get(key) for key in ("x", "y", "height", "class"))
        for each in found.of("rect")
        if each["width"] == ".8"
    ]


def test_charts_draw_all_layers_sparsities_and_logarithms_of_losses(small: sf.Explanation, tmp_path: Path) -> None:
    found = page_of(small, tmp_path / "page.html")
    dense = ("1.1", "0", "1", "left")
    assert chart_bars(found) == [
        ("0.1", "0.2500", "0.7500", None), dense, ("2.1", "0.7500", "0.2500", None), ("3.1", "0.5000", "0.5000", None),
        ("4.1", "1.0000", "0.0000", None),
        # Of losses 0.001, 1 and 0.1 the least has a bar of 3 %, where its logarithm has none, and 0 has none at all.
        ("0.1", "0.9700", "0.0300", None), dense, ("2.1", "0.0000", "1.0000", None), ("3.1", "0.3333", "0.6667", None),
        ("4.1", "1.0000", "0.0000", None),
    ]  # fmt: skip
    html = found.path.read_text(encoding="utf-8")
    assert re.findall(r"<span>(?:10<sup>(-?\d+)</sup>|(\d.*?))</span>", html) == [
        ("", "100 %"), ("", "0"), ("0", ""), ("-3", "")
    ]  # fmt: skip
    assert "Grey, of full height: layers left dense." in found.words
    assert "37.5 % of the weights in 4 layers; 1 layer left dense." in found.words
    assert [each.text for each in found.tables["Pruned layers"][2]] == [
        "c", "1 \u00d7 4", "50.0 %", "25.0 %", "1", "0.01235", "0", "none"
    ]  # fmt: skip


def test_charts_of_a_store_have_the_pruned_layers_alone(tmp_path: Path) -> None:
    found = page_of(stored(tmp_path / "store", {"a.png": {}}), tmp_path / "page.html")
    assert [bar[0] for bar in chart_bars(found)] == ["0.1", "0.1"]
    assert "Grey, of full height" not in found.words


def test_losses_of_one_power_of_ten_have_a_scale(small: sf.Explanation, tmp_path: Path) -> None:
    trace = sf.Trace({"a": layer(2, 0.1)})
    found = page_of(replace(small, trace=trace, layer_order=("a",)), tmp_path / "page.html")
    assert chart_bars(found)[1] == ("0.1", "0.9700", "0.0300", None)
    assert re.findall(r"10<sup>(-?\d+)</sup>", found.path.read_text(encoding="utf-8")) == ["0", "-1"]


def test_answers_are_of_their_networks(small: sf.Explanation, tmp_path: Path) -> None:
    found = page_of(small, tmp_path / "page.html")
    assert "Dense network answers Lemon 75.0 % SPADE trace answers tabby 62.5 % Pruned 37.5 %" in found.words
    told = "Explained class: Lemon, to which the dense network gives 75.0 % and the trace 37.5 %."
    assert f"{told} The trace itself gives another answer." in found.words
    bars = [(each["class"], each["width"]) for each in found.of("rect") if each.get("class") in ("dense", "spade")]
    assert bars == [("dense", "0.75"), ("dense", "0.25"), ("spade", "0.625"), ("spade", "0.375")]
    for caption, rows in (
        ("Dense network", [["Lemon explained", "75.0 %"], ["tabby", "25.0 %"]]),
        ("SPADE trace", [["tabby", "62.5 %"], ["Lemon explained", "37.5 %"]]),
    ):
        assert texts(found, caption) == rows
    assert "another answer" not in page_of(agreeing(small, 1), tmp_path / "page.html").words


def test_cards_say_what_was_explained_and_who_answers_otherwise(small: sf.Explanation, tmp_path: Path) -> None:
    asked = replace(agreeing(small, 1), dense_predictions=(replace(TABBY, probability=0.9),))
    named = {"first": small, "second": agreeing(small, 3), "third": asked}
    found = page_of(named, tmp_path / "page.html")
    assert "first Lemon Dense 75.0 % SPADE 37.5 % answers tabby Answers" in found.words
    assert "second Lemon Dense 75.0 % SPADE 37.5 % Answers" in found.words
    assert "third Lemon Dense 75.0 % answers tabby SPADE 37.5 % Answers" in found.words
    assert "Traces that give the explained class 2 of 3" in found.words
    # The mean of 3/8, 3/4 and 1/4.
    assert "45.8 % of the weights, on average" in found.words
    assert found.words.count("another answer") == 1


def test_answers_of_a_store_are_of_their_networks(tmp_path: Path) -> None:
    found = page_of(stored(tmp_path / "store", {"a.png": {}, "b.png": {}}), tmp_path / "page.html")
    assert "a.png Lemon Dense 75.0 % SPADE 37.5 % answers tabby" in found.words
    assert found.tables["Dense network"][1][0].text == "Lemon explained"
    assert found.tables["SPADE trace"][1][0].text == "tabby"
    assert "Traces that give the explained class 0 of 2" in found.words


def test_labels_are_told_and_searched(tmp_path: Path) -> None:
    images = {"a.png": {"labels": {"shape": "Round thing", "box": "7"}}, "b.png": {}}
    found = page_of(stored(tmp_path / "store", images), tmp_path / "page.html")
    assert "shape Round thing box 7" in found.words
    searched = [each["data-search"] for each in found.of("details") if each.get("class") == "card"]
    assert searched == ["a.png Lemon Lemon tabby Round thing 7", "b.png Lemon Lemon tabby"]
    assert len(found.of("ul")) == 1


def test_settings_are_told_whole(small: sf.Explanation, neuron: Visualization, tmp_path: Path) -> None:
    drawn = replace(neuron, name="lemon", settings={"transforms": {"jitter": 8}, "traces": [{"of": "its own"}]})
    found = page_of(small, tmp_path / "page.html", visualizations=drawn)
    assert texts(found, "Explanation") == [["seed", "5"], ["nothing", "{}"]]
    assert texts(found, "Trace") == [["noise.kind.name", "blur"], ["noise.images", "4"]]
    assert texts(found, "Visualization of lemon") == [["transforms.jitter", "8"]]
    assert ["torch", torch.__version__] in texts(found, "Versions")
    assert "Insertion" not in found.tables
    settings = {"model": "by hand", "metrics": {"insertion": {"steps": 4}}}
    found = page_of(stored(tmp_path / "store", {"a.png": {}}, settings), tmp_path / "page.html")
    assert texts(found, "Settings") == [["model", "by hand"], ["metrics.insertion.steps", "4"]]
    assert texts(found, "Versions") == [["torch", "made up"]]
    assert "1 image, explained by by hand" in found.words


def test_areas_have_three_decimals_and_the_sign_of_their_change(tmp_path: Path) -> None:
    """Of two methods of one title, whose rows are two."""
    both = {"dense": {"saliency": 0.1234, "Gradient": 0.75}, "spade": {"saliency": 0.5, "Gradient": 0.25}}
    one = {"dense": {"saliency": 0.3234}, "spade": {"saliency": 1.0}}
    images = {name: {"metrics": {"insertion": areas}} for name, areas in (("a.png", both), ("b.png", one))}
    found = page_of(stored(tmp_path / "store", images), tmp_path / "page.html")
    caption = "Mean areas under the curves, by metric and method"
    assert texts(found, caption) == [
        ["Gradient", "insertion", "2", "0.223", "0.750", "+0.527"],
        ["Gradient", "insertion", "1", "0.750", "0.250", "-0.500"],
    ]
    assert [float(cell.value or "") for cell in found.tables[caption][2][3:]] == [0.75, 0.25, -0.5]
    found = page_of(stored(tmp_path / "one", {"a.png": images["a.png"]}), tmp_path / "page.html")
    assert texts(found, "Areas under the curves, by metric and method") == [
        ["Gradient", "insertion", "0.123", "0.500", "+0.377"],
        ["Gradient", "insertion", "0.750", "0.250", "-0.500"],
    ]


def test_captions_of_curves_name_the_areas_of_their_networks(
    explanation: sf.Explanation, model: LoadedModel, tmp_path: Path
) -> None:
    bright = explanation.image.mean(dim=0)
    told = replace(explanation, dense={"saliency": bright}, spade={"saliency": 1 - bright})
    found = page_of(told, tmp_path / "page.html", model=model)
    ((*_, dense, spade, _),) = found.tables["Areas under the curves, by metric and method"][1:]
    assert float(dense.text) > float(spade.text)
    assert f"AUC dense {dense.text}, SPADE {spade.text}" in found.words
    (curve,) = (each for each in found.of("svg") if (each.get("aria-label") or "").startswith("Gradient"))
    assert (curve["aria-label"] or "").endswith(
        f"AUC of the dense network's map {dense.text}, of the trace's {spade.text}"
    )
    assert [cell.text for cell in found.tables["Insertion"][1]] == ["steps", str(metrics.STEPS)]


def test_preprocess_is_that_of_the_model(explanation: sf.Explanation, model: LoadedModel, tmp_path: Path) -> None:
    whole = sf.write_report(explanation, tmp_path / "whole.html", model=model).path
    options = {"model": model.module, "preprocess": model.preprocess}
    assert sf.write_report(explanation, tmp_path / "parts.html", **options).path.read_bytes() == whole.read_bytes()


def test_the_last_image_of_a_visualization_is_shown(small: sf.Explanation, tmp_path: Path) -> None:
    images = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])
    drawn = Visualization(images, (images / 2,), "fc", 0, "lemon", (8, 64), 1.0, (2.0,), {})
    found = page_of(small, tmp_path / "page.html", visualizations=drawn)
    assert "lemon layer fc, after 64 steps" in found.words
    shown = {each["alt"]: picture(each["src"]) for each in found.of("img") if "answers to most" in (each["alt"] or "")}
    assert {alt: (int(pixels.min()), int(pixels.max())) for alt, pixels in shown.items()} == {
        "What lemon answers to most, Dense network": (255, 255),
        "What lemon answers to most, SPADE trace": (128, 128),
    }


def test_thumbnails_without_photographs_are_small_maps_of_the_trace(tmp_path: Path) -> None:
    left = torch.zeros(96, 192)
    left[:, :96] = 1
    maps = ({"saliency": left}, {"saliency": 1 - left})
    found = page_of(stored(tmp_path / "store", {"a.png": {"maps": maps}}), tmp_path / "page.html")
    (thumbnail,) = (each for each in found.of("img") if each.get("class") == "thumbnail")
    pixels = picture(thumbnail["src"])
    assert pixels.shape == (48, 96, 3)
    assert pixels[24, [10, 85]].tolist() == [[0, 0, 3], [251, 252, 191]]  # both ends of magma
    assert "Maps: sum over colour channels of |attribution|. Brightness from 0" in found.words


def test_thumbnails_of_photographs_are_small(small: sf.Explanation, tmp_path: Path) -> None:
    image = torch.full((3, 192, 96), 0.5)
    found = page_of([replace(small, image=image)], tmp_path / "page.html")
    (thumbnail,) = (each for each in found.of("img") if each.get("class") == "thumbnail")
    assert picture(thumbnail["src"]).shape == (96, 48, 3)
    assert (found.of("image")[0]["width"], found.of("image")[0]["height"]) == ("96", "192")


def test_pictures_are_means_of_pixels_scaled_afterwards() -> None:
    stripes = torch.tensor([1.0, 0.0]).repeat(3, 8, 16)  # [3, 8, 32]
    assert np.abs(picture(photograph(stripes, 16).source).astype(int) - 128).max() <= 1
    heat = torch.tensor([[4.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]])  # its means are 1 and 1
    assert picture(heat_map(heat, 2).source).tolist() == [[[251, 252, 191]] * 2]
    thin = photograph(torch.zeros(3, 1, 1000), 10)
    assert (thin.width, thin.height) == (10, 1)


def test_what_no_file_can_hold_is_spelt_out(small: sf.Explanation, tmp_path: Path) -> None:
    name = "lone \ud800, \u2066turned\u2069, \u00e9\n"
    found = page_of({name: small}, tmp_path / "page.html")
    assert "lone \\ud800, \\u2066turned\\u2069, \u00e9" in found.words
    assert [each["data-name"] for each in found.of("details") if each.get("class") == "card"] == [
        "lone \\ud800, \\u2066turned\\u2069, \u00e9\n"
    ]


def test_templates_may_name_nothing_that_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(markup, "_read", {"t.html": "a{{ given }}{{ absent }}", "t.css": "", "t.js": ""}.__getitem__)
    assert markup.rendered("t", {"given": "<", "absent": 1}) == "a&lt;1"
    with pytest.raises(pytest.importorskip("jinja2").UndefinedError, match="'absent' is undefined"):
        markup.rendered("t", {"given": "<"})


# Refusals


def test_what_no_report_can_be_made_of_is_refused(
    explanation: sf.Explanation, model: LoadedModel, store: sf.Store, neuron: Visualization, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    for message, what, path, more in (
        ("is a folder: name a page in it", explanation, tmp_path, {}),
        ("let it end in .html", explanation, tmp_path / "photo.jpg", {}),
        ("5 is no name of a page", explanation, 5, {}),
        ("cannot write", explanation, tmp_path / "absent" / "page.html", {}),
        ("title must be a text", explanation, page, {"title": 3}),
        ("got int: pass what explain returned", 3, page, {}),
        ("no explanation to report on", [], page, {}),
        ("'b' is a str: pass what", {"a": explanation, "b": "c"}, page, {}),
        ("two explanations have the same name", {"1": explanation, 1: explanation}, page, {}),
        ("photographs is for a store", explanation, page, {"photographs": tmp_path}),
        ("preprocess is for model", explanation, page, {"preprocess": torch.nn.Identity()}),
        ("does not say how its inputs are normalised", explanation, page, {"model": model.module}),
        ("model and preprocess are for explanations", store, page, {"model": model}),
        ("pass a mapping by their names", [explanation], page, {"visualizations": neuron}),
        ("visualizations are of 'b'", {"a": explanation}, page, {"visualizations": {"b": neuron}}),
        ("must be what spade_fast.visualize returned, got a int", explanation, page, {"visualizations": 3}),
        ("none of 1 photographs is called as an image", store, page, {"photographs": {"x": tmp_path / "x.png"}}),
        ("is no store", tmp_path, page, {}),
        ("pass that network", replace(explanation, dense_probability=0.0), page, {"model": model}),
    ):
        with pytest.raises(InvalidInputError, match=re.escape(message)):
            sf.write_report(what, path, **more)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_store_of_refused_images_is_refused(tmp_path: Path) -> None:
    stored = store_of(tmp_path / "store", {"a": "it is empty"})
    with pytest.raises(InvalidInputError, match="no image of .*store' can be shown \\(it is empty\\)"):
        sf.write_report(stored, tmp_path / "page.html")


def test_missing_jinja_names_the_cure(
    explanation: sf.Explanation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingDependencyError, match=re.escape("pip install 'spade-fast[interpret]'")):
        sf.write_report(explanation, tmp_path / "page.html")


# In a browser


@contextlib.contextmanager
def opened(chromium: Any, path: Path, *, before: str | None = None, **options: Any) -> Iterator[Any]:
    """The page in Chromium, of which nothing may be refused, thrown, said or fetched; a script may come before it."""
    context = chromium.new_context(**options)
    if before is not None:
        context.add_init_script(before)
    page = context.new_page()
    seen: list[str] = []
    page.on("console", lambda message: seen.append(message.text))
    page.on("pageerror", lambda error: seen.append(str(error)))
    page.on("dialog", lambda dialog: (seen.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: seen.append(request.url))
    page.goto(path.as_uri())
    yield page
    page.wait_for_timeout(50)
    assert [each for each in seen if not each.startswith("data:image/")] == [path.as_uri()]
    context.close()


def shown_names(page: Any) -> list[str]:
    names: list[str] = page.eval_on_selector_all(
        ".card", "cards => cards.filter(card => card.checkVisibility()).map(card => card.dataset.name)"
    )
    return names


@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 360)])
def test_accessible_and_no_wider_than_the_screen(chromium: Any, page: Path, scheme: str, width: int) -> None:
    with opened(chromium, page, color_scheme=scheme, viewport={"width": width, "height": 800}) as shown:
        shown.evaluate("document.querySelectorAll('.card:first-child, .more').forEach(each => { each.open = true; })")
        paper = shown.evaluate("getComputedStyle(document.body).backgroundColor")
        assert paper == {"light": "rgb(251, 251, 250)", "dark": "rgb(19, 20, 22)"}[scheme]
        assert shown.evaluate("document.documentElement.scrollWidth") == width
        assert serious_findings(shown) == []
        images = shown.locator("img:visible")
        assert images.count() >= 2 * len(METHODS)
        for image in images.all():
            image.scroll_into_view_if_needed()
            assert image.evaluate("async each => (await each.decode(), each.naturalWidth)") > 0


@pytest.mark.parametrize("name", ["single", "many"])
def test_slider_changes_the_opacity_of_the_maps(chromium: Any, request: pytest.FixtureRequest, name: str) -> None:
    with opened(
        chromium, request.getfixturevalue(name), has_touch=True, viewport={"width": 360, "height": 800}
    ) as page:
        if name == "many":
            page.locator(".card summary").first.press("Enter")

        def opacity() -> list[str]:
            found = page.locator(".overlay img:visible")
            assert found.count() == 2 * len(METHODS)
            return sorted({each.evaluate("each => getComputedStyle(each).opacity") for each in found.all()})

        slider = page.get_by_role("slider", name="Opacity of the maps").first
        assert opacity() == ["0.6"]
        slider.press("ArrowRight")
        assert opacity() == ["0.65"]
        assert slider.get_attribute("aria-valuetext") == "65 %"
        slider.press("Home")
        assert opacity() == ["0"]
        box = slider.bounding_box()
        assert box["height"] >= 44
        page.touchscreen.tap(box["x"] + box["width"] - 12, box["y"] + box["height"] / 2)
        assert opacity() == ["1"]
        if name == "many":  # those of other images are as they were
            assert (
                page.evaluate("getComputedStyle([...document.querySelectorAll('.overlay img')].at(-1)).opacity")
                == "0.6"
            )


def test_filter_and_sort(chromium: Any, many: Path, store: sf.Store) -> None:
    rows = [row for row in store.rows() if row["name"] in store]
    names = [legible(name) for name in store]
    with opened(chromium, many) as page:
        assert shown_names(page) == names
        page.get_by_label("Filter").fill("ALERT(2)")
        matching = {
            name
            for name, original in zip(names, store, strict=True)
            if "alert(2)" in original
            or any("alert(2)" in store.records[original]["answers"][arm][0]["name"] for arm in ("dense", "spade"))
        }
        assert set(shown_names(page)) == matching
        assert 0 < len(matching) < len(names)
        assert page.get_by_role("status").inner_text() == f"{len(matching)} of {len(names)} images"
        page.get_by_label("Filter").fill("nothing is called so")
        assert shown_names(page) == []
        page.get_by_label("Filter").fill("")
        for key, column in (("dense", "dense_probability"), ("spade", "spade_probability"), ("sparsity", "sparsity")):
            page.get_by_label("Sort by").select_option(key)
            values = {name: row[column] for name, row in zip(names, rows, strict=True)}
            assert [values[name] for name in shown_names(page)] == sorted(
                (values[name] for name in names), reverse=True
            )
        page.get_by_label("Sort by").select_option("name")
        assert sorted(shown_names(page)) == sorted(names)
        assert shown_names(page)[0] == "\" onload='alert(2)' {{ 7 * 7 }} &amp; </style></summary>"
        page.get_by_label("Sort by").select_option("place")
        assert shown_names(page) == names


def test_works_without_javascript(chromium: Any, many: Path) -> None:
    with opened(chromium, many, java_script_enabled=False) as page:
        assert not page.get_by_label("Filter").is_visible()
        assert not page.locator(".opacity").first.is_visible()
        card = page.locator(".card").nth(1)
        assert not card.get_by_role("heading", name="Attribution maps").is_visible()
        card.locator("summary").first.click()
        assert card.get_by_role("heading", name="Attribution maps").is_visible()
        assert card.locator(".overlay img").first.is_visible()


def test_a_page_that_is_too_large_for_browsers_is_warned_of(
    small: sf.Explanation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reports, "_LARGE", 1000)
    with pytest.warns(UserWarning, match=r"the page has 0 MB, which few .* fewer than its 1 images"):
        sf.write_report(small, tmp_path / "page.html")
    assert (tmp_path / "page.html").is_file()


def test_printed_page_has_all_images_and_no_controls(chromium: Any, page: Path) -> None:
    found = Page(page)
    sources = {each["src"] for each in found.of("img")} | {each["href"] for each in found.of("image")}
    with opened(chromium, page) as shown:
        printed = shown.pdf(format="A4", print_background=True)
        assert printed.count(b"/Subtype /Image") == len(sources)
        lowered = "all => all.forEach(each => { each.value = 0; each.dispatchEvent(new Event('input')); })"
        shown.locator(".opacity input").evaluate_all(lowered)
        shown.emulate_media(media="print")
        opacities = "all => all.map(each => getComputedStyle(each).opacity)"
        assert set(shown.locator(".overlay img").evaluate_all(opacities)) == {"0.6"}
        for hidden in (".opacity", ".controls", ".skip"):
            assert shown.locator(hidden).count() == 0 or not shown.locator(hidden).first.is_visible()
        for unfolded in (".overlay img", ".methods"):
            assert all(shown.locator(unfolded).nth(i).is_visible() for i in range(shown.locator(unfolded).count()))


@pytest.fixture
def gallery(small: sf.Explanation, tmp_path: Path) -> Path:
    """Three images, which the places, names and classes order otherwise."""
    named = {
        "image 10": replace(small, target_name="b class"),
        "image 9": replace(small, target_name="c class"),
        "Image 11": replace(small, target_name="a class"),
    }
    return sf.write_report(named, tmp_path / "page.html").path


def test_names_are_sorted_as_people_count_and_all_words_are_found(chromium: Any, gallery: Path) -> None:
    with opened(chromium, gallery) as page:
        page.get_by_label("Sort by").select_option("name")
        assert shown_names(page) == ["image 9", "image 10", "Image 11"]
        page.get_by_label("Sort by").select_option("target")
        assert shown_names(page) == ["Image 11", "image 10", "image 9"]
        for words, expected in (
            ("image 1", ["Image 11", "image 10"]),
            ("class image", ["Image 11", "image 10", "image 9"]),
            ("IMAGE  9", ["image 9"]),
            (" lemon", ["Image 11", "image 10", "image 9"]),
            ("image 8", []),
        ):
            page.get_by_label("Filter").fill(words)
            assert shown_names(page) == expected


def test_what_a_browser_kept_of_an_earlier_visit_is_shown(chromium: Any, gallery: Path) -> None:
    keep = """new MutationObserver(() => {
      for (const [key, value] of [["filter", "1"], ["sort", "name"], ["image-1-opacity", "20"]]) {
        const found = document.getElementById(key);
        if (found && !found.dataset.kept) { found.value = value; found.dataset.kept = true; }
      }
    }).observe(document, { childList: true, subtree: true });"""
    with opened(chromium, gallery, before=keep) as page:
        assert shown_names(page) == ["image 10", "Image 11"]
        assert page.locator(".card").evaluate_all("cards => cards.map(card => card.dataset.name)")[0] == "image 9"
        assert page.get_by_role("status").inner_text() == "2 of 3 images"
        slider = page.locator("#image-1-opacity")
        assert slider.get_attribute("aria-valuetext") == "20 %"
        assert page.evaluate("getComputedStyle(document.querySelector('#image-1 .overlay img')).opacity") == "0.2"


# What people see of it


@pytest.fixture
def halves(small: sf.Explanation, tmp_path: Path) -> Path:
    """A page of two images: red to the left and blue to the right, with all attribution to the right."""
    image = torch.tensor([[[0.8, 0.2]], [[0.2, 0.2]], [[0.2, 0.8]]]).repeat_interleave(32, dim=2)  # [3, 1, 64]
    heat = torch.zeros(64, 64)
    heat[:, 32:] = 1
    whole = replace(small, image=image.expand(3, 64, 64), dense={"saliency": heat}, spade={"saliency": heat})
    return sf.write_report([whole, whole], tmp_path / "page.html").path


def middles(shot: bytes) -> np.ndarray[Any, Any]:
    """The colours in the middle of both halves [2, 3]."""
    pixels = np.asarray(Image.open(io.BytesIO(shot)).convert("RGB")).astype(float)
    height, width, _ = pixels.shape
    return pixels[height // 2, [width // 4, 3 * width // 4]]


def halves_colours(path: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Of photograph and map, in the middle of both halves."""
    seen = picture(Page(path).of("image")[0]["href"])[32, [16, 48]].astype(float)
    assert np.abs(seen - [[204, 51, 51], [51, 51, 204]]).max() < 4
    return seen, np.array([[0, 0, 3], [251, 252, 191]])


def test_the_slider_goes_from_the_photograph_to_the_map(chromium: Any, halves: Path) -> None:
    seen, heat = halves_colours(halves)
    with opened(chromium, halves, viewport={"width": 800, "height": 700}) as page:
        page.locator(".card > summary").first.click()
        slider, overlays = page.get_by_role("slider").first, page.locator(".card:first-child .overlay")
        assert overlays.count() == 2
        for overlay in overlays.all():
            overlay.locator("img").evaluate("each => { each.loading = 'eager'; return each.decode(); }")
            for share in (0, 50, 100):
                slider.fill(str(share))
                expected = seen + share / 100 * (heat - seen)
                assert np.abs(middles(overlay.screenshot()) - expected).max() <= 3


def test_dark_and_light_pages_have_the_paper_of_the_style(chromium: Any, halves: Path) -> None:
    papers = re.findall(r"--paper: #(\w+)", Page(halves).inline["style"])
    light, dark, printed = (tuple(bytes.fromhex(each if len(each) == 6 else each * 2)) for each in papers)
    assert min(light) - max(dark) > 200
    for scheme, media, expected in (("light", "screen", light), ("dark", "screen", dark), ("dark", "print", printed)):
        with opened(chromium, halves, color_scheme=scheme, viewport={"width": 600, "height": 400}) as page:
            page.emulate_media(media=media)
            shot = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("RGB"))
            assert {tuple(shot[y, x]) for y, x in ((3, 3), (3, 596), (396, 3))} == {expected}


def test_cards_are_open_in_print(chromium: Any, halves: Path) -> None:
    seen, heat = halves_colours(halves)
    with opened(chromium, halves, color_scheme="dark", viewport={"width": 800, "height": 700}) as page:
        assert page.locator("details[open]").count() == 0
        assert not page.locator(".overlay").first.is_visible()
        page.emulate_media(media="print")
        overlays = page.locator(".overlay")
        assert overlays.count() == 4
        for overlay in overlays.all():
            overlay.locator("img").evaluate("each => { each.loading = 'eager'; return each.decode(); }")
            assert np.abs(middles(overlay.screenshot()) - (seen + 0.6 * (heat - seen))).max() <= 3
