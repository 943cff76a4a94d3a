"""Which weights traces have in common, which images are alike by them, and what a set of images shares."""

from __future__ import annotations

import math
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from subjects import store_of, trace_with

from spade_fast import InvalidInputError, metrics, overlap, store
from spade_fast.overlap import clusters, distinctive, masks_of, overlaps, read_masks, separation
from spade_fast.traces import Trace

pytest.importorskip("sklearn")

BY_HAND = {
    "x": trace_with({"a": [[1, 1], [0, 0]], "b": [[1, 0, 0]]}),
    "y": trace_with({"a": [[1, 0], [1, 0]], "b": [[0, 1, 1]]}),
    "z": trace_with({"a": [[1, 1], [1, 1]], "b": [[1, 1, 0]]}),
}


def random_masks(count: int, shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, dict[str, Any]]:
    """Of each image, each layer's mask, some denser than others."""
    generator = np.random.default_rng(seed)
    return {
        f"{i:02}": {name: generator.random(shape) < generator.uniform(0.1, 0.9) for name, shape in shapes.items()}
        for i in range(count)
    }


def test_overlaps_by_hand() -> None:
    found = overlaps(masks_of(BY_HAND))
    assert found.images == ("x", "y", "z")
    assert list(found.layers) == ["a", "b"]
    np.testing.assert_array_equal(found.layers["a"], [[1, 1 / 3, 2 / 4], [1 / 3, 1, 2 / 4], [2 / 4, 2 / 4, 1]])
    np.testing.assert_array_equal(found.layers["b"], [[1, 0, 1 / 2], [0, 1, 1 / 3], [1 / 2, 1 / 3, 1]])
    np.testing.assert_array_equal(found.pooled, [[1, 1 / 6, 3 / 6], [1 / 6, 1, 3 / 7], [3 / 6, 3 / 7, 1]])
    assert found.pooled.dtype == np.float64
    assert dict(found.weights) == {"a": 4, "b": 3}
    np.testing.assert_array_equal(found.kept["a"], [2 / 4, 2 / 4, 1])
    np.testing.assert_array_equal(found.kept["b"], [1 / 3, 2 / 3, 2 / 3])
    assert dict(found.dense) == {"a": (), "b": ()}


def test_what_sizes_alone_tell() -> None:
    found = overlaps(masks_of(BY_HAND))
    np.testing.assert_allclose(found.kept_pooled, [3 / 7, 4 / 7, 6 / 7])
    expected = [[1, 3 / 4, 3 / 6], [3 / 4, 1, 4 / 6], [3 / 6, 4 / 6, 1]]
    np.testing.assert_allclose(overlap.of_sizes(found.kept_pooled), expected)
    np.testing.assert_array_equal(overlap.of_sizes(np.array([0.0, 0.0, 0.5])), [[1, 1, 0], [1, 1, 0], [0, 0, 1]])
    assert (found.pooled <= overlap.of_sizes(found.kept_pooled)).all()


def test_masks_without_any_weight_are_equal() -> None:
    found = overlaps(masks_of({"x": trace_with({"a": [[0, 0]]}), "y": trace_with({"a": [[0, 0]]})}))
    np.testing.assert_array_equal(found.layers["a"], np.ones((2, 2)))
    np.testing.assert_array_equal(found.pooled, np.ones((2, 2)))


def test_what_traces_say_of_each_other() -> None:
    shapes = {"first": (5, 3, 3, 3), "second": (7, 1, 5, 5), "third": (11, 13)}
    traces = {name: trace_with(masks) for name, masks in random_masks(7, shapes).items()}
    found = overlaps(masks_of(traces))
    for (i, one), (j, other) in combinations(enumerate(traces.values()), 2):
        for layer, value in one.overlap(other).items():
            assert found.layers[layer][i, j] == found.layers[layer][j, i] == value


@pytest.mark.parametrize("at_a_time", [1, 1500, 1 << 21])
def test_against_products_of_matrices(at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # 16 words of 64 bits are the least that is counted at a time: 4,097 weights are four times that, and a bit.
    monkeypatch.setattr(overlap, "_AT_A_TIME", at_a_time)
    masks = random_masks(9, {"a": (4097, 1), "b": (64, 32), "c": (3, 5), "d": (1, 1)})
    found = overlaps(masks_of({name: trace_with(each) for name, each in masks.items()}))
    both, either = np.zeros((9, 9)), np.zeros((9, 9))
    for layer in ("a", "b", "c", "d"):
        flat = np.stack([each[layer].reshape(-1) for each in masks.values()]).astype(np.float64)
        shared = flat @ flat.T
        union = flat.sum(axis=1)[:, None] + flat.sum(axis=1) - shared
        expected = np.divide(shared, union, out=np.ones_like(union), where=union > 0)
        np.testing.assert_allclose(found.layers[layer], expected, rtol=1e-14)
        both, either = both + shared, either + union
    np.testing.assert_allclose(found.pooled, both / either, rtol=1e-14)


def test_a_layer_left_dense_keeps_all_of_its_weights() -> None:
    traces = {
        "first": trace_with({"a": [[1, 0, 1]]}, dense=["b"]),
        "pruned": trace_with({"a": [[1, 0, 1]], "b": [[1, 1, 0, 0, 0, 0, 0, 0, 0, 1]]}),
        "last": trace_with({"a": [[1, 0, 1]]}, dense=["b", "never pruned"]),
    }
    found = overlaps(masks_of(traces))
    np.testing.assert_array_equal(found.layers["b"], [[1, 0.3, 1], [0.3, 1, 0.3], [1, 0.3, 1]])
    assert found.pooled[0, 1] == 5 / 12
    np.testing.assert_array_equal(found.kept["b"], [1, 0.3, 1])
    assert dict(found.dense) == {"a": (), "b": ("first", "last")}


def test_layers_are_in_the_order_of_the_network() -> None:
    mask = [[1, 0]]
    traces = {
        "x": trace_with({"two": mask, "five": mask}, dense=["one", "three", "four"]),
        "y": trace_with({"one": mask, "two": mask, "three": mask, "five": mask}, dense=["four"]),
        "z": trace_with({"three": mask, "four": mask}, dense=["one", "two", "five"]),
    }
    assert list(masks_of(traces).shapes) == ["one", "two", "three", "four", "five"]


def test_some_layers_only() -> None:
    mask = [[1, 0]]
    traces = {name: trace_with({"block.1": mask, "block.10": mask, "head": mask}) for name in "xy"}
    assert list(masks_of(traces, layers=["head", "block.1"]).shapes) == ["block.1", "head"]
    assert list(masks_of(traces, layers=["block"]).shapes) == ["block.1", "block.10"]
    with pytest.raises(InvalidInputError, match="no trace has a pruned layer or block 'blok.1'; nearest: 'block.1'"):
        masks_of(traces, layers=["head", "blok.1"])


def test_masks_of_a_store_are_those_of_its_traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    masks = random_masks(4, {"a": (5, 3, 3, 3), "b": (7, 5)})
    traces: dict[str, Trace | str] = {name: trace_with(each) for name, each in masks.items()}
    traces["03"] = trace_with({"a": masks["03"]["a"]}, dense=["b"])
    made = store_of(tmp_path / "store", {**traces, "04": "it is no image"})
    opened = []

    def counted(path: Path, *given: str) -> Any:
        opened.append(Path(path).name)
        return reading(path, *given)

    reading = store.read_tensors
    monkeypatch.setattr(store, "read_tensors", counted)
    found = read_masks(made)
    assert sorted(opened) == sorted(made.file_of(name).name for name in traces)
    expected = masks_of({name: trace for name, trace in traces.items() if isinstance(trace, Trace)})
    assert found.images == expected.images == ("00", "01", "02", "03")
    assert dict(found.dense) == {"a": (), "b": (3,)}
    for layer, bits in expected.bits.items():
        np.testing.assert_array_equal(found.bits[layer], bits)
        np.testing.assert_array_equal(np.unpackbits(bits[2], count=bits[2].size * 8)[: found.weights(layer)],
                                      masks["02"][layer].reshape(-1))  # fmt: skip
    some = read_masks(tmp_path / "store", ["03", "01"], layers=["b"])
    assert some.images == ("03", "01")
    np.testing.assert_array_equal(some.bits["b"], expected.bits["b"][[3, 1]])


def test_stores_that_cannot_be_compared(tmp_path: Path) -> None:
    masks = random_masks(3, {"a": (5, 3)})
    made = store_of(tmp_path / "store", {**{n: trace_with(each) for n, each in masks.items()}, "bad": "it is no image"})
    with pytest.raises(InvalidInputError, match="the store has no image '0'; nearest: '0.'"):
        read_masks(made, ["00", "0"])
    with pytest.raises(InvalidInputError, match="'bad' has no trace: it is no image"):
        read_masks(made, ["00", "bad"])
    with pytest.raises(InvalidInputError, match="'01' is named twice"):
        read_masks(made, ["01", "00", "01"])
    with pytest.raises(InvalidInputError, match="there is 1 trace: pass two or more"):
        read_masks(made, ["01"])
    with pytest.raises(InvalidInputError, match="there is no trace: pass two or more"):
        read_masks(made, [])
    file = made.file_of("01")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(InvalidInputError, match=f"cannot read '.*{file.name}' as an image of a store.*checksum"):
        read_masks(made)


def test_a_mask_that_does_not_fit_its_layer(tmp_path: Path) -> None:
    class Larger(Trace):
        def to_tensors(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
            header, tensors = super().to_tensors()
            header["layers"]["a"]["shape"] = [3, 3]
            return header, tensors

    good = trace_with({"a": [[1, 0]]})
    made = store_of(tmp_path / "store", {"good": good, "bad": Larger(good.layers)})
    with pytest.raises(InvalidInputError, match="cannot read '.*bad-.*'.* a mask of 8 bits is not one of .* weights"):
        read_masks(made)


def test_traces_that_cannot_be_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    one = trace_with({"a": [[1, 0]]})
    with pytest.raises(InvalidInputError, match="none of the 2 traces has a pruned layer"):
        masks_of({"x": Trace({}), "y": Trace({})})
    with pytest.raises(InvalidInputError, match=r"'a' has shape \[1, 3\] in the trace of 'y', and \[1, 2\] in those"):
        masks_of({"x": one, "y": trace_with({"a": [[1, 0, 0]]})})
    for other in ({"x": one, "y": trace_with({"b": [[1]]})}, {"x": trace_with({"b": [[1]]}, ["a"]), "y": one}):
        with pytest.raises(InvalidInputError, match="says nothing of layer '[ab]', which others pruned"):
            masks_of(other)
    large = trace_with({"a": np.ones((1 << 11, 1 << 12)), "b": np.ones((1 << 11, 1 << 12))})
    monkeypatch.setattr(overlap, "free_memory", lambda: 3 << 20)
    with pytest.raises(InvalidInputError, match="masks and overlaps take 4 MiB or more, and 3 are free"):
        masks_of({"x": large, "y": large})
    for enough in ((4 << 20) + 64, None):  # of masks, and of two layers' overlaps
        monkeypatch.setattr(overlap, "free_memory", lambda enough=enough: enough)
        assert masks_of({"x": large, "y": large}).images == ("x", "y")


def alike(distances: list[float]) -> NDArray[np.float64]:
    """The overlaps of images with these distances: of the first to all later ones, of the second, and so on."""
    count = round((1 + math.sqrt(1 + 8 * len(distances))) / 2)
    matrix = np.eye(count)
    matrix[np.triu_indices(count, 1)] = 1 - np.asarray(distances)
    return np.maximum(matrix, matrix.T)


def test_clusters_by_average_linkage() -> None:
    # 0 and 1 join at 0.3. From them 2 is 0.625 away on the average, 3 is 0.7; 2 and 3 are 0.7 apart. Single linkage
    # would go on with 3 (0.45), complete linkage with 2 and 3 (0.7).
    found = clusters(alike([0.3, 0.75, 0.95, 0.5, 0.45, 0.7]), 2)
    assert [found.of[0] == found.of[i] for i in (1, 2, 3)] == [True, True, False]
    assert found.count == 2
    # Of 0 the mean distance within is (0.3 + 0.75) / 2, to the other cluster 0.95, and so on; alone is 0.
    within, other = [0.525, 0.4, 0.625], [0.95, 0.45, 0.7]
    each = [(b - a) / max(a, b) for a, b in zip(within, other, strict=True)]
    assert found.silhouette == pytest.approx(sum(each) / 4)


def test_how_many_clusters() -> None:
    groups = np.array([0, 1, 2, 0, 1, 2, 2])
    matrix = np.where(groups[:, None] == groups, 0.6, 0.2)
    np.fill_diagonal(matrix, 1)
    found = clusters(matrix)
    assert found.count == 3
    assert found.silhouette == pytest.approx((0.8 - 0.4) / 0.8)
    assert sorted(found.order) == list(range(7))
    # Neighbours are of one cluster, and clusters are numbered as they come.
    assert [found.of[place] for place in found.order] == sorted(found.of)
    for number in range(3):
        assert len({groups[place] for place in range(7) if found.of[place] == number}) == 1
    for count in (1, 7):
        whole = clusters(matrix, count)
        assert whole.count == count
        assert math.isnan(whole.silhouette)
    assert clusters(alike([0.5])).count == 1
    assert clusters(alike([0.5]), 2).of in ((0, 1), (1, 0))
    again = clusters(matrix.copy())
    assert (again.of, again.order) == (found.of, found.order)


def test_matrices_that_cannot_be_clustered() -> None:
    matrix = alike([0.5, 0.5, 0.5])
    with pytest.raises(InvalidInputError, match="4 clusters of 3 images"):
        clusters(matrix, 4)
    with pytest.raises(InvalidInputError, match="clusters must be a whole number of at least 1, got 0"):
        clusters(matrix, 0)
    for wrong, message in (
        (matrix[:2], r"got \[2, 3\]"),
        (np.eye(1), r"got \[1, 1\]"),
        (torch.eye(3), "got Tensor"),
        (matrix + np.triu(np.full((3, 3), 0.1), 1), "a symmetric matrix of numbers within 0..1"),
        (2 * matrix, "a symmetric matrix of numbers within 0..1"),
        (np.where(np.eye(3) > 0, np.nan, 0.5), "a symmetric matrix of numbers within 0..1"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            clusters(wrong)  # type: ignore[arg-type]


def symmetric(upper: list[list[float]]) -> NDArray[np.float64]:
    matrix = np.asarray(upper)
    return np.triu(matrix, 1) + np.triu(matrix, 1).T + np.eye(len(matrix))


def test_separation_by_hand() -> None:
    matrix = symmetric(
        [
            [1, 0.8, 0.2, 0.4, 0.3],
            [0, 1.0, 0.6, 0.6, 0.6],
            [0, 0.0, 1.0, 0.1, 0.1],
            [0, 0.0, 0.0, 1.0, 0.7],
            [0, 0.0, 0.0, 0.0, 1.0],
        ]
    )
    found = separation(matrix, [True, True, False, False, False])
    scores = [0.8 - 0.9 / 3, 0.8 - 1.8 / 3, 0.8 / 2 - 0.2 / 2, 1.0 / 2 - 0.8 / 2, 0.9 / 2 - 0.8 / 2]
    np.testing.assert_allclose(found.scores, scores, atol=1e-11)  # 0.5, 0.2, 0.3, 0.1, 0.05
    assert found.auc == 5 / 6
    matrix[2, 3] = matrix[3, 2] = 0.3  # now the second and the third image have one score
    tied = separation(matrix, [True, True, False, False, False])
    assert tied.scores[1] == tied.scores[2]
    assert tied.auc == 5.5 / 6


def test_the_area_is_that_of_metrics() -> None:
    generator = np.random.default_rng(3)
    matrix = symmetric(generator.random((20, 20)).tolist())
    inside = generator.random(20) < 0.4
    found = separation(matrix, inside)
    scores, patch = torch.from_numpy(found.scores)[None], torch.from_numpy(inside)[None]
    assert found.auc == pytest.approx(metrics.trojan_auc(scores, patch).item(), abs=1e-12)


def test_images_of_one_photograph_are_not_compared() -> None:
    # Each image is most like its twin, which tells nothing; apart from that the set is alike.
    matrix = symmetric(
        [
            [1, 0.5, 0.9, 0.1],
            [0, 1.0, 0.2, 0.9],
            [0, 0.0, 1.0, 0.3],
            [0, 0.0, 0.0, 1.0],
        ]
    )
    inside, photographs = [True, True, False, False], ["p", "q", "p", "q"]
    found = separation(matrix, inside, apart=photographs)
    np.testing.assert_allclose(found.scores, [0.5 - 0.1, 0.5 - 0.2, 0.2 - 0.3, 0.1 - 0.3], atol=1e-11)
    assert found.auc == 1
    assert separation(matrix, inside).auc < 1


def test_what_random_sets_give() -> None:
    generator = np.random.default_rng(0)
    matrix = symmetric(generator.random((6, 6)).tolist())
    sets = [np.isin(np.arange(6), chosen) for chosen in combinations(range(6), 3)]
    areas = np.array([separation(matrix, each).auc for each in sets])
    assert len(np.unique(areas)) > 3
    for each, area in zip(sets[:4], areas[:4], strict=True):
        found = separation(matrix, each)
        # Of 999 sets, three standard deviations.
        assert found.by_chance == pytest.approx(np.mean(areas >= area - 1e-9), abs=0.05)
        assert found.random[0] <= np.percentile(areas, 10)
        assert found.random[1] >= np.percentile(areas, 90)
        assert areas.min() <= found.random[0] < found.random[1] <= areas.max()
    once = separation(matrix, sets[0], seed=1)
    assert once.by_chance == separation(matrix, sets[0], seed=1).by_chance != separation(matrix, sets[0]).by_chance


def test_neighbours_among_the_leaves_are_alike() -> None:
    hierarchy = pytest.importorskip("scipy.cluster.hierarchy")
    shorter = 0
    for seed in range(5):
        masks = random_masks(12, {"fc": (8, 16)}, seed)
        matrix = overlaps(masks_of({name: trace_with(each) for name, each in masks.items()})).pooled
        tree = hierarchy.linkage((1 - matrix)[np.triu_indices(12, 1)], "average")
        lengths = [
            sum(1 - matrix[one, other] for one, other in pairwise(order))
            for order in (clusters(matrix).order, hierarchy.leaves_list(tree))
        ]
        assert lengths[0] <= lengths[1] + 1e-12
        shorter += lengths[0] < lengths[1] - 1e-12
    assert shorter


def test_the_set_itself_counts_among_the_random_ones() -> None:
    inside = np.arange(24) < 12
    matrix = np.where(inside[:, None] == inside, 0.9, 0.1)
    np.fill_diagonal(matrix, 1)
    assert separation(matrix, inside).by_chance == 1 / 1000  # or else it would be as unlikely as can be: 0


def test_random_is_what_holds_95_of_100_sets() -> None:
    generator = np.random.default_rng(5)
    matrix, inside = symmetric(generator.random((12, 12)).tolist()), np.arange(12) < 5
    found = separation(matrix, inside, seed=2)
    drawn = list(overlap._dealt(inside, np.arange(12), np.random.default_rng(2)))
    areas = [separation(matrix, each, seed=2).auc for each in drawn[:200]]
    within = np.mean([found.random[0] <= area <= found.random[1] for area in areas])
    assert 0.92 <= within <= 0.98  # by 90 of 100 it would be 0.9


def test_random_sets_have_as_many_images_of_as_many_photographs() -> None:
    photographs = np.array([0, 1, 2, 0, 1, 2, 3, 4, 5, 6])  # three pairs, four alone
    labels = np.array([1, 1, 1, 0, 0, 0, 1, 0, 0, 0], dtype=bool)
    drawn = np.stack(list(overlap._dealt(labels, photographs, np.random.default_rng(0))))
    assert len(drawn) == 999
    assert (drawn[:, :3] != drawn[:, 3:6]).all()  # one of each pair
    assert (drawn[:, 6:].sum(axis=1) == 1).all()
    assert len(np.unique(drawn, axis=0)) == 2**3 * 4


@pytest.mark.parametrize("auc", [0.0, 0.3, 0.5, 0.83, 1.0])
def test_the_interval_is_newcombes(auc: float) -> None:
    low, high = overlap._interval(auc, 7, 11)
    mirrored = overlap._interval(1 - auc, 7, 11)
    assert (low, high) == pytest.approx((1 - mirrored[1], 1 - mirrored[0]))
    assert 0 <= low <= auc <= high <= 1
    assert low < high
    for limit in (low, high):
        if limit in (0, 1):
            assert limit == auc
            continue
        spread = limit * (1 - limit) * (1 + 8 * ((1 - limit) / (2 - limit) + limit / (1 + limit))) / 77
        assert abs(auc - limit) == pytest.approx(1.96 * math.sqrt(spread), rel=1e-3)


def test_sets_that_cannot_be_told_apart() -> None:
    matrix = alike([0.5] * 6)
    for inside, counts in (([1, 0, 0, 0], (1, 3)), ([1, 1, 1, 0], (3, 1)), ([0, 0, 0, 0], (0, 4))):
        message = f"the set has {counts[0]} images, and the rest {counts[1]}"
        with pytest.raises(InvalidInputError, match=message):
            separation(matrix, [bool(each) for each in inside])
    with pytest.raises(InvalidInputError, match="the set has 1 photographs, and the rest 2"):
        separation(matrix, [True, True, False, False], apart=["p", "p", "q", "r"])
    with pytest.raises(InvalidInputError, match="overlaps of 4 images, but 3 are said .*, and 4 have a photograph"):
        separation(matrix, [True, True, False])
    with pytest.raises(InvalidInputError, match="overlaps of 4 images, but 4 are said .*, and 2 have a photograph"):
        separation(matrix, [True, True, False, False], apart=["p", "q"])
    with pytest.raises(InvalidInputError, match="symmetric"):
        separation(np.triu(matrix), [True, True, False, False])
    for inside in ([1, 1, 0, 0], [[True], [True], [False], [False]], ["a", "", "b", ""], 5):
        with pytest.raises(InvalidInputError, match="inside must be a bool for each image"):
            separation(matrix, inside)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="apart must be names, got None among them"):
        separation(matrix, [True, True, False, False], apart=[None] * 4)  # type: ignore[list-item]
    with pytest.raises(InvalidInputError, match="overlaps are a matrix of floats"):
        separation(matrix.astype(str), [True, True, False, False])
    with pytest.raises(InvalidInputError, match="seed must be a whole number of at least 0, got -1"):
        separation(matrix, [True, True, False, False], seed=-1)


def test_distinctive_connections_by_hand() -> None:
    # Two output channels, two input channels, two taps.
    kept = {
        "in 1": [[[1, 0], [1, 1]], [[1, 0], [0, 1]]],
        "in 2": [[[1, 0], [1, 0]], [[1, 0], [0, 1]]],
        "in 3": [[[0, 0], [1, 1]], [[1, 0], [0, 1]]],
        "out 1": [[[0, 0], [0, 1]], [[0, 0], [1, 1]]],
        "out 2": [[[0, 0], [1, 1]], [[0, 0], [0, 0]]],
    }
    masks = masks_of({name: trace_with({"conv": mask, "fc": [[1, 0]]}) for name, mask in kept.items()})
    found = distinctive(masks, ["in 1", "in 2", "in 3"], least=2 / 3, most=0.5)
    assert found.inside == ("in 1", "in 2", "in 3")
    assert found.outside == ("out 1", "out 2")
    assert found.connections() == [
        {"layer": "conv", "output": 1, "input": 0, "tap": [0], "inside": 1.0, "outside": 0.0},
        {"layer": "conv", "output": 0, "input": 0, "tap": [0], "inside": 2 / 3, "outside": 0.0},
        {"layer": "conv", "output": 0, "input": 1, "tap": [0], "inside": 1.0, "outside": 0.5},
        {"layer": "conv", "output": 1, "input": 1, "tap": [1], "inside": 1.0, "outside": 0.5},
    ]
    assert found.count == 4
    assert found.connections(2) == found.connections()[:2]
    np.testing.assert_array_equal(found.layers["conv"].places, [0, 2, 4, 7])
    np.testing.assert_array_equal(found.layers["conv"].inside, [2 / 3, 1, 1, 1])
    np.testing.assert_array_equal(found.layers["conv"].outside, [0, 0.5, 0, 0.5])
    assert len(found.layers["fc"].places) == 0
    assert found.channels() == [
        {"layer": "conv", "side": side, "channel": channel, "connections": 2, "weights": 4}
        for side in ("output", "input")
        for channel in (0, 1)
    ]
    strict = distinctive(masks, ["in 1", "in 2", "in 3"])
    assert [(row["output"], row["input"], row["tap"]) for row in strict.connections()] == [(1, 0, [0])]
    assert strict.channels() == [
        {"layer": "conv", "side": "output", "channel": 1, "connections": 1, "weights": 4},
        {"layer": "conv", "side": "input", "channel": 0, "connections": 1, "weights": 4},
    ]
    assert strict.channels(1) == strict.channels()[:1]
    one = distinctive(masks, ["in 1"], ["out 1"], least=1, most=0)
    assert [(row["output"], row["input"], row["tap"]) for row in one.connections()] == [
        (0, 0, [0]),
        (0, 1, [0]),
        (1, 0, [0]),
    ]


def test_the_most_distinctive_come_first_whatever_their_layer() -> None:
    kept = {
        "in 1": {"a": [[1, 1]], "b": [[1, 0, 1]]},
        "in 2": {"a": [[1, 0]], "b": [[1, 1, 1]]},
        "out 1": {"a": [[1, 0]], "b": [[0, 0, 1]]},
        "out 2": {"a": [[0, 0]], "b": [[0, 0, 0]]},
    }
    masks = masks_of({name: trace_with(each) for name, each in kept.items()})
    rows = distinctive(masks, ["in 1", "in 2"], least=0.5, most=0.49).connections()
    assert [(row["layer"], row["input"]) for row in rows] == [("b", 0), ("a", 1), ("b", 1)]
    rows = distinctive(masks, ["in 1", "in 2"], least=1, most=0.5).connections()
    assert [(row["layer"], row["input"]) for row in rows] == [("b", 0), ("a", 0), ("b", 2)]


def test_equals_come_in_the_order_of_the_weights() -> None:
    kept = {
        f"{kind} {i}": trace_with({"fc": np.full((20, 20), kind == "in")}) for kind in ("in", "out") for i in (1, 2)
    }
    rows = distinctive(masks_of(kept), ["in 1", "in 2"]).connections()
    assert [(row["output"], row["input"]) for row in rows] == [divmod(i, 20) for i in range(400)]


def test_no_layers_and_names_that_are_none() -> None:
    masks = masks_of(BY_HAND)
    none = overlap.Masks(masks.images, {}, {}, {})
    assert distinctive(none, ["x"]).connections() == distinctive(none, ["x"]).channels() == []
    for layers, message in (
        ([], "layers is empty: name some"),
        ("a", "layers must be a sequence of names, got 'a': pass a list"),
        ((each for each in "a"), "layers must be a sequence of names"),
        ([5], "layers must be names, got 5 among them"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            masks_of(BY_HAND, layers=layers)  # type: ignore[arg-type]
    for inside in ("x", {"x"}, 5):
        with pytest.raises(InvalidInputError, match="inside must be a sequence of names"):
            distinctive(masks, inside)  # type: ignore[arg-type]


def test_shares_are_of_whole_images() -> None:
    # 0.7 * 10 is more than 7 in floating point, and 7 of 10 are 70 %; 0.3 * 10 is not, yet 3 of 10 are 30 %.
    assert math.ceil(0.7 * 10) == 7
    for least, most in ((0.7, 0.1), (0.9, 0.3), (0.6, 0.4), (0.9, 0.7 - 0.4)):  # the last a little below 0.3
        inside, outside = round(10 * least), round(10 * most)
        kept = {f"in {i}": [[i < inside, i < inside - 1]] for i in range(10)}
        kept |= {f"out {i}": [[i < outside, i < outside + 1]] for i in range(10)}
        masks = masks_of({name: trace_with({"fc": mask}) for name, mask in kept.items()})
        found = distinctive(masks, [f"in {i}" for i in range(10)], least=least, most=most)
        assert [row["input"] for row in found.connections()] == [0]


def test_a_planted_subnetwork_is_found() -> None:
    shapes = {"early": (8, 4, 3, 3), "late": (16, 32)}
    masks = random_masks(24, shapes, seed=1)
    generator = np.random.default_rng(2)
    planted = {name: generator.random(shape) < 0.05 for name, shape in shapes.items()}
    for name, each in masks.items():
        for layer, places in planted.items():
            each[layer][places] = name < "12"
    found = distinctive(
        masks_of({name: trace_with(each) for name, each in masks.items()}), [f"{i:02}" for i in range(12)]
    )
    for layer, places in planted.items():
        np.testing.assert_array_equal(found.layers[layer].places, np.flatnonzero(places))
        assert (found.layers[layer].inside == 1).all()
        assert (found.layers[layer].outside == 0).all()
    by_channel = {(row["layer"], row["side"], row["channel"]): row["connections"] for row in found.channels()}
    assert by_channel == {
        (layer, side, channel): count
        for layer, places in planted.items()
        for axis, side in enumerate(("output", "input"))
        for channel, count in enumerate(np.moveaxis(places, axis, 0).reshape(places.shape[axis], -1).sum(axis=1))
        if count
    }
    sizes = {("early", "output"): 36, ("early", "input"): 72, ("late", "output"): 32, ("late", "input"): 16}
    assert all(row["weights"] == sizes[row["layer"], row["side"]] for row in found.channels())
    shares = [row["connections"] / row["weights"] for row in found.channels()]
    assert shares == sorted(shares, reverse=True)
    # The set by itself tells it, too: without the planted connections, masks are random.
    matrix = overlaps(masks_of({name: trace_with(each) for name, each in masks.items()})).pooled
    assert separation(matrix, [name < "12" for name in masks]).auc > 0.9


def test_sets_without_distinctive_connections() -> None:
    masks = masks_of(BY_HAND)
    for shares, message in (
        ({"least": 0.5, "most": 0.5}, "most=0.5 is not below least=0.5"),
        ({"least": 1.5}, "least must be a share of images within 0..1, got 1.5"),
        ({"most": -0.1}, "most must be a share .* got -0.1"),
        ({"most": math.nan}, "most must be a share .* got nan"),
        ({"least": "all"}, "least must be a share .* got 'all'"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            distinctive(masks, ["x"], **shares)
    for inside, outside, message in (
        (["x", "w"], None, "there is no image 'w'; nearest"),
        (["x"], ["v"], "there is no image 'v'; nearest"),
        (["x", "y"], ["y", "z"], "image 'y' is in both sets"),
        (["x", "y", "z"], None, "the set has 3 images and the rest 0"),
        ([], None, "the set has 0 images and the rest 3"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            distinctive(masks, inside, outside)
