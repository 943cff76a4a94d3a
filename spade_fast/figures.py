"""The figure of an explanation. Drawn on matplotlib's objects alone: no pyplot, no backend, no global state."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from spade_fast.attribution import METHODS
from spade_fast.errors import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

    from spade_fast.explanation import Explanation, Prediction

# Dense and SPADE in a pair that colour-blind people tell apart (Okabe and Ito), by lightness as well.
_DENSE, _SPADE, _FAINT, _TEXT, _NOTE = "#8a8a8a", "#0072b2", "#e9e9e9", "#1a1a1a", "#5a5a5a"
_COLOURS = "magma"  # perceptually uniform, ordered by lightness
_PERCENTILE = 99.5
_NAME_LENGTH = 26
_PER_ROW = 4  # methods side by side
_PANEL, _LEFT, _BOTTOM = 2.45, 3.6, 2.35  # inches: a map with its margins, the left column, the sparsity chart
_MOST_LAYER_NAMES = 26


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
        Some 12 x 8 inches with three methods; ``figure.savefig(path)`` needs no display.

    Raises
    ------
    MissingDependencyError
        If matplotlib is not installed.
    """
    methods = list(explanation.dense)
    blocks = [methods[start : start + _PER_ROW] for start in range(0, len(methods), _PER_ROW)]
    columns = max(len(blocks[0]), 2)  # a single column would leave the chart below too narrow for its names
    maps_height = 2 * _PANEL * len(blocks) + 0.35
    size = (_LEFT + _PANEL * columns + 0.5, maps_height + _BOTTOM + 0.55)
    figure: Figure = require("matplotlib.figure", "interpret").Figure(
        figsize=size, layout="constrained", facecolor="white"
    )
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0.02, hspace=0.02)
    upper, lower = figure.subfigures(2, 1, height_ratios=(maps_height + 0.3, _BOTTOM))
    left, right = upper.subfigures(1, 2, width_ratios=(_LEFT, size[0] - _LEFT))
    _draw_photo_and_predictions(left, explanation)
    _draw_maps(right, explanation, blocks, columns)
    _draw_sparsity(lower, explanation)
    return figure


def _draw_photo_and_predictions(page: SubFigure, explanation: Explanation) -> None:
    photo, dense, spade = page.subplots(3, 1, height_ratios=(2.1, 1, 1))
    photo.imshow(explanation.image.permute(1, 2, 0).clamp(0, 1).numpy())
    photo.set_axis_off()
    name = "\n".join(textwrap.wrap(_shortened(explanation.target_name, 40), 24))
    photo.set_title(f"What counts for “{name}”?", fontsize=13, weight="bold", color=_TEXT, parse_math=False)
    _draw_predictions(dense, "Dense network", explanation.dense_predictions, explanation.target, _DENSE)
    _draw_predictions(spade, "SPADE trace", explanation.spade_predictions, explanation.target, _SPADE)


def _draw_predictions(axes: Axes, title: str, predictions: Sequence[Prediction], target: int, colour: str) -> None:
    positions = range(len(predictions))
    axes.barh(positions, [1] * len(predictions), color=_FAINT, height=0.34)
    axes.barh(positions, [prediction.probability for prediction in predictions], color=colour, height=0.34)
    for position, prediction in enumerate(predictions):
        weight = "bold" if prediction.index == target else "normal"
        text = {"fontsize": 8.5, "color": _TEXT, "weight": weight, "va": "bottom", "parse_math": False}
        axes.text(0, position - 0.2, _shortened(prediction.name, _NAME_LENGTH), **text)
        axes.text(1, position - 0.2, f"{100 * prediction.probability:.1f} %", ha="right", **text)
    axes.set(xlim=(0, 1), ylim=(len(predictions) - 0.7, -0.85))
    axes.set_axis_off()
    axes.set_title(title, fontsize=11, weight="bold", color=colour, loc="left")


def _draw_maps(page: SubFigure, explanation: Explanation, blocks: Sequence[Sequence[str]], columns: int) -> None:
    grid = page.subplots(2 * len(blocks), columns, squeeze=False)
    shown = None
    for block, methods in enumerate(blocks):
        for row, (arm, colour, maps) in enumerate(
            (("Dense", _DENSE, explanation.dense), ("SPADE", _SPADE, explanation.spade)), start=2 * block
        ):
            for axes, method in zip(grid[row], methods, strict=False):
                shown = axes.imshow(_scaled(maps[method]), cmap=_COLOURS, vmin=0, vmax=1)
                if row == 2 * block:
                    title = METHODS[method].title if method in METHODS else method
                    axes.set_title(_shortened(title, _NAME_LENGTH), fontsize=11, color=_TEXT, parse_math=False)
            grid[row][0].set_ylabel(arm, fontsize=12, weight="bold", color=colour)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set_visible(False)
        if not axes.images:
            axes.set_axis_off()
    bar = page.colorbar(shown, ax=grid, ticks=[0, 0.5, 1], fraction=0.03, pad=0.015, aspect=40 * len(blocks))
    bar.ax.set_yticklabels(["0", "half", "max"], fontsize=8.5, color=_NOTE)
    bar.outline.set_visible(False)


def _draw_sparsity(page: SubFigure, explanation: Explanation) -> None:
    trace = explanation.trace
    axes = page.subplots()
    order = explanation.layer_order or (*trace.layers, *trace.dense)
    pruned = [(position, trace.layers[name]) for position, name in enumerate(order) if name in trace.layers]
    dense = [position for position, name in enumerate(order) if name not in trace.layers]
    handles: list[Any] = []
    if pruned:
        positions = [position for position, _ in pruned]
        achieved = [layer.sparsity for _, layer in pruned]
        handles.append(axes.bar(positions, achieved, color=_SPADE, width=0.7, label="pruned"))
        # A whole weight is the finest step there is, so what rounding does is no difference.
        differing = [
            (position, layer.requested_sparsity)
            for position, layer in pruned
            if abs(layer.sparsity - layer.requested_sparsity) > max(0.005, 1 / layer.mask.numel())
        ]
        if differing:
            where, requested = zip(*differing, strict=True)
            style = {"marker": "_", "color": "#d55e00", "linewidths": 2, "s": 60, "label": "asked for"}
            handles.append(axes.scatter(where, requested, zorder=3, **style))
    if dense:
        style = {"facecolors": "white", "edgecolors": _DENSE, "s": 16, "linewidths": 1, "label": "left dense"}
        handles.append(axes.scatter(dense, [0] * len(dense), zorder=3, clip_on=False, **style))
    step = -(-len(order) // _MOST_LAYER_NAMES) or 1
    labels = [_shortened(name, _NAME_LENGTH, keep_end=True) for name in order[::step]]
    axes.set_xticks(range(0, len(order), step), labels, rotation=45, ha="right", rotation_mode="anchor", fontsize=7.5)
    axes.set(xlim=(-0.8, max(len(order), 1) - 0.2), ylim=(0, 1), yticks=[0, 0.5, 1])
    axes.set_yticklabels(["0", "50 %", "100 %"], fontsize=8.5)
    axes.tick_params(length=0, colors=_NOTE)
    axes.grid(axis="y", color=_FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)
    share = f"{100 * trace.sparsity:.0f} % of the weights of {len(pruned)} layers" if pruned else "no layer"
    axes.set_title(
        f"Pruned by SPADE: {share}, {len(dense)} left dense", loc="left", fontsize=11, weight="bold", color=_TEXT
    )
    axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 0.98), ncols=3, frameon=False, fontsize=8.5)
    caption = (
        "Maps: sum over colour channels of |attribution|; brightness from 0 to the map's own 99.5th percentile, so "
        "brightness is not comparable between maps."
    )
    axes.annotate(caption, (0, 0))


def _scaled(heat: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The map in units of its 99.5th percentile (of its maximum where that is zero), cut off at 1."""
    values = heat.to(torch.float32).numpy()
    top = float(np.percentile(values, _PERCENTILE)) or float(values.max(initial=0)) or 1.0
    return np.clip(values / top, 0, 1).astype(np.float32)


def _shortened(name: str, length: int, *, keep_end: bool = False) -> str:
    """The name in at most `length` characters. The end of a layer's name tells most, the beginning of a class's."""
    if len(name) <= length:
        return name
    return "…" + name[1 - length :] if keep_end else name[: length - 1] + "…"
