"""What the traces of many images have in common: overlaps, clusters, and what a set of them shares."""

from __future__ import annotations

import difflib
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from spade_fast.errors import InvalidInputError, check_names, check_whole, require
from spade_fast.memory import free_memory
from spade_fast.plans import is_prefix
from spade_fast.readonly import ReadOnlyMappings
from spade_fast.store import Store
from spade_fast.traces import PackedMask, Trace

Matrix: TypeAlias = NDArray[np.float64]

# Bytes of masks that are counted at a time: what a core's cache holds.
_AT_A_TIME = 1 << 21
# More are not tried where their number is to be chosen.
_MOST_CLUSTERS = 20
_DRAWN = 999
# What differs by rounding only is equal.
_DIGITS, _ROUNDING = 12, 1e-9
_NORMAL_95 = 1.959963984540054


@dataclass(frozen=True, eq=False)
class Masks(ReadOnlyMappings):
    """Which weights the traces of many images kept: a bit for each weight of each image.

    Attributes
    ----------
    images
        Their names.
    shapes
        By layer, that of its weight: every layer that at least one image pruned, in the order of the network.
    bits
        By layer, uint8 [images, bytes]: eight weights a byte, 1 for those that were kept.
    dense
        By layer, the places in `images` of those that left it dense: they kept all of its weights.
    """

    images: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]
    bits: Mapping[str, NDArray[np.uint8]]
    dense: Mapping[str, tuple[int, ...]]

    def weights(self, layer: str) -> int:
        """How many weights a layer has."""
        return math.prod(self.shapes[layer])


def read_masks(
    store: Store | str | os.PathLike[str],
    names: Sequence[str] | None = None,
    *,
    layers: Sequence[str] | None = None,
    progress: bool = False,
) -> Masks:
    """The masks of a store's images; each file is read once.

    Parameters
    ----------
    store
        What :func:`spade_fast.run` wrote.
    names
        Which images. Default: all that have a trace.
    layers
        Names of layers or blocks: no others. Default: all that at least one image pruned.
    progress
        Show a progress bar on stderr.

    Raises
    ------
    InvalidInputError
        If a file is damaged (the message names it), an image or a layer is not there, the traces are not of one
        network, as far as shapes tell, there are fewer than two images, or memory does not hold a bit for each weight
        of each image.
    """
    store = store if isinstance(store, Store) else Store(store)
    chosen = known_images(store, names)
    bar = tqdm(chosen, "reading masks", disable=not progress)
    return _collected(((name, *store.masks(name)) for name in bar), len(chosen), layers)


def masks_of(traces: Mapping[str, Trace], *, layers: Sequence[str] | None = None) -> Masks:
    """The masks of traces by name, as :func:`read_masks` gives those of a store.

    Raises
    ------
    InvalidInputError
        As there.
    """
    return _collected(((name, trace.masks(), trace.dense) for name, trace in traces.items()), len(traces), layers)


def known_images(store: Store, names: Sequence[str] | None) -> list[str]:
    """The names, by default of all images with a trace; InvalidInputError for one that has none, or is named twice."""
    if names is None:
        return list(store)
    for name in check_names("names", names):
        try:
            store.traced_file(name)
        except KeyError as error:
            raise InvalidInputError(f"the store has no image {name!r}; nearest: {nearest(name, store)}") from error
    if twice := next((name for name, count in Counter(names).items() if count > 1), None):
        raise InvalidInputError(f"image {twice!r} is named twice: leave one out")
    return list(names)


def nearest(name: str, known: Iterable[str]) -> str:
    """The most similar of the known names, for a refusal."""
    names = list(known)
    return ", ".join(map(repr, difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names[:3]))


def _collected(
    traces: Iterable[tuple[str, Mapping[str, PackedMask], Mapping[str, str]]], count: int, layers: Sequence[str] | None
) -> Masks:
    if layers is not None and not check_names("layers", layers):
        raise InvalidInputError("layers is empty: name some, or leave it out for all")
    if count < 2:
        raise InvalidInputError(f"there is {count or 'no'} trace: pass two or more, to be compared with one another")
    images: list[str] = []
    order: list[str] = []
    shapes: dict[str, tuple[int, ...]] = {}
    bits: dict[str, NDArray[np.uint8]] = {}
    missing: dict[str, set[int]] = {}
    left_dense: list[frozenset[str]] = []
    free, needed = free_memory(), 0
    for place, (name, masks, dense) in enumerate(traces):
        images.append(name)
        left_dense.append(frozenset(dense))
        _merge(order, masks)
        for layer, (shape, packed) in masks.items():
            if layers is not None and not any(is_prefix(key, layer) for key in layers):
                continue
            if layer not in bits:
                needed += count * (len(packed) + 8 * count)  # and the layer's overlaps
                _check_memory(needed, free)
                shapes[layer], bits[layer] = shape, np.empty((count, len(packed)), np.uint8)
                missing[layer] = set(range(count))
            if shapes[layer] != shape:
                raise InvalidInputError(
                    f"layer {layer!r} has shape {list(shape)} in the trace of {name!r}, and {list(shapes[layer])} in "
                    "those before: compare traces of one network"
                )
            bits[layer][place] = packed
            missing[layer].remove(place)
    if not order:
        raise InvalidInputError(f"none of the {count} traces has a pruned layer: there is nothing to compare")
    for key in layers or ():
        if not any(is_prefix(key, layer) for layer in order):
            raise InvalidInputError(f"no trace has a pruned layer or block {key!r}; nearest: {nearest(key, order)}")
    for layer, places in missing.items():
        for place in places:
            if layer not in left_dense[place]:
                raise InvalidInputError(
                    f"the trace of {images[place]!r} says nothing of layer {layer!r}, which others pruned: compare "
                    "traces of one network"
                )
            bits[layer][place] = np.packbits(np.ones(math.prod(shapes[layer]), np.uint8))
    chosen = [layer for layer in order if layer in bits]
    return Masks(
        tuple(images),
        {layer: shapes[layer] for layer in chosen},
        {layer: bits[layer] for layer in chosen},
        {layer: tuple(sorted(missing[layer])) for layer in chosen},
    )


def _merge(order: list[str], layers: Iterable[str]) -> None:
    """Put those of the layers that are not in the order there, each behind the one that it follows."""
    place = -1
    for layer in layers:
        if layer not in order:
            order.insert(place + 1, layer)
        place = order.index(layer)


def _check_memory(needed: int, free: int | None) -> None:
    if free is not None and needed > free:
        raise InvalidInputError(
            f"masks and overlaps take {needed >> 20} MiB or more, and {free >> 20} are free: compare fewer images, or "
            "layers"
        )


@dataclass(frozen=True, eq=False)
class Overlaps(ReadOnlyMappings):
    """How many of their kept weights the traces of each two images share.

    Attributes
    ----------
    images
        Their names.
    layers
        By layer, float64 [images, images], symmetric: the weights that both kept over those that either did; 1 where
        neither kept any.
    pooled
        The same over the weights of all layers together.
    kept
        By layer, float64 [images]: the share of its weights that were kept.
    weights
        By layer, how many it has.
    dense
        By layer, the names of the images that left it dense.
    """

    images: tuple[str, ...]
    layers: Mapping[str, Matrix]
    pooled: Matrix
    kept: Mapping[str, NDArray[np.float64]]
    weights: Mapping[str, int]
    dense: Mapping[str, tuple[str, ...]]

    @property
    def kept_pooled(self) -> NDArray[np.float64]:
        """The share of the weights of all layers together that each image kept, float64 [images]."""
        total = sum(self.weights.values())
        shares = [kept * (self.weights[layer] / total) for layer, kept in self.kept.items()]
        return np.asarray(np.sum(shares, axis=0), dtype=np.float64)


def overlaps(masks: Masks, *, progress: bool = False) -> Overlaps:
    """The overlap of each two traces, layer by layer and over all layers.

    A layer that an image left dense counts as a mask that keeps everything: that image rests on all of its weights.
    Where both traces pruned a layer it is what :meth:`spade_fast.Trace.overlap` gives.

    Bits are counted, 64 at a time: images^2 / 2 times the weights / 64 steps, on one core. Beside the masks and the
    results it takes a few MiB, and six more matrices of int64 [images, images].

    Parameters
    ----------
    masks
        What :func:`read_masks` or :func:`masks_of` gave.
    progress
        Show a progress bar on stderr.
    """
    count = len(masks.images)
    both, either = np.zeros((count, count), np.int64), np.zeros((count, count), np.int64)
    found, kept, dense = {}, {}, {}
    for layer, bits in tqdm(masks.bits.items(), "overlaps", disable=not progress):
        shared = _shared_bits(bits)
        sizes = shared.diagonal()
        union = sizes[:, None] + sizes - shared
        found[layer] = _ratio(shared, union)
        both += shared
        either += union
        kept[layer] = sizes / max(1, masks.weights(layer))
        dense[layer] = tuple(masks.images[place] for place in masks.dense[layer])
    weights = {layer: masks.weights(layer) for layer in found}
    return Overlaps(masks.images, found, _ratio(both, either), kept, weights, dense)


def _shared_bits(bits: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Of bits [images, bytes], how many each two rows have in common: [images, images]."""
    count, size = bits.shape
    found = np.zeros((count, count), np.int64)
    step = 8 * max(16, _AT_A_TIME // (8 * count))
    for start in range(0, size, step):
        part = bits[:, start : start + step]
        words = np.zeros((count, -(-part.shape[1] // 8)), np.uint64)
        words.view(np.uint8)[:, : part.shape[1]] = part
        shared, ones = np.empty_like(words), np.empty(words.shape, np.uint8)
        for row in range(count):
            np.bitwise_and(words[row], words[row:], out=shared[row:])
            np.bitwise_count(shared[row:], out=ones[row:])
            found[row, row:] += ones[row:].sum(axis=1, dtype=np.uint32)
    return found + np.triu(found, 1).T


def _ratio(shared: NDArray[np.int64], union: NDArray[np.int64]) -> Matrix:
    return np.where(union > 0, shared / np.maximum(union, 1), 1.0)


def of_sizes(kept: NDArray[np.float64]) -> Matrix:
    """The largest overlaps that masks of these sizes can have, which is that of nested ones.

    Masks overlap the less, the more they differ in size, whatever they keep. What these matrices tell of images is told
    by how many weights traces keep, not by which.

    Parameters
    ----------
    kept
        float64 [images], as in :class:`Overlaps`.
    """
    smaller, larger = np.minimum(kept[:, None], kept), np.maximum(kept[:, None], kept)
    return np.divide(smaller, larger, out=np.ones_like(larger), where=larger > 0)


@dataclass(frozen=True, eq=False)
class Clusters:
    """Images whose traces overlap much with one another.

    Attributes
    ----------
    of
        Of each image, the number of its cluster: from 0 on, in the order of the leaves.
    order
        The places of the images, neighbours beside each other: the leaves of the tree.
    silhouette
        How much nearer images are to their own cluster than to the next, -1..1: near 0 there are none to speak of. NaN
        for one cluster, or as many as images.
    """

    of: tuple[int, ...]
    order: tuple[int, ...]
    silhouette: float

    @property
    def count(self) -> int:
        """How many there are."""
        return max(self.of) + 1


def clusters(matrix: Matrix, count: int | None = None) -> Clusters:
    """Hierarchical clustering of images by the overlaps of their traces: average linkage on 1 - overlap.

    1 - overlap is a metric (Jaccard's), and average linkage needs no more than distances.

    Parameters
    ----------
    matrix
        float64 [images, images] of :class:`Overlaps`.
    count
        How many clusters. Default: of 2 to 20, the number with the largest mean silhouette (Rousseeuw 1987), which is
        never 1: look at `Clusters.silhouette` whether there are any. One cluster for two images.

    Raises
    ------
    InvalidInputError
        If the matrix is none of overlaps, or there are fewer images than clusters.
    MissingDependencyError
        If scikit-learn, which brings scipy, is not installed.
    """
    _check_overlaps(matrix)
    images = len(matrix)
    if count is not None and check_whole("clusters", count, 1) > images:
        raise InvalidInputError(f"{count} clusters of {images} images: ask for at most {images}")
    hierarchy = require("scipy.cluster.hierarchy", "interpret")
    distances = 1 - matrix
    np.fill_diagonal(distances, 0.0)  # whatever the matrix has there
    pairs = distances[np.triu_indices(images, 1)]
    tree = hierarchy.linkage(pairs, "average", optimal_ordering=True)
    order = [int(place) for place in hierarchy.leaves_list(tree)]

    def cut(into: int) -> tuple[list[int], float]:
        labels = hierarchy.cut_tree(tree, into)[:, 0]
        numbers = {label: number for number, label in enumerate(dict.fromkeys(labels[order].tolist()))}
        if not 1 < into < images:
            return [numbers[label] for label in labels.tolist()], math.nan
        score = require("sklearn.metrics", "interpret").silhouette_score(distances, labels, metric="precomputed")
        return [numbers[label] for label in labels.tolist()], float(score)

    if count is None and images > 2:
        tried = [cut(into) for into in range(2, min(images - 1, _MOST_CLUSTERS) + 1)]
        of, silhouette = max(tried, key=lambda each: round(each[1], _DIGITS))
    else:
        of, silhouette = cut(count or 1)
    return Clusters(tuple(of), tuple(order), silhouette)


def _check_overlaps(matrix: Matrix) -> None:
    is_matrix = isinstance(matrix, np.ndarray) and matrix.ndim == 2 and matrix.dtype.kind == "f"
    if not is_matrix or matrix.shape[0] != matrix.shape[1] or len(matrix) < 2:
        got = list(matrix.shape) if isinstance(matrix, np.ndarray) else type(matrix).__name__
        raise InvalidInputError(f"overlaps are a matrix of floats [images, images] of two images or more, got {got}")
    if not (np.all((matrix >= 0) & (matrix <= 1)) and np.array_equal(matrix, matrix.T)):
        raise InvalidInputError(
            "overlaps are a symmetric matrix of numbers within 0..1: pass one of spade_fast.overlap"
        )


@dataclass(frozen=True, eq=False)
class Separation:
    """How well overlaps alone tell the images of a set from the others.

    Attributes
    ----------
    auc
        Of an image of the set and another one, the chance that the former's score is the larger; ties count half.
    interval
        That holds 95 %: see :func:`separation`.
    by_chance
        The share of sets drawn at random that reach this AUC, the set itself counted among them.
    random
        What holds the AUC of 95 % of sets drawn at random.
    scores
        float64 [images].
    """

    auc: float
    interval: tuple[float, float]
    by_chance: float
    random: tuple[float, float]
    scores: NDArray[np.float64]


def separation(
    matrix: Matrix, inside: Sequence[bool] | NDArray[np.bool_], *, apart: Sequence[str] | None = None, seed: int = 0
) -> Separation:
    """Tell the images of a set from the others by the overlaps of their traces.

    The score of an image is its mean overlap with the images of the set, minus that with the others, itself left out of
    either. That is supervised: it knows of every image but the one it judges whether it is of the set.

    The interval is Newcombe's (2006, method 5), which is no point at an AUC of 1. It takes the scores for independent;
    but all images are compared with the same ones, so near one half it is too narrow. There look at
    `Separation.random`, for which the set is drawn anew 999 times, and which takes nothing for independent.

    Parameters
    ----------
    matrix
        float64 [images, images] of :class:`Overlaps`.
    inside
        Of each image, whether it is of the set.
    apart
        Of each image, which photograph it was made from: those of one are not compared with each other, and sets are
        drawn so that as many photographs as now have images in them. Default: each image is its own.
    seed
        Of the sets that are drawn.

    Raises
    ------
    InvalidInputError
        If sizes differ, the matrix is none of overlaps, or the set or the rest has fewer than two photographs.
    MissingDependencyError
        If scikit-learn, which brings scipy, is not installed.
    """
    _check_overlaps(matrix)
    check_whole("seed", seed, 0)
    labels = np.asarray(inside)
    if labels.dtype != np.bool_ or labels.ndim != 1:
        raise InvalidInputError(f"inside must be a bool for each image, got {inside!r}")
    photographs = list(range(len(matrix))) if apart is None else check_names("apart", apart)
    if not len(labels) == len(photographs) == len(matrix):
        raise InvalidInputError(
            f"overlaps of {len(matrix)} images, but {len(labels)} are said to be of the set or not, and "
            f"{len(photographs)} have a photograph: pass one value for each image"
        )
    numbers = np.unique(photographs, return_inverse=True)[1]
    counts = check_set(labels, numbers, "images" if apart is None else "photographs")
    others = (numbers[:, None] != numbers).astype(np.float64)
    sets = np.stack([labels, *_dealt(labels, numbers, np.random.default_rng(seed))], axis=1)
    scores = _scores(matrix, others, sets)
    areas = _areas(scores, sets)
    auc = float(areas[0])
    by_chance = float(np.mean(areas >= auc - _ROUNDING))
    low, high = np.percentile(areas[1:], [2.5, 97.5]).tolist()
    return Separation(auc, _interval(auc, *counts), by_chance, (low, high), scores[:, 0].copy())


def check_set(inside: NDArray[np.bool_], photographs: NDArray[Any], called: str = "images") -> tuple[int, int]:
    """Of how many photographs the set has images, and the rest; InvalidInputError if they cannot be told apart."""
    counts = len(np.unique(photographs[inside])), len(np.unique(photographs[~inside]))
    if min(counts) < 2:
        raise InvalidInputError(
            f"the set has {counts[0]} {called}, and the rest {counts[1]}: both need two or more, as none is compared "
            "with itself"
        )
    return counts


def _scores(matrix: Matrix, others: Matrix, inside: NDArray[np.bool_]) -> Matrix:
    """Of each image and each set [images, sets]: mean overlap with the set, minus that with the rest."""
    compared = matrix * others
    means = [(compared @ places) / (others @ places) for places in (inside.astype(np.float64), 1.0 - inside)]
    return np.round(means[0] - means[1], _DIGITS)


def _areas(scores: Matrix, inside: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Of each set, the area under the ROC curve of its scores, both [images, sets]."""
    ranks = require("scipy.stats", "interpret").rankdata(scores, axis=0)
    count = inside.sum(axis=0)
    wins = (ranks * inside).sum(axis=0) - count * (count + 1) / 2
    return np.asarray(wins / (count * (len(inside) - count)), dtype=np.float64)


def _dealt(
    labels: NDArray[np.bool_], photographs: NDArray[np.int64], generator: np.random.Generator
) -> Iterator[NDArray[np.bool_]]:
    """The labels dealt anew: among photographs of as many images, and among the images of each."""
    members = [np.flatnonzero(photographs == each) for each in range(photographs.max() + 1)]
    by_size = {size: np.stack([each for each in members if len(each) == size]) for size in {*map(len, members)}}
    for _ in range(_DRAWN):
        dealt = labels.copy()
        for places in by_size.values():  # [photographs, images of each]
            dealt[places] = labels[generator.permuted(generator.permutation(places), axis=1)]
        yield dealt


def _interval(auc: float, inside: int, outside: int) -> tuple[float, float]:
    """Which areas are no further from the one found than 95 % of samples of so many images would be."""

    def is_near(area: float) -> bool:
        more = (inside + outside) / 2 - 1
        variance = area * (1 - area) * (1 + more * ((1 - area) / (2 - area) + area / (1 + area))) / (inside * outside)
        return abs(auc - area) <= _NORMAL_95 * math.sqrt(variance)

    def limit(far: float) -> float:
        near = auc
        for _ in range(50):
            middle = (near + far) / 2
            near, far = (middle, far) if is_near(middle) else (near, middle)
        return near

    return limit(0.0), limit(1.0)


@dataclass(frozen=True, eq=False)
class DistinctiveLayer:
    """The connections of a layer that a set's traces keep and the others' lack, in the order of its weights.

    Attributes
    ----------
    shape
        Of the layer's weight.
    places
        int64 [found]: their places in the flattened weight.
    inside, outside
        float64 [found]: the share of the set's images that keep each, and of the others.
    """

    shape: tuple[int, ...]
    places: NDArray[np.int64]
    inside: NDArray[np.float64]
    outside: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Distinctive(ReadOnlyMappings):
    """The connections that a set's traces keep and the others' lack: the subnetwork of the set.

    Attributes
    ----------
    inside, outside
        The images of the set, and the others.
    least, most
        The share of the set's images that keep such a connection, at least, and of the others, at most.
    layers
        By layer.
    """

    inside: tuple[str, ...]
    outside: tuple[str, ...]
    least: float
    most: float
    layers: Mapping[str, DistinctiveLayer]

    @property
    def count(self) -> int:
        """How many connections there are."""
        return sum(len(layer.places) for layer in self.layers.values())

    def connections(self, limit: int | None = None) -> list[dict[str, Any]]:
        """A row for each, plain JSON values: those of the largest difference between set and rest first.

        "output" and "input" are channels, the input's of a grouped convolution within its group; "tap" is the place in
        a convolution's kernel, by axis.
        """
        if not self.layers:
            return []
        differences = [layer.inside - layer.outside for layer in self.layers.values()]
        names = list(self.layers)
        owners = np.repeat(np.arange(len(names)), [len(each) for each in differences])
        within = np.concatenate([np.arange(len(each)) for each in differences])
        chosen = np.argsort(-np.round(np.concatenate(differences), _DIGITS), kind="stable")[:limit]
        rows = []
        for owner, place in zip(owners[chosen].tolist(), within[chosen].tolist(), strict=True):
            layer = self.layers[names[owner]]
            output, channel, *tap = (int(each) for each in np.unravel_index(layer.places[place], layer.shape))
            shares = {"inside": float(layer.inside[place]), "outside": float(layer.outside[place])}
            rows.append({"layer": names[owner], "output": output, "input": channel, "tap": tap, **shares})
        return rows

    def channels(self, limit: int | None = None) -> list[dict[str, Any]]:
        """A row for each channel that has any, plain JSON values: the largest share of its weights first.

        "side" is "output" or "input". Those of one input are a channel that the set uses and the rest does not; input
        channels of a grouped convolution are those of all groups at that place.
        """
        rows = []
        for name, layer in self.layers.items():
            places = np.unravel_index(layer.places, layer.shape)
            for axis, side in enumerate(("output", "input")):
                weights = math.prod(layer.shape) // max(1, layer.shape[axis])
                channels, counts = np.unique(places[axis], return_counts=True)
                for channel, found in zip(channels.tolist(), counts.tolist(), strict=True):
                    row = {"layer": name, "side": side, "channel": channel}
                    rows.append({**row, "connections": found, "weights": weights})
        return sorted(rows, key=lambda row: -row["connections"] / row["weights"])[:limit]


def distinctive(
    masks: Masks, inside: Sequence[str], outside: Sequence[str] | None = None, *, least: float = 0.9, most: float = 0.1
) -> Distinctive:
    """The connections that the traces of a set keep, and those of other images lack.

    Of two sets of few images, chance alone makes some: draw sets at random to see how many.

    Parameters
    ----------
    masks
        What :func:`read_masks` or :func:`masks_of` gave.
    inside, outside
        Names of images. Default of the latter: all others.
    least
        The share of the set's images that must keep a connection, 0..1.
    most
        The share of the others that may.

    Raises
    ------
    InvalidInputError
        If shares are none or `most` is not below `least`, an image is unknown or in both sets, or a set is empty.
    """
    check_thresholds(least, most)
    places = {name: place for place, name in enumerate(masks.images)}
    of_set = list(dict.fromkeys(check_names("inside", inside)))
    outside = [name for name in masks.images if name not in set(of_set)] if outside is None else outside
    rest = list(dict.fromkeys(check_names("outside", outside)))
    for name in (*of_set, *rest):
        if name not in places:
            raise InvalidInputError(f"there is no image {name!r}; nearest: {nearest(name, places)}")
    if both := [name for name in of_set if name in set(rest)]:
        raise InvalidInputError(f"image {both[0]!r} is in both sets: leave it out of one")
    if not of_set or not rest:
        raise InvalidInputError(f"the set has {len(of_set)} images and the rest {len(rest)}: name at least one of each")
    found = {}
    for layer, bits in masks.bits.items():
        size = masks.weights(layer)
        shares = [_kept_by(bits, [places[name] for name in names], size) for names in (of_set, rest)]
        # Shares are rounded: 0.7 * 10 images are no more than 7.
        chosen = np.flatnonzero((shares[0] >= least - _ROUNDING) & (shares[1] <= most + _ROUNDING))
        found[layer] = DistinctiveLayer(masks.shapes[layer], chosen, shares[0][chosen], shares[1][chosen])
    return Distinctive(tuple(of_set), tuple(rest), least, most, found)


def check_thresholds(least: float, most: float) -> None:
    """Refuse shares of images by which no connection would be distinctive, or any."""
    for what, share in (("least", least), ("most", most)):
        if isinstance(share, bool) or not isinstance(share, Real) or not 0 <= share <= 1:  # also catches NaN
            raise InvalidInputError(f"{what} must be a share of images within 0..1, got {share!r}")
    if most >= least:
        raise InvalidInputError(f"most={most!r} is not below least={least!r}: then the rest would not lack them")


def _kept_by(bits: NDArray[np.uint8], places: Sequence[int], size: int) -> NDArray[np.float64]:
    """The share of those images that keep each weight [size]."""
    counts = np.zeros(size, np.int32)
    for place in places:
        counts += np.unpackbits(bits[place], count=size)
    return counts / len(places)
