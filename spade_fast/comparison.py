"""Figures of many maps, and what they come to: means, intervals, the tables of the SPADE paper."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from spade_fast.files import write_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: A figure of one map, 0..1.
Metric: TypeAlias = Literal["trojan", "insertion", "deletion"]

TITLES: dict[Metric, str] = {"trojan": "Trojan AUC", "insertion": "Insertion AUC", "deletion": "Deletion AUC"}
#: The name of the row of means over methods.
MEAN = "mean"
#: So many arms beside the first have a column each, or a colour; more have a row.
MOST_COLUMNS = 7

_RESAMPLES = 10_000
# Numbers drawn at a time, unless the values are more.
_AT_A_TIME = 1 << 20
# Points.
_TIE = 1e-6
_PNG_DPI = 160


@dataclass(frozen=True)
class Comparison:
    """One arm against the first, over the images that both have a figure for.

    All in points, hundredths of an AUC. Intervals hold 95 % of the means of bootstrap samples of the images.

    Attributes
    ----------
    metric, method, arm
        What is compared; the method "mean" is the mean over methods, image by image: over those that have figures for
        at least half of the images in every arm.
    images
        How many.
    mean, interval
        Of the arm. NaN without images; the interval with less than two.
    difference, difference_interval
        Of the arm minus the first one, image by image.
    wins
        Share of the images, 0..1, on which the arm is better: higher, for deletion lower. Ties, to a millionth of a
        point, count half.
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
        # Added to zero, what rounds to it has no minus.
        difference, low, high = (round(each, 2) + 0.0 for each in (self.difference, *self.difference_interval))
        interval = "" if math.isnan(low) else f" ({low:+.2f} to {high:+.2f})"
        return f"{difference:+.2f}{interval}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: None stands for NaN."""
        whole = asdict(self)
        whole |= {key: None if math.isnan(whole[key]) else whole[key] for key in ("mean", "difference", "wins")}
        intervals = ("interval", "difference_interval")
        return whole | {key: None if math.isnan(whole[key][0]) else list(whole[key]) for key in intervals}


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The figures of every map, and what they come to.

    Attributes
    ----------
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
    flat
        By image, arm and method: maps that are the same everywhere, so that they rank no pixel above another. Their
        figures count as all others do.
    """

    methods: tuple[str, ...]
    arms: tuple[str, ...]
    images: tuple[str, ...]
    values: Mapping[Metric, NDArray[np.float64]]
    failures: Mapping[tuple[str, str, str], str]
    left_out: Mapping[str, str]
    settings: Mapping[str, Any]
    flat: tuple[tuple[str, str, str], ...] = ()

    def compare(self) -> list[Comparison]:
        """Every arm, for every metric and method, and for the mean over methods."""
        return list(self._rows)

    @cached_property
    def in_mean(self) -> tuple[str, ...]:
        """The methods that the mean over methods is over."""
        known = [~np.isnan(values).any(axis=1) for values in self.values.values()]  # of all arms: [images, methods]
        often = np.all([each.mean(axis=0) >= 0.5 for each in known], axis=0)
        return tuple(method for method, enough in zip(self.methods, often, strict=True) if enough)

    @cached_property
    def _rows(self) -> list[Comparison]:
        rows = []
        for metric, values in self.values.items():
            columns = {method: values[:, :, i] for i, method in enumerate(self.methods)}
            if len(self.in_mean) > 1:
                columns[MEAN] = np.stack([columns[method] for method in self.in_mean]).mean(axis=0)
            for method, of_arms in columns.items():
                rows += [_compare(metric, method, arm, of_arms[:, 0], of_arms[:, i]) for i, arm in enumerate(self.arms)]
        return rows

    def told_flat(self) -> str:
        """Of which methods maps are the same everywhere, by which arms, and on how many images."""
        counts = Counter((method, arm) for _, arm, method in self.flat)
        return ", ".join(f"{method} by {arm} ({count})" for (method, arm), count in counts.items())

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
        ]
        methods = list(dict.fromkeys(method for method, _ in rows))

        def mean(row: Comparison) -> str:
            return f"{row.mean:.2f}" if row.images else "-"

        def difference(row: Comparison) -> str:
            return f"{row.shown}, {100 * row.wins:.0f} %" if row.images else "-"

        first, *others = self.arms
        if len(others) <= MOST_COLUMNS:
            columns = ["method", *self.arms, *(f"{arm} - {first}" for arm in others)]
            body = [
                [
                    method,
                    *(mean(rows[method, arm]) for arm in self.arms),
                    *(difference(rows[method, arm]) for arm in others),
                ]
                for method in methods
            ]
        else:
            columns = ["arm", *methods]
            body = [[first, *(mean(rows[method, first]) for method in methods)]]
            body += [
                [arm, *(f"{mean(rows[method, arm])}; {difference(rows[method, arm])}" for method in methods)]
                for arm in others
            ]
        lines += [f"| {' | '.join(cells)} |" for cells in (columns, *body)]
        lines.insert(3, f"|{'---|' * len(columns)}")
        if fewer := [row for row in rows.values() if row.images < len(self.images)]:
            told = ", ".join(f"{row.method} by {row.arm} ({row.images})" for row in fewer)
            lines += ["", f"Of fewer images than {len(self.images)}: {told}."]
        if self.flat:
            lines += ["", f"The same everywhere, so that they tell nothing, are maps of {self.told_flat()}."]
        if len(self.methods) > len(self.in_mean) > 1:
            lines += ["", f"The mean is over {', '.join(self.in_mean)}."]
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
            "values.csv": rows.getvalue().encode(errors="surrogateescape"),
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
            "arms": list(self.arms),
            "methods": list(self.methods),
            "images": list(self.images),
            "comparison": [row.to_dict() for row in self.compare()],
            "in_mean": list(self.in_mean),
            "failures": [
                {"image": image, "arm": arm, "method": method, "reason": reason}
                for (image, arm, method), reason in self.failures.items()
            ],
            "left_out": dict(self.left_out),
            "flat": [dict(zip(("image", "arm", "method"), names, strict=True)) for names in self.flat],
            "settings": dict(self.settings),
            "versions": {name: version(name) for name in ("spade-fast", "torch", "captum")},
        }


def _compare(
    metric: Metric, method: str, arm: str, first: NDArray[np.float64], values: NDArray[np.float64]
) -> Comparison:
    known = ~np.isnan(first) & ~np.isnan(values)
    points, differences = 100 * values[known], 100 * (values - first)[known]
    better = -differences if metric == "deletion" else differences
    is_tie = np.abs(better) <= _TIE
    wins = float(np.mean(np.where(is_tie, 0.5, better > 0))) if known.any() else math.nan
    mean, interval = bootstrap(points)
    difference, difference_interval = bootstrap(differences)
    return Comparison(metric, method, arm, int(known.sum()), mean, interval, difference, difference_interval, wins)


def bootstrap(values: NDArray[np.float64], seed: int = 0) -> tuple[float, tuple[float, float]]:
    """The mean of values [n], and the interval that holds 95 % of the means of bootstrap samples.

    NaN without values; the interval with less than two, which tell nothing of their spread.
    """
    if len(values) < 2:
        return float(values.mean()) if len(values) else math.nan, (math.nan, math.nan)
    generator = np.random.default_rng(seed)
    rounds = max(1, _AT_A_TIME // len(values))
    means = [
        values[generator.integers(len(values), size=(min(rounds, _RESAMPLES - start), len(values)))].mean(axis=1)
        for start in range(0, _RESAMPLES, rounds)
    ]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(values.mean()), (float(low), float(high))
