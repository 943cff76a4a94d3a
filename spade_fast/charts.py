"""Charts of evaluations and tunings, drawn on matplotlib's objects alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from spade_fast.attribution import METHODS
from spade_fast.comparison import MEAN, MOST_COLUMNS, TITLES, Comparison, Evaluation, Metric
from spade_fast.errors import require
from spade_fast.figures import NOTE, TEXT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from spade_fast.tuning import Tuning

# Okabe and Ito's colours, which colour-blind people tell apart; in this order by lightness as well.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#1a1a1a")
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
