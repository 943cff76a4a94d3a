"""Charts of evaluations, tunings and comparisons of traces, drawn on matplotlib's objects alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from spade_fast.attribution import METHODS
from spade_fast.comparison import MEAN, MOST_COLUMNS, TITLES, Comparison, Evaluation, Metric
from spade_fast.errors import require
from spade_fast.figures import NOTE, TEXT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    from spade_fast.trace_comparison import TraceComparison
    from spade_fast.tuning import Tuning

# Okabe and Ito's colours, which colour-blind people tell apart; in this order by lightness as well.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#1a1a1a")
_GRID, _OTHER = "#e9e9e9", "#c8c8c8"
_HEAT = "magma_r"  # dark where overlaps are large; ordered by lightness
# More images or values have no names beside them, and of more layers only some have.
_MOST_NAMES, _MOST_LAYERS, _NAME_LENGTH = 48, 80, 28
_WIDTH, _ROW, _HEAD = 5.2, 0.42, 1.5  # inches: of a panel, of a method, of titles and axis


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches."""
    figure: Figure = require("matplotlib.figure", "interpret").Figure(figsize=(width, height), layout="constrained")
    return figure


def comparison_figure(evaluation: Evaluation) -> Figure:
    """Draw by how much each arm differs from the first: a panel for each metric, a row for each method.

    Dots are means over images, lines the intervals that hold 95 % of bootstrap means. Beside each method stands the
    mean of the first arm. More arms than there are colours have a row each, and each method a panel.

    Raises
    ------
    MissingDependencyError
        If matplotlib is not installed.
    """
    rows = evaluation.compare()
    names = list(dict.fromkeys(row.method for row in rows))
    others = evaluation.arms[1:]
    if len(others) > MOST_COLUMNS:
        return _figure_of_many(evaluation, {(row.metric, row.method, row.arm): row for row in rows}, names)
    height = _HEAD + len(names) * max(_ROW, 0.13 * len(others) + 0.16)
    figure = new_figure(_WIDTH * len(evaluation.values) + 1.2, height)
    panels = figure.subplots(1, len(evaluation.values), squeeze=False)[0]
    for metric, axes in zip(evaluation.values, panels, strict=True):
        of_metric = {(row.method, row.arm): row for row in rows if row.metric == metric}
        for position, arm in enumerate(others):
            places = [i + 0.7 * ((position + 0.5) / len(others) - 0.5) for i in range(len(names))]
            _draw_differences(axes, [of_metric[name, arm] for name in names], places, COLOURS[position], label=arm)
        first = {name: of_metric[name, evaluation.arms[0]].mean for name in names}
        _label(axes, [f"{_title(name)}  {first[name]:.1f}" for name in names], bold=MEAN in names)
        better = "left" if metric == "deletion" else "right"
        axes.set_title(f"{TITLES[metric]}: {better} is better", fontsize=11, color=TEXT)
        axes.set_xlabel(f"points above {evaluation.arms[0]}, whose mean stands on the left", fontsize=9, color=NOTE)
    panels[0].legend(loc="lower center", bbox_to_anchor=(0.5, 1.04), ncols=min(4, len(others)), frameon=False)
    figure.supxlabel(f"{len(evaluation.images)} images; lines: 95 % bootstrap intervals", fontsize=9, color=NOTE)
    return figure


def _figure_of_many(
    evaluation: Evaluation, rows: Mapping[tuple[Metric, str, str], Comparison], names: Sequence[str]
) -> Figure:
    """A panel for each metric and method, a row for each arm."""
    first, *others = evaluation.arms
    figure = new_figure(2.6 + 1.9 * len(names), len(evaluation.values) * (_HEAD + 0.24 * len(others)))
    panels = figure.subplots(len(evaluation.values), len(names), squeeze=False, sharey=True)
    for metric, line in zip(evaluation.values, panels, strict=True):
        for name, axes in zip(names, line, strict=True):
            places = [float(i) for i in range(len(others))]
            _draw_differences(axes, [rows[metric, name, arm] for arm in others], places, COLOURS[0], label=None)
            _label(axes, others, bold=False)
            axes.set_title(f"{_title(name)}  {rows[metric, name, first].mean:.1f}", fontsize=10, color=TEXT)
        better = "left" if metric == "deletion" else "right"
        line[0].set_ylabel(f"{TITLES[metric]}: {better} is better", fontsize=10, color=TEXT)
    told = f"points above {first}, whose mean stands above; {len(evaluation.images)} images"
    figure.supxlabel(f"{told}; lines: 95 % bootstrap intervals", fontsize=9, color=NOTE)
    return figure


def _draw_differences(
    axes: Axes, rows: Sequence[Comparison], places: Sequence[float], colour: str, label: str | None
) -> None:
    """A dot and its interval for each row."""
    means = [row.difference for row in rows]
    below = [row.difference - row.difference_interval[0] for row in rows]
    above = [row.difference_interval[1] - row.difference for row in rows]
    axes.errorbar(means, places, xerr=[below, above], fmt="o", color=colour, label=label, markersize=5, capsize=0)


def tuning_figure(tuning: Tuning) -> Figure:
    """Draw what a tuning tried: the gain of every candidate in order, the choice, and the plan.

    Raises
    ------
    MissingDependencyError
        If matplotlib is not installed.
    """
    figure = new_figure(11, 6.2)
    tried_axes, choice_axes, plan_axes = figure.subplot_mosaic(
        "TC\nPP", width_ratios=(1.6, 1), height_ratios=(1.3, 1)
    ).values()
    tried = [(i, step) for i, step in enumerate(tuning.history) if step.stage != "choice" and math.isfinite(step.gain)]
    for position, stage in enumerate(dict.fromkeys(step.stage for _, step in tried)):
        of_stage = [(i, step) for i, step in tried if step.stage == stage]
        for chosen, size, alpha in ((False, 8, 0.45), (True, 45, 1.0)):
            points = [(i, step.gain) for i, step in of_stage if step.chosen == chosen]
            if points:
                label = f"{stage}, taken" if chosen else stage
                axes_x, axes_y = zip(*points, strict=True)
                tried_axes.scatter(
                    axes_x, axes_y, s=size, alpha=alpha, color=COLOURS[position], label=label, linewidth=0
                )
    tried_axes.axhline(0, color=NOTE, linewidth=1)
    tried_axes.set_title(f"Tuned for {_title(tuning.method)}: what was tried", fontsize=11, color=TEXT)
    tried_axes.set_xlabel("candidates, in order", fontsize=9, color=NOTE)
    tried_axes.set_ylabel(f"{tuning.metric}, points above dense", fontsize=9, color=NOTE)
    tried_axes.legend(fontsize=8, frameon=False)

    last = [step for step in tuning.history if step.stage == "choice"]
    for i, step in enumerate(last):
        error = step.error if math.isfinite(step.error) else 0.0
        colour = COLOURS[1] if step.chosen else NOTE
        choice_axes.errorbar(step.gain, i, xerr=error, fmt="o", color=colour, markersize=5)
    _label(choice_axes, [f"{step.name} ({step.images} images)" for step in last], bold=False)
    choice_axes.set_title("The choice", fontsize=11, color=TEXT)
    choice_axes.set_xlabel("points above dense, and the standard error", fontsize=9, color=NOTE)

    plan_axes.bar(range(len(tuning.plan.targets)), list(tuning.plan.targets.values()), color=COLOURS[0])
    plan_axes.set_xticks(range(len(tuning.plan.targets)), list(tuning.plan.targets), rotation=90, fontsize=7)
    plan_axes.set_ylim(0, 1)
    plan_axes.set_title(f"The plan taken: {tuning.name}", fontsize=11, color=TEXT)
    plan_axes.set_ylabel("sparsity", fontsize=9, color=NOTE)
    for axes in (tried_axes, plan_axes):
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    return figure


def overlap_figure(comparison: TraceComparison) -> Figure:
    """Draw a comparison of traces on one page.

    On top a heat map of the overlaps over all layers, images in the order of the leaves of their clustering, with a
    line around each cluster and, on the left, a colour for each image's value. Beside it the score of each image, or
    the AUC of each value. Below, by layer, the mean overlap of the pairs of each kind, and how well it tells the set.

    Raises
    ------
    MissingDependencyError
        If matplotlib is not installed.
    """
    columns, rows = ("HS" if comparison.separations else "HH"), ["LL", *(["AA"] if comparison.layers else [])]
    figure = new_figure(12, 7.4 + 2.4 * len(rows))
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.08)  # inches, so that nothing ends at the very edge
    panels = figure.subplot_mosaic(
        "\n".join([columns, *rows]), width_ratios=(2.4, 1), height_ratios=(6.6, *(2.0 for _ in rows))
    )
    colours = _value_colours(comparison)
    _draw_overlaps(figure, panels["H"], comparison, colours)
    if comparison.inside:
        _draw_scores(panels["S"], comparison, colours)
    elif comparison.separations:
        _draw_areas(panels["S"], comparison)
    _draw_layers(panels["L"], comparison, labelled="A" not in panels)
    if "A" in panels:
        _draw_layer_areas(panels["A"], comparison)
    return figure


def _value_colours(comparison: TraceComparison) -> dict[str, str]:
    """A colour for each value: with a set only for its values, and where there are too many for the most frequent."""
    counts = Counter(
        value for place, value in enumerate(comparison.values) if not comparison.inside or comparison.inside[place]
    )
    if len(counts) <= len(COLOURS):
        return dict(zip(counts, COLOURS, strict=False))
    return {value: colour for (value, _), colour in zip(counts.most_common(len(COLOURS)), COLOURS, strict=False)}


def _draw_overlaps(figure: Figure, axes: Axes, comparison: TraceComparison, colours: Mapping[str, str]) -> None:
    order = list(comparison.clusters.order)
    matrix = comparison.overlaps.pooled[np.ix_(order, order)]
    count = len(order)
    apart = ~np.eye(count, dtype=bool)
    low, high = np.percentile(matrix[apart], [1, 99])
    shown = axes.imshow(
        np.ma.array(matrix, mask=~apart), cmap=_HEAT, vmin=low, vmax=max(high, low + 1e-3), interpolation="nearest"
    )
    axes.set_facecolor(_GRID)
    bar = figure.colorbar(shown, ax=axes, shrink=0.6, pad=0.02, extend="both")
    bar.set_label("overlap of kept weights, intersection over union", fontsize=9, color=NOTE)
    bar.outline.set_visible(False)
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_visible(False)
    start = 0
    for end in range(1, count + 1):
        if end == count or comparison.clusters.of[order[end]] != comparison.clusters.of[order[start]]:
            corner, size = start - 0.5, end - start
            axes.add_patch(_rectangle((corner, corner), size, size, fill=False, edgecolor=TEXT, linewidth=1.2))
            start = end
    label = "no clusters" if comparison.clusters.count == 1 else f"{comparison.clusters.count} clusters"
    silhouette = comparison.clusters.silhouette
    told = "" if math.isnan(silhouette) else f", silhouette {silhouette:.2f}"
    axes.set_title(f"Overlap of the traces of {count} images, all layers: {label}{told}", fontsize=11, color=TEXT)
    strip = axes.inset_axes((-0.035, 0, 0.025, 1))
    strip.set_xticks([])
    strip.set_yticks([])
    strip.set_xlim(0, 1)
    strip.set_ylim(count - 0.5, -0.5)
    for place, image in enumerate(order):
        colour = colours.get(comparison.values[image], _OTHER) if comparison.values else _OTHER
        strip.add_patch(_rectangle((0, place - 0.5), 1, 1, facecolor=colour, linewidth=0))
    for side in strip.spines.values():
        side.set_visible(False)
    if count <= _MOST_NAMES:
        names = [_short(comparison.overlaps.images[image]) for image in order]
        strip.set_yticks(range(count), names, fontsize=6.5, parse_math=False)
        strip.tick_params(axis="y", length=0)
    if comparison.values:
        handles = [_rectangle((0, 0), 1, 1, facecolor=colour) for colour in colours.values()]
        labels = [_short(value or "(none)") for value in colours]
        if len(set(comparison.values)) > len(colours):
            handles.append(_rectangle((0, 0), 1, 1, facecolor=_OTHER))
            labels.append("the rest")
        legend = axes.legend(
            handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.01), ncols=4, frameon=False, fontsize=9,
            title=str(comparison.settings["by"]), title_fontsize=9,
        )  # fmt: skip
        for text in (legend.get_title(), *legend.get_texts()):
            text.set_parse_math(False)


def _draw_scores(axes: Axes, comparison: TraceComparison, colours: Mapping[str, str]) -> None:
    ((name, found),) = comparison.separations.items()
    for place, of_set in enumerate((True, False)):
        chosen = [image for image, inside in enumerate(comparison.inside) if inside == of_set]
        # Spread evenly, whatever the order: by the golden ratio.
        places = [place + 0.5 * ((i * 0.6180339887) % 1 - 0.5) for i in range(len(chosen))]
        dots = [colours.get(comparison.values[image], _OTHER) for image in chosen]
        axes.scatter(places, found.scores[chosen], c=dots, s=22, linewidth=0.4, edgecolor=TEXT)
    axes.axhline(0, color=NOTE, linewidth=0.8)
    called = name if len(name) <= _NAME_LENGTH else "the set"
    axes.set_xticks((0, 1), (called, "the rest"), fontsize=9, parse_math=False)
    axes.set_xlim(-0.5, 1.5)
    axes.set_title(f"Scores\nAUC {_area(found.auc, found.interval)}", fontsize=11, color=TEXT)
    axes.set_ylabel("mean overlap with the set, minus with the rest", fontsize=9, color=NOTE)
    _plain(axes)


def _draw_areas(axes: Axes, comparison: TraceComparison) -> None:
    rows = list(comparison.separations.items())[:_MOST_NAMES]
    for place, (_, found) in enumerate(rows):
        axes.plot(found.random, (place, place), color=_OTHER, linewidth=7, solid_capstyle="butt")
        axes.plot(found.interval, (place, place), color=COLOURS[0], linewidth=1.5)
        axes.plot(found.auc, place, "o", color=COLOURS[0], markersize=5)
    axes.axvline(0.5, color=NOTE, linewidth=0.8)
    axes.set_yticks(range(len(rows)), [_short(name or "(none)") for name, _ in rows], fontsize=8, parse_math=False)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_title("Each value against all others", fontsize=11, color=TEXT)
    axes.set_xlabel("AUC, with 95 % interval\ngrey: 95 % of random sets", fontsize=9, color=NOTE)
    _plain(axes)


def _draw_layers(axes: Axes, comparison: TraceComparison, *, labelled: bool) -> None:
    rows = comparison.layer_rows()[1:]
    names = {"inside": "within the set", "rest": "within the rest", "between": "between the two",
             "same": "of one value", "different": "of two values", "all": "all pairs"}  # fmt: skip
    for kind, colour, mark in zip(rows[0]["overlap"], (COLOURS[1], "#8a8a8a", COLOURS[0]), "osD", strict=False):
        values = [math.nan if row["overlap"][kind] is None else row["overlap"][kind] for row in rows]
        axes.plot(range(len(rows)), values, color=colour, marker=mark, markersize=3.5, linewidth=1, label=names[kind])
    axes.set_title("Mean overlap, layer by layer", fontsize=11, color=TEXT, loc="left")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, fontsize=8.5)
    _name_layers(axes, [row["layer"] for row in rows], labelled=labelled)


def _draw_layer_areas(axes: Axes, comparison: TraceComparison) -> None:
    found = list(comparison.layers.values())
    lows, highs = zip(*(each.random for each in found), strict=True)
    axes.bar(range(len(found)), np.subtract(highs, lows), bottom=lows, width=0.9, color=_GRID)
    axes.plot(range(len(found)), [each.auc for each in found], "o", color=COLOURS[0], markersize=4.5)
    sizes = [comparison.sizes[name].auc for name in comparison.layers]
    axes.plot(range(len(found)), sizes, "_", color=COLOURS[1], markersize=9, markeredgewidth=1.6)
    axes.axhline(0.5, color=NOTE, linewidth=0.8)
    axes.set_ylim(-0.03, 1.03)
    told = "AUC of the set: dots. By sizes of masks alone: dashes. 95 % of sets drawn at random: grey"
    axes.set_title(told, fontsize=11, color=TEXT, loc="left")
    _name_layers(axes, list(comparison.layers), labelled=True)


def _name_layers(axes: Axes, names: Sequence[str], *, labelled: bool) -> None:
    step = -(-len(names) // _MOST_LAYERS)
    places = range(0, len(names), step)
    labels = [names[place] for place in places] if labelled else ["" for _ in places]
    axes.set_xticks(places, labels, rotation=90, parse_math=False)
    axes.tick_params(axis="x", labelsize=7)
    axes.set_xlim(-0.7, len(names) - 0.3)
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.grid(color=_GRID)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _area(auc: float, interval: tuple[float, float]) -> str:
    return f"{auc:.3f} ({interval[0]:.3f} to {interval[1]:.3f})"


def _short(name: str) -> str:
    return name if len(name) <= _NAME_LENGTH else f"...{name[3 - _NAME_LENGTH :]}"


def _rectangle(corner: tuple[float, float], width: float, height: float, **style: object) -> Rectangle:
    found: Rectangle = require("matplotlib.patches", "interpret").Rectangle(corner, width, height, **style)
    return found


def _title(method: str) -> str:
    return "Mean" if method == MEAN else METHODS[method].title if method in METHODS else method


def _label(axes: Axes, labels: Sequence[str], *, bold: bool) -> None:
    """Name the rows, the first on top; the last is the mean, if there is one."""
    axes.axvline(0, color=NOTE, linewidth=1)
    axes.set_yticks(range(len(labels)), labels, fontsize=9)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    if bold:
        axes.axhline(len(labels) - 1.5, color=NOTE, linewidth=0.5)
        axes.get_yticklabels()[-1].set_fontweight("bold")
    axes.grid(axis="x", color="#e9e9e9")
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
