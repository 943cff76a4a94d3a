"""The figure of an explanation. Drawn on matplotlib's objects alone: no pyplot, no backend, no global state."""

from __future__ import annotations

import functools
import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from spade_fast.attribution import METHODS
from spade_fast.errors import InvalidInputError, require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from spade_fast.explanation import Explanation, Prediction
    from spade_fast.traces import LayerTrace

# Dense and SPADE in a pair that colour-blind people tell apart (Okabe and Ito), by lightness as well.
DENSE, SPADE, _ASKED, _FAINT, TEXT, NOTE = "#8a8a8a", "#0072b2", "#d55e00", "#e9e9e9", "#1a1a1a", "#5a5a5a"
_NOTEBOOK_DPI = 72
COLOURS = "magma"  # perceptually uniform, ordered by lightness
_PERCENTILE = 99.5
_NAME_LENGTH = 26
_PER_ROW = 4  # methods side by side
_LAYER_NAMES_PER_INCH = 2.3

# Inches. Everything is placed by hand, so that photograph, predictions and maps share one grid.
_MARGIN, _HEAD, _SIDE, _GAP, _TITLE = 0.3, 0.5, 2.6, 0.1, 0.3
_ROW_LABELS, _SCALE, _SPARSITY_TITLE, _SPARSITY, _CAPTION = 0.5, 0.8, 0.8, 1.1, 0.55
_LETTER = 0.044  # height that one letter of a layer name takes, slanted as the names are
_SMALL_SIDE, _LEAST_WIDTH = 1.9, 5.0  # of a gallery
_PAIR = 2 * _SIDE + _GAP + _TITLE  # a row of dense and a row of SPADE maps under their titles


def explanation_figure(explanation: Explanation) -> Figure:
    """Draw an explanation on one page.

    On the left the photograph and the most probable classes of either network. Right of it a column for each method,
    the dense network's map above that of the trace, all in one colormap and each scaled from 0 to its own 99.5th
    percentile (maps of different networks and methods have different units). Below, the sparsity of every layer.

    Parameters
    ----------
    explanation
        What :func:`spade_fast.explain` returned.

    Returns
    -------
    matplotlib.figure.Figure
        Some 12 x 9 inches with three methods; ``figure.savefig(path)`` needs no display.

    Raises
    ------
    MissingDependencyError
        If matplotlib is not installed.
    """
    methods = list(explanation.dense)
    pairs = [methods[start : start + _PER_ROW] for start in range(0, len(methods), _PER_ROW)]
    width = 2 * _MARGIN + _SIDE + _ROW_LABELS + len(pairs[0]) * (_SIDE + _GAP) + _SCALE
    names_height = 0.15 + _LETTER * max(map(len, _layer_labels(explanation, width).values()), default=0)
    page = Page(
        width=width,
        height=_HEAD + len(pairs) * _PAIR + _SPARSITY_TITLE + _SPARSITY + names_height + _CAPTION,
    )
    model = explanation.settings.get("model", "the network")
    title = f"Evidence for “{shortened(explanation.target_name, 32)}” in {shortened(str(model), 32)}"
    page.text(_MARGIN, 0.33, title, fontsize=min(16, 105 * width / len(title)), weight="bold", color=TEXT)

    photo = page.axes(_MARGIN, _HEAD + _TITLE, _SIDE, _SIDE)
    photo.imshow(explanation.image.permute(1, 2, 0).clamp(0, 1).numpy())
    photo.set_axis_off()
    photo.set_title("Photograph", fontsize=11, color=TEXT)
    for index, (name, predictions, colour) in enumerate(
        (
            ("Dense network", explanation.dense_predictions, DENSE),
            ("SPADE trace", explanation.spade_predictions, SPADE),
        )
    ):
        half = (_SIDE + _GAP) / 2
        axes = page.axes(_MARGIN, _HEAD + _TITLE + _SIDE + 0.3 + index * half, _SIDE, half - 0.27)
        _draw_predictions(axes, f"{name} answers", predictions, explanation.target, colour)
    for index, pair in enumerate(pairs):
        _draw_maps(page, explanation, pair, _HEAD + index * _PAIR)
    _draw_scale(page)

    top = _HEAD + len(pairs) * _PAIR + _SPARSITY_TITLE
    _draw_sparsity(page, explanation, top)
    _draw_caption(page, methods)
    return page.figure


def gallery(explanations: Sequence[Explanation] | Mapping[str, Explanation]) -> Figure:
    """Draw several explanations below each other: of several images, or of one image by several traces.

    For each the photograph, and right of it a column for each method: the dense network's map above that of the trace.

    Parameters
    ----------
    explanations
        What :func:`spade_fast.explain` returned, of the same methods; by label, or labelled by their classes.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    InvalidInputError
        If there are none, or they are of different methods.
    MissingDependencyError
        If matplotlib is not installed.
    """
    from spade_fast.explanation import Explanation

    if isinstance(explanations, Mapping):
        labelled = [(str(label), explanation) for label, explanation in explanations.items()]
    elif isinstance(explanations, Sequence):
        labelled = [("", explanation) for explanation in explanations]
    else:
        raise InvalidInputError(
            f"gallery draws a list or mapping of explanations, got {type(explanations).__name__}: pass [it]"
        )
    if not labelled:
        raise InvalidInputError("no explanation to draw")
    first = labelled[0][1]
    for _, explanation in labelled:
        if not isinstance(explanation, Explanation):
            kind = type(explanation).__name__
            raise InvalidInputError(f"gallery draws what spade_fast.explain returns, got a {kind}")
        if list(explanation.dense) != list(first.dense):
            raise InvalidInputError(
                f"explanations are by different methods, {', '.join(first.dense)} and {', '.join(explanation.dense)}: "
                "use the same for all"
            )
    methods = list(first.dense)
    side = _SMALL_SIDE
    block = 2 * side + 2 * _GAP  # a photograph beside two rows of maps
    left = _MARGIN + side + _ROW_LABELS
    page = Page(
        width=max(left + len(methods) * (side + _GAP) + _SCALE + _MARGIN, _LEAST_WIDTH),
        height=_TITLE + 0.2 + len(labelled) * (block + _GAP) + _CAPTION,
    )
    for index, (label, explanation) in enumerate(labelled):
        top = _TITLE + 0.2 + index * (block + _GAP)
        photo = page.axes(_MARGIN, top, side, side)
        photo.imshow(explanation.image.permute(1, 2, 0).clamp(0, 1).numpy())
        photo.set_axis_off()
        lines = [
            *([(label, TEXT, "bold")] if label else []),
            (explanation.target_name, TEXT, "normal" if label else "bold"),
            *(
                (f"{name}: {100 * probability:.0f} %", colour, "normal")
                for name, probability, colour in (
                    ("dense", explanation.dense_probability, DENSE),
                    ("SPADE", explanation.spade_probability, SPADE),
                )
            ),
        ]
        for line, (text, colour, weight) in enumerate(lines):
            page.text(
                _MARGIN, top + side + 0.2 + 0.2 * line, shortened(text, 20), fontsize=9, color=colour, weight=weight
            )
        titles = index == 0
        _draw_maps(page, explanation, methods, top - _TITLE, left=left, side=side, titles=titles)
    _draw_scale(page, top=_TITLE + 0.2, height=2 * side + _GAP)
    _draw_caption(page, methods)
    return page.figure


def maps_caption(methods: Sequence[str]) -> str:
    """What maps by these methods show, and how they are scaled."""
    hiding = [METHODS[name].title for name in methods if name in METHODS and METHODS[name].reduction == "positive"]
    what = []
    if len(hiding) < len(methods):
        what.append("sum over colour channels of |attribution|")
    if hiding:
        what.append(f"{', '.join(hiding)}: what speaks for the class")
    return (
        f"Maps: {'; '.join(what)}. Brightness from 0 to each map's own 99.5th percentile; compare where maps are "
        "bright, not how bright."
    )


def _draw_caption(page: Page, methods: Sequence[str]) -> None:
    """What the maps show, at the foot of the page."""
    lines = textwrap.wrap(maps_caption(methods), int(page.width * 13))
    for index, line in enumerate(lines):
        page.text(_MARGIN, page.height - 0.15 - 0.17 * (len(lines) - 1 - index), line, fontsize=9, color=NOTE)


class Page:
    """A figure on which things are placed in inches from the upper left corner."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        shown = _shown(require("matplotlib.figure", "interpret").Figure)
        self.figure: Figure = shown(figsize=(width, height), facecolor="white")

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        bottom = self.height - top - height
        box = (left / self.width, bottom / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(box)

    def text(self, left: float, baseline: float, text: str, **style: Any) -> None:
        self.figure.text(left / self.width, 1 - baseline / self.height, text, parse_math=False, **style)


@functools.cache
def _shown(base: type[Figure]) -> type[Figure]:
    """A kind of figure that notebooks show, without pyplot, which would keep every one in memory."""

    class Shown(base):  # type: ignore[valid-type, misc]
        def _repr_jpeg_(self) -> bytes:
            jpeg = io.BytesIO()
            self.savefig(jpeg, format="jpeg", dpi=_NOTEBOOK_DPI, pil_kwargs={"quality": 88})
            return jpeg.getvalue()

    return Shown


def _draw_predictions(axes: Axes, title: str, predictions: Sequence[Prediction], target: int, colour: str) -> None:
    positions = range(len(predictions))
    axes.barh(positions, [1] * len(predictions), color=_FAINT, height=0.2)
    axes.barh(positions, [prediction.probability for prediction in predictions], color=colour, height=0.2)
    for position, prediction in enumerate(predictions):
        weight = "bold" if prediction.index == target else "normal"
        text: dict[str, Any] = {"fontsize": 8, "color": TEXT, "weight": weight, "va": "bottom", "parse_math": False}
        axes.text(0, position - 0.13, shortened(prediction.name, _NAME_LENGTH), **text)
        axes.text(1, position - 0.13, f"{100 * prediction.probability:.1f} %", ha="right", **text)
    axes.set(xlim=(0, 1), ylim=(max(len(predictions), 5) - 0.9, -0.9))
    axes.set_axis_off()
    axes.set_title(title, fontsize=10.5, weight="bold", color=colour, loc="left", pad=2)


def _draw_maps(
    page: Page,
    explanation: Explanation,
    methods: Sequence[str],
    top: float,
    *,
    left: float = _MARGIN + _SIDE + _ROW_LABELS,
    side: float = _SIDE,
    titles: bool = True,
) -> None:
    for row, (name, colour, maps) in enumerate(
        (("Dense", DENSE, explanation.dense), ("SPADE", SPADE, explanation.spade))
    ):
        for column, method in enumerate(methods):
            axes = page.axes(left + column * (side + _GAP), top + _TITLE + row * (side + _GAP), side, side)
            axes.imshow(scaled(maps[method]), cmap=COLOURS, vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if row == 0 and titles:
                title = METHODS[method].title if method in METHODS else method
                axes.set_title(shortened(title, _NAME_LENGTH), fontsize=11, color=TEXT, parse_math=False)
            if column == 0:
                axes.set_ylabel(name, fontsize=12, weight="bold", color=colour, labelpad=5)


def _draw_scale(page: Page, top: float = _HEAD + _TITLE, height: float = 2 * _SIDE + _GAP) -> None:
    axes = page.axes(page.width - _MARGIN - _SCALE + 0.1, top, 0.13, height)
    axes.imshow(np.linspace(1, 0, 256)[:, None], cmap=COLOURS, aspect="auto", extent=(0, 1, 0, 1))
    axes.set(xticks=[], yticks=[0, 0.5, 1])
    axes.yaxis.tick_right()
    axes.set_yticklabels(["0", "0.5", "1"], fontsize=9)
    axes.tick_params(length=0, colors=NOTE)
    axes.yaxis.set_label_position("right")
    axes.set_ylabel("share of the map's 99.5th percentile", fontsize=9, color=NOTE, labelpad=4)
    axes.spines[:].set_visible(False)


def _draw_sparsity(page: Page, explanation: Explanation, top: float) -> None:
    labels_width = 0.45
    width = page.width - 2 * _MARGIN - labels_width
    axes = page.axes(_MARGIN + labels_width, top, width, _SPARSITY)
    trace = explanation.trace
    order = _layer_order(explanation)
    pruned = [(position, trace.layers[name]) for position, name in enumerate(order) if name in trace.layers]
    dense = [position for position, name in enumerate(order) if name not in trace.layers]
    handles: list[Any] = []
    style: dict[str, Any]
    if pruned:
        positions, layers = zip(*pruned, strict=True)
        bars = axes.bar(positions, [layer.sparsity for layer in layers], color=SPADE, width=0.7, label="pruned")
        handles.append(bars)
        differing = [pair for pair in pruned if _differs(pair[1])]
        if differing:
            positions, layers = zip(*differing, strict=True)
            style = {"marker": "_", "color": _ASKED, "linewidths": 2, "s": 60, "label": "asked for"}
            handles.append(axes.scatter(positions, [layer.requested_sparsity for layer in layers], zorder=3, **style))
    if dense:
        style = {"facecolors": "white", "edgecolors": DENSE, "s": 18, "linewidths": 1.1, "label": "left dense"}
        handles.append(axes.scatter(dense, [0] * len(dense), zorder=3, clip_on=False, **style))
    names = _layer_labels(explanation, page.width)
    slanted: dict[str, Any] = {
        "rotation": 45,
        "ha": "right",
        "rotation_mode": "anchor",
        "fontsize": 8,
        "parse_math": False,
    }
    axes.set_xticks(list(names), list(names.values()), **slanted)
    axes.set(xlim=(-0.8, max(len(order), 1) - 0.2), ylim=(0, 1), yticks=[0, 0.5, 1])
    axes.set_yticklabels(["0", "50 %", "100 %"], fontsize=9)
    axes.tick_params(length=0, colors=NOTE, pad=5)
    axes.grid(axis="y", color=_FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    share = f"{100 * trace.sparsity:.0f} % of the weights in {len(pruned)}" if pruned else "none"
    title = f"Pruned: {share} of {len(order)} layers"
    axes.set_title(title, loc="left", x=-labels_width / width, pad=12, fontsize=11, weight="bold", color=TEXT)
    place: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1.01, 1.03), "borderaxespad": 0.2}
    axes.legend(handles=handles, **place, ncols=3, columnspacing=1, handletextpad=0.4, frameon=False, fontsize=9)


def _layer_order(explanation: Explanation) -> tuple[str, ...]:
    return explanation.layer_order or (*explanation.trace.layers, *explanation.trace.dense)


def _layer_labels(explanation: Explanation, width: float) -> dict[int, str]:
    """Names for as many layers as there is room for, evenly spread, by position."""
    order = _layer_order(explanation)
    step = math.ceil(len(order) / (_LAYER_NAMES_PER_INCH * width)) or 1
    return {place: shortened(order[place], 22, keep_end=True) for place in range(0, len(order), step)}


def _differs(layer: LayerTrace) -> bool:
    """Whether a layer's sparsity is visibly other than asked for; one weight, the finest step there is, is not."""
    return abs(layer.sparsity - layer.requested_sparsity) > max(0.005, 1 / layer.mask.numel())


def scaled(heat: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The map in units of its 99.5th percentile (of its maximum where that is zero), cut off at 1."""
    values = heat.to(torch.float32).numpy()
    top = float(np.percentile(values, _PERCENTILE)) or float(values.max(initial=0)) or 1.0
    return np.clip(values / top, 0, 1).astype(np.float32)


def shortened(name: str, length: int, *, keep_end: bool = False) -> str:
    """The name in at most `length` characters. The end of a layer's name tells most, the beginning of a class's."""
    if len(name) <= length:
        return name
    return "…" + name[1 - length :] if keep_end else name[: length - 1] + "…"
