"""Reports: explanations as one HTML page, for people who have a browser and nothing else."""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from spade_fast import metrics
from spade_fast.cases import make_case
from spade_fast.errors import InvalidInputError, require
from spade_fast.explanation import Explanation, Prediction
from spade_fast.figures import maps_caption
from spade_fast.files import write_whole
from spade_fast.images import decoded_image, read_image_file
from spade_fast.imagesets import listed_images
from spade_fast.markup import rendered
from spade_fast.methods import METHODS
from spade_fast.models import LoadedModel
from spade_fast.pictures import heat_map, photograph
from spade_fast.preprocessing import Preprocess
from spade_fast.readonly import ReadOnlyMappings
from spade_fast.store import Store, StoredImage
from spade_fast.traces import Trace
from spade_fast.visualization import Visualization

#: Image files: a folder, a manifest, paths, or paths by names.
Photographs: TypeAlias = (
    str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Mapping[str, str | os.PathLike[str]]
)

_ENDINGS = (".html", ".htm")
_NETWORKS = {"dense": "Dense network", "spade": "SPADE trace"}
_LARGE = 200_000_000  # bytes
# By how much the probability of a class may differ between networks that are the same one, on other devices.
_SAME_PROBABILITY = 0.01
# Longest sides in pixels: of a few images, and of many, whose page would be too large for mail.
_FEW = 12
_SIDE, _SIDE_OF_MANY, _MAP_OF_MANY, _THUMBNAIL = 512, 224, 112, 96
# A bar on a logarithmic scale begins below the smallest value, which would have none otherwise.
_LEAST_BAR = 0.03


@dataclass(frozen=True)
class ReportSummary(ReadOnlyMappings):
    """What a report shows.

    Attributes
    ----------
    path
        The page.
    images
        That it shows.
    left_out
        Images of a store that it does not show, by name: why.
    without_photograph
        Those whose photograph it does not show though photographs were given: why.
    """

    path: Path
    images: int
    left_out: Mapping[str, str]
    without_photograph: Mapping[str, str]


def write_report(
    what: Explanation | Sequence[Explanation] | Mapping[str, Explanation] | Store | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    model: nn.Module | LoadedModel | None = None,
    preprocess: Callable[[Tensor], Tensor] | None = None,
    photographs: Photographs | None = None,
    visualizations: Visualization | Sequence[Visualization] | Mapping[str, Any] | None = None,
    title: str | None = None,
    progress: bool = False,
) -> ReportSummary:
    """Write one HTML page about one image or many: photographs, answers, maps, what was pruned, how it was made.

    The page needs no other file, no network and no Python; everything but sliders, filter and sorting works without
    JavaScript as well. Of up to 12 images photographs and maps have at most 512 pixels a side, of more photographs
    224 and maps 112.

    Parameters
    ----------
    what
        What :func:`spade_fast.explain` returned; several of them, by name or in a list; or a store
        (:class:`spade_fast.Store`, or the folder that :func:`spade_fast.run` wrote), whose images that cannot be shown
        are listed with their reasons.
    path
        The page, a name that ends in ``.html``. A file of that name is replaced.
    model
        Of explanations: the network that they are of. If it is given, insertion curves are measured
        (:func:`spade_fast.metrics.insertion`). Of a store its records' metrics are shown.
    preprocess
        As in :func:`spade_fast.explain`; for `model` alone.
    photographs
        Of a store, which holds none: the images that `run` was given, as folder, manifest, paths, or paths by names.
        Files that have changed since are left out. Default: the page shows maps without photographs.
    visualizations
        What :func:`spade_fast.visualize` returned, one or several: of one explanation; of several images by name.
        The last image of each network is shown.
    title
        Heading of the page. Default: by what it is about.
    progress
        Show progress bars on stderr.

    Returns
    -------
    ReportSummary
        What the page shows, and what it does not.

    Raises
    ------
    InvalidInputError
        For arguments that cannot be used, a model that answers otherwise than the explanation says, a store of which no
        image can be shown, and a page that cannot be written.
    MissingDependencyError
        If jinja2 or matplotlib is not installed.

    Warns
    -----
    UserWarning
        If the page is so large that few browsers open it.
    """
    path = check_page(path)
    if title is not None and not isinstance(title, str):
        raise InvalidInputError(f"title must be a text, got {title!r}")
    source = Store(what) if isinstance(what, (str, os.PathLike)) else what
    if isinstance(source, Store):
        if model is not None or preprocess is not None:
            raise InvalidInputError("model and preprocess are for explanations: of a store metrics are shown as run")
        page = _store_page(source, photographs, visualizations, progress)
    else:
        if photographs is not None:
            raise InvalidInputError("photographs is for a store: an explanation holds its own")
        if preprocess is not None and model is None:
            raise InvalidInputError("preprocess is for model, which is not given: pass both or none")
        page = _explanations_page(source, model, preprocess, visualizations, progress)
    if title is not None:
        page["title"] = title
    content = rendered("report", page).encode()
    if len(content) > _LARGE:
        warnings.warn(
            f"the page has {len(content) / 1e6:.0f} MB, which few browsers open: report on fewer than its "
            f"{len(page['sections'])} images",
            stacklevel=2,
        )
    write_whole(path, content)
    return ReportSummary(path, len(page["sections"]), page["left_out"], page["unseen"])


def check_page(path: str | os.PathLike[str]) -> Path:
    """Refuse what a report cannot be written to, and what it cannot be made without, before anything takes long."""
    if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
        raise InvalidInputError(f"{path!r} is no name of a page: pass one such as report.html")
    if os.path.isdir(path):
        raise InvalidInputError(f"{os.fspath(path)!r} is a folder: name a page in it, such as report.html")
    if Path(path).suffix.lower() not in _ENDINGS:
        raise InvalidInputError(f"{os.fspath(path)!r} is no name of a page: let it end in .html")
    require("jinja2", "interpret")
    require("matplotlib", "interpret")
    return Path(path)


# What there is to tell


@dataclass(frozen=True, kw_only=True, eq=False)
class _Subject:
    """What is known of an image, wherever it comes from; networks are called "dense" and "spade"."""

    name: str
    pixels: Tensor | None
    target: int
    target_name: str
    probability: Mapping[str, float]
    answers: Mapping[str, Sequence[Prediction]]
    maps: Mapping[str, Mapping[str, Tensor]]  # by network and method
    trace: Trace
    layer_order: Sequence[str]
    areas: Mapping[str, Mapping[str, Mapping[str, float]]]  # by metric, network and method
    curves: Mapping[str, Mapping[str, str]]  # of insertion, by method and network
    labels: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    visualizations: Sequence[Visualization] = ()


def _explanations_page(
    source: object,
    model: nn.Module | LoadedModel | None,
    preprocess: Callable[[Tensor], Tensor] | None,
    visualizations: object,
    progress: bool,
) -> dict[str, Any]:
    named = _named(source)
    drawn = _drawn(visualizations, list(named), single=isinstance(source, Explanation))
    subjects = (
        _of_explanation(name, each, model, preprocess, drawn.get(name, ()), progress)
        for name, each in tqdm(named.items(), "report", disable=not progress or len(named) == 1, leave=False)
    )
    sections = _sections(subjects, len(named))
    first = next(iter(named.values()))
    names = list(dict.fromkeys(str(each.settings.get("model", "the network")) for each in named.values()))
    title = f"{len(named)} explanation{'' if len(named) == 1 else 's'} of {', '.join(names)}"
    settings = [("Versions", _flat(first.report()["versions"]))]
    if isinstance(source, Explanation):
        title = f"Evidence for “{first.target_name}” in {names[0]}"
        settings = [*sections[0]["settings"], *settings]
        sections[0]["settings"] = []
    return {
        "title": title,
        "overview": None if isinstance(source, Explanation) else _overview(sections),
        "sections": sections,
        "settings": settings,
        "left_out": {},
        "unseen": {},
    }


def _named(source: object) -> dict[str, Explanation]:
    if isinstance(source, Explanation):
        return {"": source}
    if isinstance(source, Mapping):
        named = {str(name): each for name, each in source.items()}
        if len(named) < len(source):
            raise InvalidInputError("two explanations have the same name as text: name them otherwise")
    elif isinstance(source, Sequence) and not isinstance(source, bytes):
        named = {f"Image {place}": each for place, each in enumerate(source, 1)}
    else:
        raise InvalidInputError(
            f"a report is about explanations or a store, got {type(source).__name__}: pass what explain returned"
        )
    if not named:
        raise InvalidInputError("no explanation to report on")
    for name, each in named.items():
        if not isinstance(each, Explanation):
            raise InvalidInputError(f"{name!r} is a {type(each).__name__}: pass what spade_fast.explain returned")
    return named


def _drawn(visualizations: object, names: Sequence[str], *, single: bool) -> dict[str, Sequence[Visualization]]:
    """The visualizations by image."""
    if visualizations is None:
        return {}
    if single:
        given = {"": visualizations}
    elif isinstance(visualizations, Mapping):
        given = dict(visualizations)
    else:
        raise InvalidInputError("visualizations of several images: pass a mapping by their names")
    if unknown := next((name for name in given if name not in names), None):
        raise InvalidInputError(f"visualizations are of {unknown!r}, which the report is not about: leave it out")
    found: dict[str, Sequence[Visualization]] = {}
    for name, value in given.items():
        several = (value,) if isinstance(value, Visualization) else value
        if not isinstance(several, Sequence) or not all(isinstance(each, Visualization) for each in several):
            raise InvalidInputError(
                f"visualizations must be what spade_fast.visualize returned, got a {type(value).__name__}"
            )
        found[name] = several
    return found


def _of_explanation(
    name: str,
    explanation: Explanation,
    model: nn.Module | LoadedModel | None,
    preprocess: Callable[[Tensor], Tensor] | None,
    visualizations: Sequence[Visualization],
    progress: bool,
) -> _Subject:
    maps = {"dense": explanation.dense, "spade": explanation.spade}
    areas: dict[str, dict[str, dict[str, float]]] = {}
    curves: dict[str, dict[str, str]] = {}
    if model is not None and explanation.dense:
        case = make_case(model, explanation.image, target=explanation.target, preprocess=preprocess)
        probability = case.scores.softmax(dim=0)[case.target].item()
        if abs(probability - explanation.dense_probability) > _SAME_PROBABILITY:
            raise InvalidInputError(
                f"model gives {explanation.target_name!r} a probability of {probability:.3f}, and the network of the "
                f"explanation {name!r} gave it {explanation.dense_probability:.3f}: pass that network"
            )
        keys = [(network, method) for network, found in maps.items() for method in found]
        stack = torch.stack([maps[network][method] for network, method in keys])
        measured = metrics.insertion(model, case.inputs, stack, case.target, progress=progress)
        areas["insertion"] = {network: {} for network in maps}
        for (network, method), line, area in zip(keys, measured.probabilities, measured.auc.tolist(), strict=True):
            areas["insertion"][network][method] = area
            curves.setdefault(method, {})[network] = _points(measured.shares, line)
    return _Subject(
        name=name,
        pixels=explanation.image,
        target=explanation.target,
        target_name=explanation.target_name,
        probability={"dense": explanation.dense_probability, "spade": explanation.spade_probability},
        answers={"dense": explanation.dense_predictions, "spade": explanation.spade_predictions},
        maps=maps,
        trace=explanation.trace,
        layer_order=explanation.layer_order,
        areas=areas,
        curves=curves,
        settings={
            "Explanation": explanation.settings,
            "Trace": explanation.trace.settings,
            "Insertion": {"steps": metrics.STEPS, "into": "the image, blurred"} if curves else {},
        },
        visualizations=visualizations,
    )


def _store_page(
    store: Store, photographs: Photographs | None, visualizations: object, progress: bool
) -> dict[str, Any]:
    drawn = _drawn(visualizations, list(store), single=False)
    left_out = {**store.refused, **store.damaged}
    files = {} if photographs is None else {each.name: each.path for each in listed_images(photographs)}
    if files and files.keys().isdisjoint(store):
        raise InvalidInputError(
            f"none of {len(files)} photographs is called as an image of the store, such as {next(iter(files))!r}: pass "
            "what run was given"
        )
    unseen: dict[str, str] = {}

    def subjects() -> Iterator[_Subject]:
        for name in tqdm(list(store), "report", disable=not progress, leave=False):
            try:
                stored = store[name]
            except InvalidInputError as error:
                left_out[name] = str(error)
                continue
            pixels = None
            if photographs is not None:
                try:
                    pixels = _seen(files.get(name), stored, store)
                except InvalidInputError as error:
                    unseen[name] = str(error)
            yield _of_stored(name, stored, pixels, drawn.get(name, ()))

    sections = _sections(subjects(), len(store))
    if not sections:
        why = next(iter(left_out.values()), "it is empty")
        raise InvalidInputError(f"no image of {os.fspath(store.path)!r} can be shown ({why})")
    count = f"{len(sections)} image{'' if len(sections) == 1 else 's'}"
    return {
        "title": f"{count}, explained by {store.settings.get('model', 'a network')}",
        "overview": _overview(sections),
        "sections": sections,
        "settings": [
            ("Settings", _flat(store.settings)),
            ("Versions", _flat(store.manifest["environment"])),
        ],
        "left_out": left_out,
        "unseen": unseen,
    }


def _seen(file: Path | None, stored: StoredImage, store: Store) -> Tensor:
    """The pixels that the network saw of a photograph, if it is still the one that was explained."""
    if file is None:
        raise InvalidInputError("the photographs that were given have none of this name")
    content = read_image_file(file)
    if hashlib.sha256(content).hexdigest() != stored.record.get("image_sha256"):
        raise InvalidInputError(f"{os.fspath(file)!r} is another photograph than the one that was explained")
    return Preprocess.from_dict(store.settings["preprocess"]).view(decoded_image(content, file))


def _of_stored(
    name: str, stored: StoredImage, pixels: Tensor | None, visualizations: Sequence[Visualization]
) -> _Subject:
    record = stored.record
    return _Subject(
        name=name,
        pixels=pixels,
        target=record["target"],
        target_name=_class(record["target"], record["target_name"]),
        probability=record["probability"],
        answers={
            network: [
                Prediction(each["index"], _class(each["index"], each["name"]), each["probability"]) for each in of
            ]
            for network, of in record["answers"].items()
        },
        maps={"dense": stored.dense, "spade": stored.spade},
        trace=stored.trace,
        layer_order=(),
        areas=record.get("metrics", {}),
        curves={},
        labels=record["labels"],
        visualizations=visualizations,
    )


def _class(index: int, name: str | None) -> str:
    return f"class {index}" if name is None else name


# What the page's templates are given


def _sections(subjects: Iterator[_Subject], count: int) -> list[dict[str, Any]]:
    return [_section(f"image-{place}", subject, few=count <= _FEW) for place, subject in enumerate(subjects, 1)]


def _section(identity: str, subject: _Subject, *, few: bool) -> dict[str, Any]:
    dense, spade = subject.maps["dense"], subject.maps["spade"]
    longest, of_maps = (_SIDE, _SIDE) if few else (_SIDE_OF_MANY, _MAP_OF_MANY)
    thumbnail = None
    if subject.pixels is not None:
        thumbnail = photograph(subject.pixels, _THUMBNAIL)
    elif spade:
        thumbnail = heat_map(next(iter(spade.values())), _THUMBNAIL)
    trace = subject.trace
    answer = subject.answers["spade"][0]
    known = [subject.name, subject.target_name, *(each[0].name for each in subject.answers.values())]
    return {
        "id": identity,
        "name": subject.name,
        "target": subject.target,
        "target_name": subject.target_name,
        "networks": [
            {"key": key, "name": name, "probability": subject.probability[key], "answers": subject.answers[key]}
            for key, name in _NETWORKS.items()
        ],
        "agrees": answer.index == subject.target,
        "labels": subject.labels,
        "search": " ".join([*known, *subject.labels.values()]),
        "thumbnail": thumbnail,
        "photograph": None if subject.pixels is None else photograph(subject.pixels, longest),
        "methods": [
            {
                "title": _title(method),
                "maps": [(_NETWORKS[key], heat_map(subject.maps[key][method], of_maps)) for key in _NETWORKS],
            }
            for method in dense
        ],
        "caption": maps_caption(list(dense)),
        "areas": _areas(subject.areas),
        "curves": [
            {
                "title": _title(method),
                "lines": lines,
                "areas": [subject.areas["insertion"][key][method] for key in lines],
            }
            for method, lines in subject.curves.items()
        ],
        "sparsity": trace.sparsity,
        "layers": trace.rows(),
        "left_dense": trace.dense,
        **_chart(subject),
        "visualizations": [_visualized(each, longest) for each in subject.visualizations],
        "settings": [(heading, _flat(values)) for heading, values in subject.settings.items() if values]
        + [(f"Visualization of {each.name}", _flat(_of_itself(each.settings))) for each in subject.visualizations],
    }


def _title(method: str) -> str:
    return METHODS[method].title if method in METHODS else method


def _areas(areas: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[dict[str, Any]]:
    """A row for each method by each metric."""
    return [
        {
            "metric": metric,
            "method": method,
            "title": _title(method),
            "dense": of["dense"][method],
            "spade": of["spade"][method],
        }
        for metric, of in areas.items()
        for method in of["dense"]
    ]


def _points(shares: Tensor, probabilities: Tensor) -> str:
    """A curve [points] as SVG has it, in a square of side 1 whose y axis points down."""
    pairs = zip(shares.tolist(), probabilities.tolist(), strict=True)
    return " ".join(f"{x:.4f},{1 - y:.4f}" for x, y in pairs)


def _chart(subject: _Subject) -> dict[str, Any]:
    """Bars of all layers, in order; the losses' on a logarithmic scale, between powers of ten."""
    trace = subject.trace
    losses = [layer.loss for layer in trace.layers.values() if layer.loss > 0]
    low = math.floor(math.log10(min(losses))) if losses else 0
    high = max(math.ceil(math.log10(max(losses))) if losses else 1, low + 1)

    def height(loss: float) -> float:
        return max((math.log10(loss) - low) / (high - low), _LEAST_BAR) if loss > 0 else 0

    # A store does not say where in the network the layers left dense are.
    named = [(name, trace.layers.get(name)) for name in subject.layer_order or trace.layers]
    bars = [{"layer": name, "pruned": layer, "height": height(layer.loss) if layer else 0} for name, layer in named]
    return {"bars": bars, "decades": (low, high)}


def _visualized(found: Visualization, longest: int) -> dict[str, Any]:
    arms = {"Dense network": found.dense}
    for number, images in enumerate(found.spade, 1):
        arms["SPADE trace" if len(found.spade) == 1 else f"SPADE trace {number}"] = images
    return {
        "name": found.name,
        "layer": found.layer,
        "steps": found.thresholds[-1],
        "pictures": [(arm, photograph(images[-1], longest)) for arm, images in arms.items()],
    }


def _of_itself(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a visualization's settings say beside those of its traces, which stand elsewhere."""
    return {name: value for name, value in settings.items() if name != "traces"}


def _flat(values: Mapping[str, Any], of: str = "") -> list[tuple[str, str]]:
    """Settings as rows of a table: names of nested ones are joined by dots."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            rows += _flat(value, f"{of}{key}.")
        else:
            rows.append((f"{of}{key}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
    return rows


def _overview(sections: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over images."""
    areas: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for section in sections:
        for row in section["areas"]:
            areas.setdefault((row["metric"], row["method"]), []).append((row["dense"], row["spade"]))
    return {
        "agreeing": sum(section["agrees"] for section in sections),
        "sparsity": sum(section["sparsity"] for section in sections) / len(sections),
        "areas": [
            {
                "metric": metric,
                "title": _title(method),
                "images": len(pairs),
                "dense": sum(dense for dense, _ in pairs) / len(pairs),
                "spade": sum(spade for _, spade in pairs) / len(pairs),
            }
            for (metric, method), pairs in areas.items()
        ],
    }
