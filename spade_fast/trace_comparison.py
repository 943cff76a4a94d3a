"""Comparing the traces of a store: overlaps, clusters, and what sets one set of images apart, with tables and files."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from spade_fast.errors import InvalidInputError, check_names, check_whole, require
from spade_fast.files import remove_file, tensor_bytes, write_folder
from spade_fast.overlap import (
    Clusters,
    Distinctive,
    Masks,
    Matrix,
    Overlaps,
    Separation,
    check_set,
    check_thresholds,
    clusters,
    distinctive,
    known_images,
    nearest,
    of_sizes,
    overlaps,
    read_masks,
    separation,
)
from spade_fast.readonly import ReadOnlyMappings
from spade_fast.store import Store

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: The name of the row over all layers together.
ALL = "all layers"
#: What images can be told apart by beside the labels of their list.
CLASSES = ("target", "answer")

_PNG_DPI = 160
_MOST_ROWS, _MOST_REPORTED = 100_000, 100


@dataclass(frozen=True, eq=False)
class TraceComparison(ReadOnlyMappings):
    """How the traces of a store compare.

    Attributes
    ----------
    overlaps
        Of each two images.
    clusters
        Of the images, by the overlaps over all layers.
    values
        Of each image, the value that it is told apart by; empty where there is no such thing.
    inside
        Of each image, whether it is of the set; empty where there is no set.
    apart
        Of each image, its photograph: images of one are not compared with each other; empty for one image each.
    separations
        How well overlaps over all layers alone tell a set from the rest: by the name of the set, or without one, by
        value, that value's images from all others.
    layers
        The same of the set, by layer.
    sizes
        The same by sizes of masks alone (:func:`spade_fast.overlap.of_sizes`), for "all layers" and by layer: how much
        of it comes of how many weights are kept.
    distinctive
        What the traces of the set keep, and those of the rest lack.
    settings
        How it was done: plain JSON values.
    """

    overlaps: Overlaps
    clusters: Clusters
    values: tuple[str, ...]
    inside: tuple[bool, ...]
    apart: tuple[str, ...]
    separations: Mapping[str, Separation]
    layers: Mapping[str, Separation]
    sizes: Mapping[str, Separation]
    distinctive: Distinctive | None
    settings: Mapping[str, Any]

    @property
    def pairs(self) -> dict[str, NDArray[np.bool_]]:
        """Which pairs of images are of which kind, bool [images, images], each pair once.

        With a set: two of its own ("inside"), two of the rest ("rest"), one of each ("between"). With values alone: two
        of one value ("same"), of two ("different"). Otherwise all.
        """
        count = len(self.overlaps.images)
        once = np.triu(np.ones((count, count), dtype=bool), 1)
        if self.apart:
            photographs = np.asarray(self.apart)
            once &= photographs[:, None] != photographs
        if self.inside:
            inside = np.asarray(self.inside)
            either, both = inside[:, None] | inside, inside[:, None] & inside
            return {"inside": once & both, "rest": once & ~either, "between": once & either & ~both}
        if self.values:
            values = np.asarray(self.values)
            same = values[:, None] == values
            return {"same": once & same, "different": once & ~same}
        return {"all": once}

    def layer_rows(self) -> list[dict[str, Any]]:
        """A row for each layer, the first for all of them together, plain JSON values.

        "kept" is the mean share of weights kept; "overlap" the mean overlap of the pairs of each kind, or None where
        there is none; "auc", "interval", "random" and "by_chance" are those of the set, and "auc_by_size" is that of
        sizes alone.
        """
        pairs = self.pairs
        total = sum(self.overlaps.weights.values())
        kept = {ALL: self.overlaps.kept_pooled, **self.overlaps.kept}
        rows = []
        for name, matrix in {ALL: self.overlaps.pooled, **self.overlaps.layers}.items():
            row: dict[str, Any] = {
                "layer": name,
                "weights": self.overlaps.weights.get(name, total),
                "kept": float(kept[name].mean()),
                "dense": len(self.overlaps.dense.get(name, ())),
                "overlap": {
                    kind: float(matrix[chosen].mean()) if chosen.any() else None for kind, chosen in pairs.items()
                },
            }
            if self.inside:
                (of_set,) = self.separations.values()
                row |= _told(self.layers.get(name, of_set)) | {"auc_by_size": self.sizes[name].auc}
            rows.append(row)
        return rows

    def cluster_rows(self) -> list[dict[str, Any]]:
        """A row for each cluster, plain JSON values: its images, how much they overlap, how many are of which value."""
        rows = []
        for number in range(self.clusters.count):
            places = [place for place in self.clusters.order if self.clusters.of[place] == number]
            within = self.overlaps.pooled[np.ix_(places, places)][np.triu_indices(len(places), 1)]
            rows.append(
                {
                    "cluster": number,
                    "images": [self.overlaps.images[place] for place in places],
                    "overlap": float(within.mean()) if len(within) else None,
                    "values": dict(Counter(self.values[place] for place in places if self.values).most_common()),
                }
            )
        return rows

    def report(self) -> dict[str, Any]:
        """All but the matrices, as plain JSON values; of connections and channels the first 100."""
        found: dict[str, Any] = {
            "images": len(self.overlaps.images),
            "layers": self.layer_rows(),
            "dense": {name: list(images) for name, images in self.overlaps.dense.items() if images},
            "silhouette": None if math.isnan(self.clusters.silhouette) else self.clusters.silhouette,
            "clusters": self.cluster_rows(),
            "separations": {name: _told(each) for name, each in self.separations.items()},
        }
        if self.distinctive is not None:
            found["distinctive"] = {
                "inside": len(self.distinctive.inside),
                "outside": len(self.distinctive.outside),
                "least": self.distinctive.least,
                "most": self.distinctive.most,
                "count": self.distinctive.count,
                "layers": {name: len(layer.places) for name, layer in self.distinctive.layers.items()},
                "connections": self.distinctive.connections(_MOST_REPORTED),
                "channels": self.distinctive.channels(_MOST_REPORTED),
            }
        versions = {name: version(name) for name in ("spade-fast", "torch", "numpy", "scipy", "scikit-learn")}
        return {**found, "settings": dict(self.settings), "versions": versions}

    def figure(self) -> Figure:
        """Heat map, layers and scores on one page: see :func:`spade_fast.charts.overlap_figure`."""
        from spade_fast.charts import overlap_figure

        return overlap_figure(self)

    def save(self, folder: str | os.PathLike[str]) -> dict[str, Path]:
        """Write ``overlap.png``, ``overlap.safetensors`` (the matrices), tables as CSV and last ``overlap.json``.

        Of connections ``connections.csv`` has the first 100,000. Each file is written whole or not at all, and none of
        an earlier comparison is left in the folder.

        Raises
        ------
        InvalidInputError
            If the folder cannot be made or a file cannot be written.
        MissingDependencyError
            If matplotlib is not installed.
        """
        png = io.BytesIO()
        self.figure().savefig(png, format="png", dpi=_PNG_DPI)
        matrices = {"pooled": self.overlaps.pooled}
        matrices |= {f"layer:{name}": matrix for name, matrix in self.overlaps.layers.items()}
        tensors = {name: torch.from_numpy(matrix) for name, matrix in matrices.items()}
        contents = {
            "overlap.png": png.getvalue(),
            "overlap.safetensors": tensor_bytes("spade_fast_overlap", {"images": list(self.overlaps.images)}, tensors),
            "images.csv": _csv(self._image_rows()),
            "layers.csv": _csv(map(_flat, self.layer_rows())),
        }
        if self.distinctive is not None:
            contents["connections.csv"] = _csv(map(_flat, self.distinctive.connections(_MOST_ROWS)))
            contents["channels.csv"] = _csv(self.distinctive.channels())
        report = json.dumps(self.report(), indent=2, allow_nan=False) + "\n"
        for name in ("overlap.json", "connections.csv", "channels.csv"):
            remove_file(Path(folder) / name)
        return write_folder(folder, {**contents, "overlap.json": report.encode()})

    def _image_rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for place, name in enumerate(self.overlaps.images):
            row: dict[str, Any] = {"image": name, "cluster": self.clusters.of[place]}
            row |= {"value": self.values[place]} if self.values else {}
            if self.inside:
                (found,) = self.separations.values()
                row |= {"inside": int(self.inside[place]), "score": float(found.scores[place])}
            rows.append(row)
        return rows


def compare(
    store: Store | str | os.PathLike[str],
    *,
    by: str | None = None,
    value: str | int | Sequence[str | int] | None = None,
    apart: str | None = None,
    names: Sequence[str] | None = None,
    layers: Sequence[str] | None = None,
    limit: int | None = None,
    count: int | None = None,
    least: float = 0.9,
    most: float = 0.1,
    seed: int = 0,
    progress: bool = False,
) -> TraceComparison:
    """Compare the traces of a store with one another, and those of a set of images with the rest.

    Parameters
    ----------
    store
        What :func:`spade_fast.run` wrote, or its folder.
    by
        What tells images apart: a label of the list that the store was made from ("folder" for a folder's subfolders),
        "target" for the class that was explained, or "answer" for the dense network's, where no label is called so.
    value
        Whose images make up the set: one value or several, of classes the name or the index. Default: no set, but each
        value against all others.
    apart
        A label that tells which photograph an image was made from: images of one are not compared with each other. An
        image without it is compared with all.
    names
        Which images. Default: all that have a trace.
    layers
        Names of layers or blocks: no others.
    limit
        Of the images, so many, drawn at random. Default: all.
    count
        How many clusters: see :func:`spade_fast.overlap.clusters`.
    least, most
        Of the distinctive connections: see :func:`spade_fast.overlap.distinctive`.
    seed
        Of all that is random.
    progress
        Show progress bars on stderr.

    Returns
    -------
    TraceComparison

    Raises
    ------
    InvalidInputError
        If a file is damaged, there is no such label, value or layer, there are too few images, or an argument cannot be
        used.
    MissingDependencyError
        If scikit-learn is not installed.
    """
    require("sklearn.metrics", "interpret")
    check_thresholds(least, most)
    check_whole("seed", seed, 0)
    store = store if isinstance(store, Store) else Store(store)
    chosen = known_images(store, names)
    if limit is not None and check_whole("limit", limit, 2) < len(chosen):
        drawn = sorted(chosen, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())[:limit]
        chosen = sorted(drawn)
    if value is not None and by is None:
        raise InvalidInputError(f"value={value!r} is one of what? pass by, the label that it is a value of")
    values = () if by is None else _values(store, chosen, by)
    given = value if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else [value]
    numbered = [str(each) if isinstance(each, int) else each for each in given]
    wanted = () if value is None else check_names("value", numbered)
    inside = _chosen(values, wanted, str(by), are_classes=by not in _labels(store, chosen)) if wanted else ()
    photographs = () if apart is None else _photographs(chosen, _values(store, chosen, apart))
    called = " or ".join(wanted)
    sets = _sets(values, inside, photographs, str(by), called)
    masks = read_masks(store, chosen, layers=layers, progress=progress)
    found = overlaps(masks, progress=progress)

    def told_apart(matrix: Matrix, of_set: Sequence[bool] | NDArray[np.bool_]) -> Separation:
        return separation(matrix, of_set, apart=photographs or None, seed=seed)

    return TraceComparison(
        overlaps=found,
        clusters=clusters(found.pooled, count),
        values=values,
        inside=inside,
        apart=photographs,
        separations={name: told_apart(found.pooled, each) for name, each in sets.items()},
        layers={name: told_apart(matrix, inside) for name, matrix in found.layers.items() if inside},
        sizes={
            name: told_apart(of_sizes(kept), inside)
            for name, kept in {ALL: found.kept_pooled, **found.kept}.items()
            if inside
        },
        distinctive=_distinctive(masks, inside, least, most),
        settings={
            "by": by,
            "value": list(wanted) or None,
            "apart": apart,
            "names": None if names is None else chosen,
            "layers": None if layers is None else list(layers),
            "limit": limit,
            "clusters": count,
            "least": least,
            "most": most,
            "seed": seed,
        },
    )


def _distinctive(masks: Masks, inside: Sequence[bool], least: float, most: float) -> Distinctive | None:
    if not inside:
        return None
    of_set = [name for name, chosen in zip(masks.images, inside, strict=True) if chosen]
    return distinctive(masks, of_set, least=least, most=most)


def _labels(store: Store, names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(key for name in names for key in store.records[name]["labels"]))


def _photographs(names: Sequence[str], values: Sequence[str]) -> tuple[str, ...]:
    """Of each image, the photograph: its own, where its label is empty."""
    return tuple(value or f"\0{name}" for name, value in zip(names, values, strict=True))


def _values(store: Store, names: Sequence[str], by: str) -> tuple[str, ...]:
    """Of each image, what it is told apart by."""
    records = [store.records[name] for name in names]
    labels = _labels(store, names)
    if not isinstance(by, str):
        raise InvalidInputError(f"{by!r} is no label: pass its name")
    if by in labels:
        return tuple(str(record["labels"].get(by, "")) for record in records)
    if by not in CLASSES:
        raise InvalidInputError(f"no image has a label {by!r}; nearest: {nearest(by, (*labels, *CLASSES))}")
    if by == "target":
        return tuple(_class(record["target"], record["target_name"]) for record in records)
    first = [record["answers"]["dense"][0] for record in records]
    return tuple(_class(each["index"], each["name"]) for each in first)


def _class(index: int, name: str | None) -> str:
    return str(index) if name is None or name == str(index) else f"{index} {name}"


def _chosen(values: Sequence[str], wanted: Sequence[str], by: str, *, are_classes: bool) -> tuple[bool, ...]:
    """Of each image, whether its value is wanted; classes go by their index and their name, too."""
    known: dict[str, set[str]] = {}  # what a value may be called
    for each in dict.fromkeys(values):
        index, _, name = each.partition(" ")
        for called in (each, index, name) if are_classes and name else (each,):
            known.setdefault(called, set()).add(each)
    for each in wanted:
        if each not in known:
            raise InvalidInputError(f"no image has {by} {each!r}; nearest: {nearest(each, dict.fromkeys(values))}")
    chosen = set().union(*(known[each] for each in wanted))
    return tuple(each in chosen for each in values)


def _sets(
    values: Sequence[str], inside: Sequence[bool], photographs: Sequence[str], by: str, called: str
) -> dict[str, NDArray[np.bool_]]:
    """The sets to be told from all other images, by name: that of the caller, or of each value with enough images."""
    apart = np.asarray(photographs if photographs else range(len(values)))
    if inside:
        check_set(np.asarray(inside), apart, "photographs" if photographs else "images")
        return {called: np.asarray(inside)}
    sets = {}
    for each in dict.fromkeys(values):
        of_value = np.asarray(values) == each
        if len(set(apart[of_value])) > 1 and len(set(apart[~of_value])) > 1:
            sets[each] = of_value
    if values and not sets:
        raise InvalidInputError(
            f"{by!r} tells no set of two images or more from two others: it has {len(set(values))} values for "
            f"{len(values)} images; choose another label"
        )
    return sets


def _told(found: Separation) -> dict[str, Any]:
    ranges = {"interval": list(found.interval), "random": list(found.random)}
    return {"auc": found.auc, **ranges, "by_chance": found.by_chance}


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row whose values are no mappings and no lists."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}_{name}": each for name, each in value.items()}
        elif key in ("interval", "random"):
            flat |= {f"{key}_low": value[0], f"{key}_high": value[1]}
        else:
            flat[key] = " ".join(map(str, value)) if isinstance(value, list) else value
    return flat


def _csv(rows: Iterable[Mapping[str, Any]]) -> bytes:
    found = list(rows)
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, list(dict.fromkeys(key for row in found for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return stream.getvalue().encode()
