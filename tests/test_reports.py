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
from spade_fast import figures, metrics
from spade_fast.errors import InvalidInputError, MissingDependencyError
from spade_fast.models import LoadedModel
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
    tables = Page(single).tables
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
    assert ["seed", "0"] in [[cell.text for cell in row] for row in tables["Explanation"]]
    assert ["torch", torch.__version__] in [[cell.text for cell in row] for row in tables["Versions"]]


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
def opened(chromium: Any, path: Path, **options: Any) -> Iterator[Any]:
    """The page in Chromium, of which nothing may be refused, thrown, said or fetched."""
    context = chromium.new_context(**options)
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


def test_printed_page_has_all_images_and_no_controls(chromium: Any, page: Path) -> None:
    found = Page(page)
    sources = {each["src"] for each in found.of("img")} | {each["href"] for each in found.of("image")}
    with opened(chromium, page) as shown:
        printed = shown.pdf(format="A4", print_background=True)
        assert printed.count(b"/Subtype /Image") == len(sources)
        shown.emulate_media(media="print")
        for hidden in (".opacity", ".controls", ".skip"):
            assert shown.locator(hidden).count() == 0 or not shown.locator(hidden).first.is_visible()
        for unfolded in (".overlay img", ".methods"):
            assert all(shown.locator(unfolded).nth(i).is_visible() for i in range(shown.locator(unfolded).count()))
