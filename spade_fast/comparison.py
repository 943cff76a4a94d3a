"""Figures of many maps, and what they come to: means, intervals, the tables of the SPADE paper."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from spade_fast.files import write_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: What is measured: "faithfulness" is insertion and deletion, of one set of maps.
Kind: TypeAlias = Literal["trojan", "faithfulness"]
#: A figure of one map, 0..1.
Metric: TypeAlias = Literal["trojan", "insertion", "deletion"]

METRICS: dict[Kind, tuple[Metric, ...]] = {"trojan": ("trojan",), "faithfulness": ("insertion", "deletion")}
TITLES: dict[Metric, str] = {"trojan": "Trojan AUC", "insertion": "Insertion AUC", "deletion": "Deletion AUC"}
#: The name of the row of means over methods.
MEAN = "mean"

_RESAMPLES = 10_000
_PNG_DPI = 160


@dataclass(frozen=True)
class Comparison:
    """One arm against the first, over the images that both have a figure for.

    All in points, hundredths of an AUC. Intervals hold 95 % of the means of bootstrap samples of the images.

    Attributes
    ----------
    metric, method, arm
        What is compared; the method "mean" is the mean over methods, image by image.
    images
        How many.
    mean, interval
        Of the arm.
    difference, difference_interval
        Of the arm minus the first one, image by image.
    wins
        Share of the images, 0..1, on which the arm is better: higher, for deletion lower. Ties count half.
    """

    metric: Metric
    method: str
    arm: str
    images: int
    mean: float
    interval: tuple[float, float]
    difference: float
    difference_interval: tuple[float, float]
    wins: float

    @property
    def shown(self) -> str:
        """The difference and its interval, as text."""
        low, high = self.difference_interval
        return f"{self.difference:+.2f} ({low:+.2f} to {high:+.2f})"


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The figures of every map, and what they come to.

    Attributes
    ----------
    kind
        "trojan" or "faithfulness".
    methods, arms, images
        What was measured; the first arm is what the others are compared with.
    values
        By metric, float64 [images, arms, methods], 0..1; NaN where a method failed.
    failures
        By image, arm and method: why there is no figure.
    left_out
        Images that were not measured: why.
    settings
        How it was done: plain JSON values.
    """

    kind: Kind
    methods: tuple[str, ...]
    arms: tuple[str, ...]
    images: tuple[str, ...]
    values: Mapping[Metric, NDArray[np.float64]]
    failures: Mapping[tuple[str, str, str], str]
    left_out: Mapping[str, str]
    settings: Mapping[str, Any]

    def compare(self) -> list[Comparison]:
        """Every arm, for every metric and method, and for the mean over methods."""
        rows = []
        for metric, values in self.values.items():
            columns = {method: values[:, :, i] for i, method in enumerate(self.methods)}
            if len(self.methods) > 1:
                columns[MEAN] = values.mean(axis=2)
            for method, of_arms in columns.items():
                rows += [_compare(metric, method, arm, of_arms[:, 0], of_arms[:, i]) for i, arm in enumerate(self.arms)]
        return rows

    def tables(self) -> str:
        """The comparison in the layout of tables 1 and 2 of the SPADE paper, in Markdown."""
        return "\n\n".join(self._table(metric) for metric in self.values) + "\n"

    def _table(self, metric: Metric) -> str:
        rows = {(row.method, row.arm): row for row in self.compare() if row.metric == metric}
        better = "lower" if metric == "deletion" else "higher"
        lines = [
            f"**{TITLES[metric]}, %** ({better} is better; {len(self.images)} images; difference from "
            f"{self.arms[0]} with 95 % interval, and the share of images on which it is better)",
            "",
            f"| method | {' | '.join(self.arms)} | {' | '.join(f'{arm} - {self.arms[0]}' for arm in self.arms[1:])} |",
            f"|---|{'---|' * (2 * len(self.arms) - 1)}",
        ]
        for method in dict.fromkeys(method for method, _ in rows):
            found = [rows[method, arm] for arm in self.arms]
            means = [f"{row.mean:.2f}" if row.images else "-" for row in found]
            differences = [f"{row.shown}, {100 * row.wins:.0f} %" if row.images else "-" for row in found[1:]]
            lines.append(f"| {method} | {' | '.join([*means, *differences])} |")
        return "\n".join(lines)

    def figure(self) -> Figure:
        """Differences from the first arm, by method: see :func:`spade_fast.charts.comparison_figure`."""
        from spade_fast.charts import comparison_figure

        return comparison_figure(self)

    def save(self, folder: str | os.PathLike[str]) -> dict[str, Path]:
        """Write ``summary.json``, ``values.csv``, ``tables.md`` and ``comparison.png``, each whole or not at all.

        Raises
        ------
        InvalidInputError
            If the folder cannot be made or a file cannot be written.
        """
        rows = io.StringIO(newline="")
        writer = csv.writer(rows, lineterminator="\n")
        writer.writerow(["metric", "image", "arm", "method", "value"])
        for metric, values in self.values.items():
            for place in np.ndindex(values.shape):
                names = self.images[place[0]], self.arms[place[1]], self.methods[place[2]]
                writer.writerow([metric, *names, "" if np.isnan(values[place]) else repr(float(values[place]))])
        contents = {
            "values.csv": rows.getvalue().encode(),
            "tables.md": self.tables().encode(),
            "summary.json": (json.dumps(self.report(), indent=2, allow_nan=False) + "\n").encode(),
        }
        if len(self.arms) > 1:
            png = io.BytesIO()
            self.figure().savefig(png, format="png", dpi=_PNG_DPI)
            contents["comparison.png"] = png.getvalue()
        return write_folder(folder, contents)

    def report(self) -> dict[str, Any]:
        """Comparison, failures, what was left out and settings, as plain JSON values."""
        return {
            "kind": self.kind,
            "arms": list(self.arms),
            "methods": list(self.methods),
            "images": list(self.images),
            "comparison": [asdict(row) for row in self.compare() if row.images],
            "failures": [
                {"image": image, "arm": arm, "method": method, "reason": reason}
                for (image, arm, method), reason in self.failures.items()
            ],
            "left_out": dict(self.left_out),
            "settings": dict(self.settings),
            "versions": {name: version(name) for name in ("spade-fast", "torch", "captum")},
        }


def _compare(
    metric: Metric, method: str, arm: str, first: NDArray[np.float64], values: NDArray[np.float64]
) -> Comparison:
    known = ~np.isnan(first) & ~np.isnan(values)
    points, differences = 100 * values[known], 100 * (values - first)[known]
    better = -differences if metric == "deletion" else differences
    wins = float(np.mean((better > 0) + 0.5 * (better == 0))) if known.any() else math.nan
    mean, interval = bootstrap(points)
    difference, difference_interval = bootstrap(differences)
    return Comparison(metric, method, arm, int(known.sum()), mean, interval, difference, difference_interval, wins)


def bootstrap(values: NDArray[np.float64], seed: int = 0) -> tuple[float, tuple[float, float]]:
    """The mean of values [n], and the interval that holds 95 % of the means of bootstrap samples; NaN of nothing."""
    if not len(values):
        return math.nan, (math.nan, math.nan)
    chosen = np.random.default_rng(seed).integers(len(values), size=(_RESAMPLES, len(values)))
    low, high = np.percentile(values[chosen].mean(axis=1), [2.5, 97.5])
    return float(values.mean()), (float(low), float(high))
