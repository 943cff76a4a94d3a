"""What figures come to: means, intervals, wins, tables and files, against hand and scipy-free bootstraps."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from spade_fast import comparison
from spade_fast.comparison import Comparison, Evaluation, bootstrap
from spade_fast.errors import InvalidInputError

VALUES = np.array(
    [  # images x arms x methods
        [[0.5, 0.9], [0.6, 0.9], [0.7, 0.7]],
        [[0.4, 0.8], [0.5, 0.9], [0.4, math.nan]],
        [[0.6, 0.7], [0.5, 0.9], [0.9, 0.9]],
        [[0.5, 0.6], [0.8, 0.7], [0.6, 0.6]],
    ]
)


def evaluation(**values: np.ndarray) -> Evaluation:
    return Evaluation(
        methods=("saliency", "lrp"),
        arms=("dense", "fast", "other"),
        images=("a", "b", "c", "d"),
        values=values,
        failures={("b", "other", "lrp"): "no relevance"},
        left_out={"e": "unreadable"},
        settings={"seed": 0},
    )


@pytest.fixture
def rows() -> dict[tuple[str, str, str], Comparison]:
    found = evaluation(insertion=VALUES, deletion=1 - VALUES).compare()
    assert len(found) == len({(row.metric, row.method, row.arm) for row in found}) == 2 * 3 * 3
    return {(row.metric, row.method, row.arm): row for row in found}


def test_means_and_differences_are_of_the_images_that_have_both(rows: dict[tuple[str, str, str], Comparison]) -> None:
    row = rows["insertion", "saliency", "fast"]
    assert (row.images, row.mean, row.difference) == (4, pytest.approx(60.0), pytest.approx(10.0))
    row = rows["insertion", "lrp", "other"]
    assert (row.images, row.mean) == (3, pytest.approx(220 / 3))
    assert row.difference == pytest.approx((-20 + 20 + 0) / 3)
    # The mean over methods is taken image by image, where all methods have a figure.
    row = rows["insertion", "mean", "other"]
    assert (row.images, row.difference) == (3, pytest.approx((0 + 25 + 5) / 3))
    dense = rows["insertion", "saliency", "dense"]
    assert (dense.difference, dense.difference_interval, dense.wins) == (0.0, (0.0, 0.0), 0.5)


def test_wins_count_what_is_better(rows: dict[tuple[str, str, str], Comparison]) -> None:
    assert rows["insertion", "saliency", "fast"].wins == 3 / 4
    assert rows["insertion", "lrp", "fast"].wins == (0.5 + 3) / 4  # a tie counts half
    # Deletion is 1 - insertion here: lower is better, so the same images are won.
    assert rows["deletion", "saliency", "fast"].wins == 3 / 4
    assert rows["deletion", "saliency", "fast"].difference == pytest.approx(-10.0)


def test_the_interval_is_that_of_bootstrap_means() -> None:
    values = np.random.default_rng(3).normal(2, 5, 40)
    mean, (low, high) = bootstrap(values)
    assert mean == values.mean()
    # Of so many values the means are normally distributed, with the standard error of the population's variance.
    error = values.std() / math.sqrt(40)
    assert low == pytest.approx(mean - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.1 * error)
    assert bootstrap(values) == bootstrap(values.copy())
    assert bootstrap(np.full(5, 3.0)) == (3.0, (3.0, 3.0))
    assert all(map(math.isnan, (bootstrap(np.empty(0))[0], *bootstrap(np.empty(0))[1])))
    assert bootstrap(np.array([7.0]))[0] == 7
    assert all(map(math.isnan, bootstrap(np.array([7.0]))[1]))  # one value tells nothing of the spread


def test_bootstraps_of_many_values_are_the_same_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(3).normal(2, 5, 300)
    _, whole = bootstrap(values)
    monkeypatch.setattr(comparison, "_AT_A_TIME", 1)  # one resample at a time
    _, parts = bootstrap(values)
    assert parts == pytest.approx(whole, abs=1e-9)


def test_rounding_is_no_win() -> None:
    values = np.array([[[0.5], [0.5 + 1e-12]], [[0.5], [0.5 - 1e-12]], [[0.5], [0.6]]])
    found = Evaluation(("lrp",), ("dense", "fast"), ("a", "b", "c"), {"insertion": values}, {}, {}, {})
    assert found.compare()[1].wins == pytest.approx(2 / 3)


def test_a_hair_is_a_win() -> None:
    values = np.array([[[0.5], [0.5 + 1e-6]], [[0.5], [0.5 - 1e-6]], [[0.5], [0.5 + 1e-6]]])
    found = Evaluation(("lrp",), ("dense", "fast"), ("a", "b", "c"), {"insertion": values}, {}, {}, {})
    assert found.compare()[1].wins == pytest.approx(2 / 3)
    assert found.compare()[1].shown.startswith("+0.00 (")


def test_a_loss_that_rounds_to_nothing_has_no_minus() -> None:
    values = np.array([[[0.5], [0.5 - 1e-6]], [[0.5], [0.5 - 1e-6]]])
    found = Evaluation(("lrp",), ("dense", "fast"), ("a", "b"), {"insertion": values}, {}, {}, {})
    assert found.compare()[1].shown == "+0.00 (+0.00 to +0.00)"


@pytest.mark.parametrize("metric", ["insertion", "trojan"])
def test_maps_that_are_the_same_everywhere_are_told(metric: str) -> None:
    whole = evaluation(**{metric: VALUES})
    assert "same everywhere" not in whole.tables()
    flat = (("a", "fast", "lrp"), ("c", "fast", "lrp"), ("a", "other", "saliency"))
    told = replace(whole, flat=flat)
    assert "are maps of lrp by fast (2), saliency by other (1)." in told.tables()
    assert told.report()["flat"][1] == {"image": "c", "arm": "fast", "method": "lrp"}


def test_tables_have_the_papers_layout() -> None:
    insertion, deletion = evaluation(insertion=VALUES, deletion=1 - VALUES).tables().split("\n\n**")
    assert insertion.startswith("**Insertion AUC, %** (higher is better; 4 images")
    assert deletion.startswith("Deletion AUC, %** (lower is better; 4 images")
    lines = insertion.splitlines()
    assert lines[2] == "| method | dense | fast | other | fast - dense | other - dense |"
    assert lines[4].startswith("| saliency | 50.00 | 60.00 | 65.00 | +10.00 (")
    assert lines[4].endswith("), 75 % | +15.00 (+5.00 to +25.00), 88 % |")
    assert [line.split(" | ")[0] for line in lines[4:7]] == ["| saliency", "| lrp", "| mean"]


def test_files_hold_everything(tmp_path: Path) -> None:
    whole = evaluation(insertion=VALUES)
    written = whole.save(tmp_path / "out")
    assert set(written) == {"values.csv", "tables.md", "summary.json", "comparison.png"}
    with written["values.csv"].open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == VALUES.size
    assert table[0] == {"metric": "insertion", "image": "a", "arm": "dense", "method": "saliency", "value": "0.5"}
    assert [row["value"] for row in table if (row["image"], row["arm"], row["method"]) == ("b", "other", "lrp")] == [""]
    summary = json.loads(written["summary.json"].read_text())
    assert summary["failures"] == [{"image": "b", "arm": "other", "method": "lrp", "reason": "no relevance"}]
    assert summary["left_out"] == {"e": "unreadable"}
    assert len(summary["comparison"]) == 9
    assert written["comparison.png"].read_bytes().startswith(b"\x89PNG")
    assert written["tables.md"].read_text() == whole.tables()


def test_a_single_arm_or_method(tmp_path: Path) -> None:
    alone = Evaluation(("lrp",), ("dense",), ("a",), {"trojan": np.array([[[0.7]]])}, {}, {}, {})
    (row,) = alone.compare()  # no mean over one method
    assert (row.method, row.mean) == ("lrp", 70.0)
    assert row.to_dict()["interval"] is None
    assert "comparison.png" not in alone.save(tmp_path)
    assert alone.tables().splitlines()[2:] == ["| method | dense |", "|---|---|", "| lrp | 70.00 |"]


def test_what_has_no_figure_at_all_is_not_a_number_anywhere(tmp_path: Path) -> None:
    values = VALUES.copy()
    values[:, 2, 1] = math.nan
    whole = evaluation(insertion=values)
    (row,) = (row for row in whole.compare() if (row.method, row.arm) == ("lrp", "other"))
    assert row.images == 0
    assert math.isnan(row.mean)
    summary = json.loads(whole.save(tmp_path)["summary.json"].read_text())
    (told,) = (row for row in summary["comparison"] if (row["method"], row["arm"]) == ("lrp", "other"))
    assert (told["mean"], told["interval"], told["wins"]) == (None, None, None)  # JSON knows no NaN
    assert "| - |" in whole.tables()
    # A method that fails does not take the others along.
    assert whole.in_mean == ("saliency",)


@pytest.mark.parametrize(("known", "methods"), [(3, ("saliency", "lrp")), (2, ("saliency",))])
def test_half_of_the_images_are_enough_for_the_mean(known: int, methods: tuple[str, ...]) -> None:
    values = VALUES.copy()  # where the second has none of one arm
    values[known:, 1, 1] = math.nan
    assert evaluation(insertion=values).in_mean == methods


def test_the_mean_is_over_methods_that_work() -> None:
    values = np.concatenate([VALUES, VALUES[:, :, :1] + 0.1, np.full((4, 3, 1), math.nan)], axis=2)
    methods = ("saliency", "lrp", "lime", "occlusion")
    whole = Evaluation(methods, ("dense", "fast", "other"), ("a", "b", "c", "d"), {"insertion": values}, {}, {}, {})
    assert whole.in_mean == ("saliency", "lrp", "lime")
    (mean,) = (row for row in whole.compare() if (row.method, row.arm) == ("mean", "fast"))
    assert (mean.images, mean.mean) == (4, pytest.approx((60 + 85 + 70) / 3))
    assert "The mean is over saliency, lrp, lime." in whole.tables()
    assert "Of fewer images than 4: lrp by other (3), occlusion by dense (0)" in whole.tables()


def test_the_figure_shows_every_arm() -> None:
    figure = evaluation(insertion=VALUES, deletion=1 - VALUES).figure()
    assert isinstance(figure, Figure)
    panels = figure.axes
    assert [axes.get_title() for axes in panels] == [
        "Insertion AUC: right is better",
        "Deletion AUC: left is better",
    ]
    labels = [label.get_text() for label in panels[0].get_yticklabels()]
    assert labels == ["Gradient  50.0", "LRP  75.0", "Mean  62.5"]
    drawn = [line for container in panels[0].containers for line in [container.lines[0]]]
    assert len(drawn) == 2
    assert list(drawn[0].get_xdata()) == pytest.approx([10.0, 10.0, 10.0])


def test_many_arms_have_a_row_each(tmp_path: Path) -> None:
    arms = ("dense", *(f"arm {i}" for i in range(9)))
    values = np.stack([VALUES[:, 0] + 0.01 * i for i in range(10)], axis=1)
    images = ("a", "b", "c", "d")
    whole = Evaluation(("saliency", "lrp"), arms, images, {"insertion": values, "deletion": values}, {}, {}, {})
    lines = whole.tables().splitlines()
    assert lines[2:6] == [
        "| arm | saliency | lrp | mean |",
        "|---|---|---|---|",
        "| dense | 50.00 | 75.00 | 62.50 |",
        "| arm 0 | 51.00; +1.00 (+1.00 to +1.00), 100 % | 76.00; +1.00 (+1.00 to +1.00), 100 % |"
        " 63.50; +1.00 (+1.00 to +1.00), 100 % |",
    ]
    assert len([line for line in lines if line.startswith("| arm ")]) == 2 * 10
    figure = whole.figure()
    assert [axes.get_title() for axes in figure.axes] == ["Gradient  50.0", "LRP  75.0", "Mean  62.5"] * 2
    assert [axes.get_ylabel() for axes in figure.axes[::3]] == [
        "Insertion AUC: right is better",
        "Deletion AUC: left is better",
    ]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == list(arms[1:])
    (container,) = figure.axes[1].containers
    assert list(container.lines[0].get_xdata()) == pytest.approx(list(range(1, 10)))
    assert "comparison.png" in whole.save(tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(InvalidInputError, match="out"):
        evaluation(insertion=VALUES).save(tmp_path / "out")
