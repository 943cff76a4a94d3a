"""Comparing the traces of a store: which images make up sets, what is told of them, the figure and the files."""

from __future__ import annotations

import csv
import io
import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from subjects import photographs, quarters, store_of, trace_with

import spade_fast as sf
from spade_fast import InvalidInputError, charts, trace_comparison
from spade_fast.overlap import distinctive, masks_of, of_sizes, overlaps, read_masks, separation

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


def planted_store(folder: Path, count: int = 12) -> sf.Store:
    """Random traces; every third image ("odd") keeps eight connections that no other keeps."""
    generator = np.random.default_rng(0)
    traces, labels, answers = {}, {}, {}
    for i in range(count):
        conv, linear = generator.random((4, 2, 3, 3)) < 0.5, generator.random((5, 16)) < 0.5
        conv[2, 0, 0], linear[3, :5] = i % 3 == 0, i % 3 == 0
        name = f"{i:02}.png"
        traces[name] = trace_with({"conv": conv, "head.fc": linear}, dense=["stem"])
        kind = "odd" if i % 3 == 0 else "even" if i % 3 == 1 else "plain"
        labels[name] = {"kind": kind, "photograph": f"p{i // 2}", "one": "same", "own": name}
        answers[name] = [(134, "crane"), (517, "crane"), (3, "shark")][i % 3]
    return store_of(folder / "store", traces, labels, answers)


@pytest.fixture
def store(tmp_path: Path) -> sf.Store:
    return planted_store(tmp_path)


def test_a_set_against_the_rest(store: sf.Store) -> None:
    found = sf.compare(store, by="kind", value="odd")
    masks = read_masks(store)
    expected = overlaps(masks)
    inside = [i % 3 == 0 for i in range(12)]
    np.testing.assert_array_equal(found.overlaps.pooled, expected.pooled)
    assert found.inside == tuple(inside)
    assert found.values[:4] == ("odd", "even", "plain", "odd")
    assert list(found.separations) == ["odd"]
    assert found.separations["odd"].auc == separation(expected.pooled, inside).auc > 0.9
    assert list(found.layers) == ["conv", "head.fc"]
    assert found.layers["conv"].auc == separation(expected.layers["conv"], inside).auc
    assert found.distinctive is not None
    assert found.distinctive.count == 8
    names = [name for name, of_set in zip(masks.images, inside, strict=True) if of_set]
    assert found.distinctive.connections() == distinctive(masks, names).connections()
    none = sf.compare(store, by="kind", value="odd", least=1.0, most=0.9).distinctive
    assert none is not None
    assert none.count > 8


def test_rows_of_layers(store: sf.Store) -> None:
    found = sf.compare(store, by="kind", value="odd")
    whole, conv, linear = found.layer_rows()
    assert [row["layer"] for row in (whole, conv, linear)] == ["all layers", "conv", "head.fc"]
    assert [row["weights"] for row in (whole, conv, linear)] == [152, 72, 80]
    kept = {name: found.overlaps.kept[name].mean() for name in ("conv", "head.fc")}
    assert conv["kept"] == pytest.approx(kept["conv"])
    assert whole["kept"] == pytest.approx((72 * kept["conv"] + 80 * kept["head.fc"]) / 152)
    for row, matrix in ((whole, found.overlaps.pooled), (conv, found.overlaps.layers["conv"])):
        pairs = {"inside": [], "rest": [], "between": []}
        for i, j in combinations(range(12), 2):
            of_set = (i % 3 == 0) + (j % 3 == 0)
            pairs[("rest", "between", "inside")[of_set]].append(matrix[i, j])
        assert row["overlap"] == pytest.approx({kind: np.mean(values) for kind, values in pairs.items()})
    assert whole["auc"] == found.separations["odd"].auc
    assert conv["auc"] == found.layers["conv"].auc
    assert {"interval", "random", "by_chance"} < conv.keys()
    assert whole["auc_by_size"] == separation(of_sizes(found.overlaps.kept_pooled), found.inside).auc
    assert conv["auc_by_size"] == separation(of_sizes(found.overlaps.kept["conv"]), found.inside).auc


def test_rows_have_the_areas_of_their_layers(store: sf.Store) -> None:
    found = sf.compare(store, by="kind", value="even")
    rows = found.layer_rows()
    assert [row["auc"] for row in rows] == [
        separation(matrix, found.inside).auc for matrix in (found.overlaps.pooled, *found.overlaps.layers.values())
    ]
    assert len({row["auc"] for row in rows}) == 3


def test_each_value_against_all_others(store: sf.Store) -> None:
    found = sf.compare(store, by="kind")
    assert list(found.separations) == ["odd", "even", "plain"]
    for name, each in found.separations.items():
        assert each.auc == separation(found.overlaps.pooled, [value == name for value in found.values]).auc
    assert found.distinctive is None
    assert dict(found.layers) == {}
    values = np.array(found.values)
    same = np.triu(values[:, None] == values, 1)
    whole, *_ = found.layer_rows()
    assert whole["overlap"]["same"] == pytest.approx(found.overlaps.pooled[same].mean())
    assert set(whole["overlap"]) == {"same", "different"}
    assert "auc" not in whole
    alone = sf.compare(store)
    assert alone.values == ()
    assert dict(alone.separations) == {}
    once = np.triu(np.ones((12, 12), dtype=bool), 1)
    assert alone.layer_rows()[0]["overlap"] == {"all": pytest.approx(alone.overlaps.pooled[once].mean())}


def test_classes_make_sets_by_name_or_index(store: sf.Store) -> None:
    first = tuple(i % 3 == 0 for i in range(12))
    both = tuple(i % 3 < 2 for i in range(12))
    for by in ("answer", "target"):
        assert sf.compare(store, by=by, value="134").inside == first
        assert sf.compare(store, by=by, value=134).inside == first
        assert sf.compare(store, by=by, value="134 crane").inside == first
        assert sf.compare(store, by=by, value="crane").inside == both
        assert sf.compare(store, by=by, value=["134", "517 crane"]).inside == both
        assert sf.compare(store, by=by).values[:3] == ("134 crane", "517 crane", "3 shark")
    found = sf.compare(store, by="answer", value=["shark", 134])
    assert list(found.separations) == ["shark or 134"]
    assert found.settings["value"] == ["shark", "134"]


def test_classes_without_names_and_missing_labels(tmp_path: Path) -> None:
    traces = {f"{i}": trace_with({"fc": [[i % 2, 1, 0]]}) for i in range(4)}
    labels = {"0": {"answer": "yes"}, "1": {"answer": "yes"}}
    made = store_of(tmp_path / "store", traces, labels, dict.fromkeys(traces, (7, None)))
    assert sf.compare(made, by="answer").values == ("yes", "yes", "", "")  # a label comes first
    with pytest.raises(InvalidInputError, match="'target' tells no set of two images or more .* 1 values for 4 images"):
        sf.compare(made, by="target")
    with pytest.raises(InvalidInputError, match="no image has target '8'; nearest: '7'"):
        sf.compare(made, by="target", value="8")


def test_images_of_one_photograph_are_left_apart(store: sf.Store) -> None:
    found = sf.compare(store, by="kind", value="odd", apart="photograph")
    inside, apart = list(found.inside), [f"p{i // 2}" for i in range(12)]
    assert found.separations["odd"].auc == separation(found.overlaps.pooled, inside, apart=apart).auc
    sizes = of_sizes(found.overlaps.kept_pooled)
    assert found.sizes["all layers"].auc == separation(sizes, inside, apart=apart).auc != separation(sizes, inside).auc
    scores = separation(found.overlaps.layers["conv"], inside, apart=apart).scores
    np.testing.assert_array_equal(found.layers["conv"].scores, scores)
    pairs = [(i, j) for i, j in combinations(range(12), 2) if i // 2 != j // 2 and (i % 3 == 0) != (j % 3 == 0)]
    between = np.mean([found.overlaps.pooled[pair] for pair in pairs])
    assert found.layer_rows()[0]["overlap"]["between"] == pytest.approx(between)


def test_an_image_without_the_label_of_its_photograph_is_one_of_its_own(tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    traces = {f"{i}": trace_with({"fc": generator.random((4, 8)) < 0.5}) for i in range(8)}
    labels = {f"{i}": {"kind": "x" if i % 2 else "y", **({"photograph": "p"} if i < 2 else {})} for i in range(8)}
    found = sf.compare(store_of(tmp_path / "store", traces, labels), by="kind", value="x", apart="photograph")
    assert {kind: int(pairs.sum()) for kind, pairs in found.pairs.items()} == {"inside": 6, "rest": 6, "between": 15}


def test_a_label_of_that_name_is_no_class(tmp_path: Path) -> None:
    traces = {f"{i}": trace_with({"fc": [[1, 0], [0, i % 2]]}) for i in range(6)}
    labels = {f"{i}": {"answer": "3 cats" if i < 2 else "3" if i < 4 else "4"} for i in range(6)}
    found = sf.compare(store_of(tmp_path / "store", traces, labels), by="answer", value="3")
    assert found.inside == (False, False, True, True, False, False)


def test_nothing_of_an_earlier_comparison_is_left(store: sf.Store, tmp_path: Path) -> None:
    first = sf.compare(store, by="kind", value="odd").save(tmp_path / "out")
    second = sf.compare(store).save(tmp_path / "out")
    assert first.keys() - second.keys() == {"connections.csv", "channels.csv"}
    assert {each.name for each in (tmp_path / "out").iterdir()} == second.keys()


def test_odd_names_are_drawn_as_they_are(tmp_path: Path) -> None:
    odd = "x_{$ costs $5 to $10"
    traces = {f"{odd} {i}": trace_with({odd: [[1, 0, 1], [0, i % 2, 1]]}) for i in range(6)}
    labels = {name: {odd: odd if i % 2 else "plain"} for i, name in enumerate(traces)}
    Text = pytest.importorskip("matplotlib.text").Text
    made = store_of(tmp_path / "store", traces, labels)
    for more in ({}, {"by": odd}, {"by": odd, "value": odd}):
        figure = sf.compare(made, **more).figure()
        figure.savefig(io.BytesIO())  # as text: such mathematics would be refused
        texts = [text for text in figure.findobj(Text) if "$" in text.get_text()]
        assert texts
        assert not any(text.get_parse_math() for text in texts)


def test_some_images_and_layers(store: sf.Store) -> None:
    names = [f"{i:02}.png" for i in (7, 3, 0, 4)]
    found = sf.compare(store, by="kind", value="odd", names=names, layers=["head"])
    assert found.overlaps.images == tuple(names)
    assert found.inside == (False, True, True, False)
    assert list(found.overlaps.layers) == ["head.fc"]
    drawn = [sf.compare(store, limit=5, seed=seed).overlaps.images for seed in (0, 1, 0)]
    assert all(list(images) == sorted(images) for images in drawn)
    assert drawn[0] == drawn[2] != drawn[1]
    assert len(drawn[0]) == 5
    assert set(drawn[0]) <= set(store)
    assert sf.compare(store, limit=50).overlaps.images == tuple(store)
    assert sf.compare(store, count=4).clusters.count == 4


def test_what_cannot_be_compared(store: sf.Store, tmp_path: Path) -> None:
    for arguments, message in (
        ({"by": "knid"}, "no image has a label 'knid'; nearest: 'kind'"),
        ({"by": "kind", "value": "od"}, "no image has kind 'od'; nearest: 'odd'"),
        ({"value": "odd"}, "value='odd' is one of what\\? pass by"),
        ({"by": "own", "value": "00.png"}, "the set has 1 images, and the rest 11"),
        ({"by": "one", "value": "same"}, "the set has 12 images, and the rest 0"),
        ({"by": "one"}, "'one' tells no set of two images or more from two others: it has 1 values"),
        ({"by": "own"}, "'own' tells no set .* it has 12 values for 12 images"),
        ({"apart": "photo"}, "no image has a label 'photo'; nearest: 'photograph'"),
        ({"limit": 1}, "limit must be a whole number of at least 2, got 1"),
        ({"layers": ["stem"]}, "no trace has a pruned layer or block 'stem'"),
        ({"names": ["00.png"]}, "there is 1 trace: pass two or more"),
        ({"names": ["00.png", "40.png"]}, "the store has no image '40.png'; nearest"),
        ({"count": 13}, "13 clusters of 12 images"),
        ({"by": "kind", "value": "odd", "least": 0.1}, "most=0.1 is not below least=0.1"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            sf.compare(store, **arguments)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="is no store: it has no manifest.json"):
        sf.compare(tmp_path)


def test_sets_are_refused_before_anything_is_read(store: sf.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object, **__: object) -> None:
        raise AssertionError("masks are read")

    monkeypatch.setattr(trace_comparison, "read_masks", read)
    for arguments, message in (
        ({"by": "own", "value": "00.png"}, "the set has 1 images, and the rest 11"),
        ({"by": "own"}, "tells no set"),
        ({"by": "kind", "value": "odd", "most": 0.9}, "most=0.9 is not below"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            sf.compare(store, **arguments)  # type: ignore[arg-type]


def test_what_is_written(store: sf.Store, tmp_path: Path) -> None:
    found = sf.compare(store, by="kind", value="odd")
    written = found.save(tmp_path / "out")
    files = {"overlap.png", "overlap.safetensors", "images.csv", "layers.csv", "connections.csv", "channels.csv",
             "overlap.json"}  # fmt: skip
    assert set(written) == {path.name for path in (tmp_path / "out").iterdir()} == files
    matrices = load_file(written["overlap.safetensors"])
    assert set(matrices) == {"pooled", "layer:conv", "layer:head.fc"}
    np.testing.assert_array_equal(matrices["pooled"], found.overlaps.pooled)
    np.testing.assert_array_equal(matrices["layer:conv"], found.overlaps.layers["conv"])

    def rows(name: str) -> list[dict[str, str]]:
        with written[name].open(newline="") as file:
            return list(csv.DictReader(file))

    images = rows("images.csv")
    assert [row["image"] for row in images] == list(store)
    assert [row["inside"] for row in images[:3]] == ["1", "0", "0"]
    assert [int(row["cluster"]) for row in images] == list(found.clusters.of)
    assert [float(row["score"]) for row in images] == found.separations["odd"].scores.tolist()
    assert [row["layer"] for row in rows("layers.csv")] == ["all layers", "conv", "head.fc"]
    assert float(rows("layers.csv")[1]["overlap_between"]) == found.layer_rows()[1]["overlap"]["between"]
    assert float(rows("layers.csv")[1]["interval_high"]) == found.layers["conv"].interval[1]
    assert {(row["layer"], row["output"], row["input"], row["tap"]) for row in rows("connections.csv")} == {
        *(("conv", "2", "0", f"0 {i}") for i in range(3)),
        *(("head.fc", "3", str(i), "") for i in range(5)),
    }
    channels = rows("channels.csv")
    assert list(channels[0].values()) == ["head.fc", "output", "3", "5", "16"]
    assert sorted(row["connections"] for row in channels) == ["1"] * 5 + ["3"] * 2 + ["5"]
    report = json.loads(written["overlap.json"].read_text())
    assert report == json.loads(json.dumps(found.report()))
    assert report["distinctive"]["count"] == 8
    assert report["distinctive"]["layers"] == {"conv": 3, "head.fc": 5}
    assert report["separations"]["odd"]["auc"] == found.separations["odd"].auc
    assert {image for row in report["clusters"] for image in row["images"]} == set(store)
    assert report["settings"]["by"] == "kind"
    plain = sf.compare(store, by="own", value=["00.png", "01.png"]).save(tmp_path / "other")
    assert plain.keys() == written.keys()
    without = sf.compare(store).save(tmp_path / "without")
    assert set(without) == files - {"connections.csv", "channels.csv"}
    with without["images.csv"].open(newline="") as file:
        assert next(csv.reader(file)) == ["image", "cluster"]


def test_the_figure_shows_the_matrix_by_clusters(store: sf.Store) -> None:
    found = sf.compare(store, by="kind", value="odd")
    heat, scores, layers, areas, *_ = found.figure().axes
    order = list(found.clusters.order)
    shown = heat.images[0].get_array()
    assert np.array_equal(shown.mask, np.eye(12, dtype=bool))
    apart = ~np.eye(12, dtype=bool)
    np.testing.assert_array_equal(shown.data[apart], found.overlaps.pooled[np.ix_(order, order)][apart])
    assert len(heat.patches) == found.clusters.count
    (strip,) = heat.child_axes
    assert [label.get_text() for label in strip.get_yticklabels()] == [found.overlaps.images[i] for i in order]
    colours = [patch.get_facecolor() for patch in strip.patches]
    assert len({colours[place] for place, i in enumerate(order) if found.inside[i]}) == 1
    assert len({colours[place] for place, i in enumerate(order) if not found.inside[i]}) == 1
    assert len(set(colours)) == 2
    legend = heat.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["odd", "the rest"]
    dots = np.concatenate([each.get_offsets()[:, 1] for each in scores.collections])
    assert sorted(dots) == sorted(found.separations["odd"].scores)
    assert f"{found.separations['odd'].auc:.3f}" in scores.get_title()
    inside, *_ = layers.lines
    assert list(inside.get_ydata()) == [row["overlap"]["inside"] for row in found.layer_rows()[1:]]
    assert list(areas.lines[0].get_ydata()) == [each.auc for each in found.layers.values()]
    assert list(areas.lines[1].get_ydata()) == [row["auc_by_size"] for row in found.layer_rows()[1:]]
    assert [label.get_text() for label in areas.get_xticklabels()] == ["conv", "head.fc"]


def test_figures_of_other_comparisons(store: sf.Store, tmp_path: Path) -> None:
    heat, areas, layers, *_ = sf.compare(store, by="kind").figure().axes
    assert len({patch.get_facecolor() for patch in heat.child_axes[0].patches}) == 3
    assert [label.get_text() for label in areas.get_yticklabels()] == ["odd", "even", "plain"]
    assert len(layers.lines) == 2
    heat, layers, *_ = sf.compare(store, count=1).figure().axes
    assert "no clusters" in heat.get_title()
    assert heat.get_legend() is None
    assert len(layers.lines) == 1
    # More values than colours, more images and layers than names, and nothing to be seen.
    mask = {f"layer{i}": [[1, 0, 1]] for i in range(90)}
    names = [f"{i:03} of a long name that nobody can read" for i in range(50)]
    labels = {name: {"pair": f"pair {i // 2}"} for i, name in enumerate(names)}
    made = store_of(tmp_path / "many", {name: trace_with(mask) for name in names}, labels)
    heat, areas, layers, *_ = sf.compare(made, by="pair", count=2).figure().axes
    strip = heat.child_axes[0]
    assert len({patch.get_facecolor() for patch in strip.patches}) == len(charts.COLOURS) + 1
    assert [text.get_text() for text in heat.get_legend().get_texts()][-1] == "the rest"
    assert len(strip.get_yticks()) == 0
    assert len(layers.get_xticks()) <= 80


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of photographs by which quarter of them is bright, by way of a manifest."""
    folder = tmp_path_factory.mktemp("traced")
    names = list(photographs(folder, 12))
    rows = [f"{name},{'upper' if i % 4 < 2 else 'lower'}" for i, name in enumerate(names)]
    (folder / "list.csv").write_text("\n".join(["image,half", *rows]))
    sf.run(quarters(), folder / "list.csv", folder / "store", 0.6, methods=(), num_augmentations=4, in_flight=1)
    return folder / "store"


@pytest.mark.filterwarnings("ignore:.*have no weight left")
def test_traces_of_photographs(traced: Path) -> None:
    found = sf.compare(traced, by="half", value="upper", count=3)
    made = sf.Store(traced)
    traces = {name: made[name].trace for name in made}
    assert found.overlaps.images == tuple(f"{i:02}.png" for i in range(12))
    for (i, one), (j, other) in combinations(enumerate(traces.values()), 2):
        for layer, value in one.overlap(other).items():
            assert found.overlaps.layers[layer][i, j] == value
    assert found.inside == tuple(i % 4 < 2 for i in range(12))
    expected = overlaps(masks_of(traces))
    assert found.separations["upper"].auc == separation(expected.pooled, found.inside).auc
    by_answer = sf.compare(traced, by="answer")
    records = [made.records[name]["answers"]["dense"][0] for name in made]
    assert by_answer.values == tuple(f"{each['index']} {each['name']}" for each in records)
    report: dict[str, Any] = by_answer.report()
    assert sum(sum(row["values"].values()) for row in report["clusters"]) == 12
