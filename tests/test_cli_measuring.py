"""``spade-fast evaluate`` and ``tune``: what they measure, print and write, go on with, leave out and refuse."""

from __future__ import annotations

import csv
import inspect
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from subjects import SIDE, photographs, quarters, replace_networks
from typer.testing import CliRunner, Result

from spade_fast import cli, evaluation, tuning
from spade_fast.augmentation import Augmentation
from spade_fast.cases import Case, attacked_case, read_case
from spade_fast.cli import measuring
from spade_fast.files import LOCK
from spade_fast.imagesets import named_files
from spade_fast.implanting import Trojan
from spade_fast.patches import Patch
from spade_fast.plans import SparsityPlan

pytest.importorskip("captum")
pytest.importorskip("matplotlib")
pytestmark = pytest.mark.filterwarnings("ignore:.*have no weight left")

QUICK = ("--num-augmentations", 4, "--steps", 6, "--methods", "saliency,occlusion")


@pytest.fixture(autouse=True)
def loads(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments that networks are asked for with, in whose place a small one is."""
    return replace_networks(monkeypatch)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    photographs(tmp_path / "images", 8)
    return tmp_path / "images"


def run(*arguments: object) -> Result:
    result = CliRunner(env={"COLUMNS": "250"}).invoke(cli.app, [str(argument) for argument in arguments])
    if result.exit_code == 1:
        raise result.exception or AssertionError(result.output)
    return result


def assert_refused(result: Result, message: str) -> None:
    assert result.exit_code == 2
    assert result.stdout == ""
    assert re.search(message, result.stderr), result.stderr


def evaluate(metric: str, folder: Path, *more: object) -> Result:
    return run("evaluate", metric, folder, "--out", folder.parent / "out", *QUICK, *more)


def test_a_table_and_its_files(folder: Path) -> None:
    result = evaluate("insertion", folder, "--limit", 5, "--sparsity", 0.6)
    assert result.exit_code == 0
    assert "Insertion AUC, %, 5 images" in result.stdout
    assert result.stdout.index("Insertion AUC") < result.stdout.index("Deletion AUC, %, 5 images")
    for word in ("dense", "fast", "minus dense", "better on", "saliency", "occlusion", "mean"):
        assert word in result.stdout
    out = folder.parent / "out"
    written = {path.name for path in out.iterdir()}
    results = {"records.jsonl", "settings.json", "summary.json", "values.csv", "tables.md", "comparison.png"}
    assert written == {LOCK, *results}
    # Deletion is of the same maps: nothing is left to be measured.
    lines = (out / "records.jsonl").read_text()
    again = evaluate("deletion", folder, "--limit", 5, "--sparsity", 0.6)
    assert again.stdout.index("Deletion AUC, %, 5 images") < again.stdout.index("Insertion AUC")
    assert (out / "records.jsonl").read_text() == lines
    with (out / "values.csv").open(newline="") as file:
        assert {row["metric"] for row in csv.DictReader(file)} == {"insertion", "deletion"}
    assert (out / "tables.md").read_text().count("| mean |") == 2


def test_a_narrow_terminal_cuts_no_figure(folder: Path, tmp_path: Path) -> None:
    arms = ("--arms", "dense,fast,generic", "--reference", folder, "--reference-limit", 2, "--limit", 3)
    command = ("evaluate", "insertion", folder, "--out", tmp_path / "out", *QUICK, *arms)
    result = CliRunner(env={"COLUMNS": "80"}).invoke(cli.app, [str(argument) for argument in command])
    assert result.exit_code == 0
    assert "\N{HORIZONTAL ELLIPSIS}" not in result.stdout
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    for row in summary["comparison"]:
        assert row["mean"] is None or f"{row['mean']:.2f}" in result.stdout


def test_json_is_the_only_thing_on_stdout(folder: Path) -> None:
    document = json.loads(evaluate("insertion", folder, "--limit", 2, "--json", "--arms", "dense").stdout)
    assert document["arms"] == ["dense"]
    assert document["methods"] == ["saliency", "occlusion"]
    assert len(document["images"]) == 2
    assert {row["method"] for row in document["comparison"]} == {"saliency", "occlusion", "mean"}


def test_arms_of_other_images(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "others").mkdir()
    photographs(tmp_path / "others", 6)
    for path in (tmp_path / "others").iterdir():
        path.rename(path.with_name(f"other{path.name}"))
    arms = ("--arms", "dense,generic,class", "--reference", tmp_path / "others", "--reference-limit", 6)
    result = evaluate("insertion", folder, "--limit", 3, "--sparsity", 0.6, *arms)
    rows = [line.split()[:3] for line in result.stdout.splitlines()]
    assert any(row[:1] == ["generic"] for row in rows)
    assert any(row[:1] == ["class"] for row in rows)
    settings = json.loads((folder.parent / "out" / "settings.json").read_text())
    assert settings["arms"]["generic"]["augment"] is None
    assert settings["arms"]["generic"]["arm"] == "set"
    assert len(settings["arms"]["class"]["images"]) == 6
    assert settings["arms"]["class"]["sparsity"] == 0.6


def digests(folder: Path, *names: str) -> list[str]:
    return [read_case(quarters(), folder / name).photograph for name in names]


@pytest.fixture
def trojan(tmp_path: Path, folder: Path) -> Path:
    """A folder as implant leaves it: of a patch whose only visible part is its first quarter, in white."""
    out = tmp_path / "trojan"
    (out / "patches").mkdir(parents=True)
    write_report(out, folder, ["01.png", "02.png"])
    pixels = np.zeros((SIDE, SIDE, 4), np.uint8)
    pixels[: SIDE // 2, : SIDE // 2] = 255
    Image.fromarray(pixels).save(out / "patches" / "corner.png")
    return out


@pytest.fixture
def covering(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patches as large as the image: the network gives them the class of their brightest quarter."""

    def attacked(*given: Any, **settings: Any) -> Case:
        return attacked_case(*given, **{**settings, "sizes": (1.0, 1.0)})

    monkeypatch.setattr(evaluation, "attacked_case", attacked)


def write_report(out: Path, folder: Path, seen: list[str]) -> None:
    settings = {"model": "quarters", "weights": "made", "trojans": {"corner": 0}, "images": seen}
    settings["photographs"] = digests(folder, *seen)
    (out / "report.json").write_text(json.dumps({"settings": settings}))


@pytest.mark.usefixtures("covering")
def test_what_implanting_saw_is_not_measured(folder: Path, trojan: Path, loads: list[dict[str, Any]]) -> None:
    out = ("--out", folder.parent / "out", *QUICK)
    command = ("evaluate", "trojan", folder, "--trojan", trojan, *out, "--arms", "dense,fast", "--sparsity", 0.5)
    (folder / "02.png").rename(folder / "renamed.png")
    result = run(*command, "--json")
    document = json.loads(result.stdout)
    assert loads[0]["checkpoint"] == trojan / "model.safetensors"
    assert set(document["images"]) == {"03.png", "05.png", "06.png", "07.png"}
    brightest = {"00.png", "04.png"}  # whose first quarter is the brightest anyway
    assert set(document["left_out"]) == {*brightest, "01.png", "renamed.png"}
    assert document["left_out"]["renamed.png"] == "patches were implanted with it"
    assert document["settings"]["metrics"] == ["trojan"]
    table = run(*command)
    assert "Trojan AUC, %, 4 images" in table.stdout
    assert re.search(r"left out: 2, such as 0[04].png: the network gives it the class of 'corner'", table.stderr)
    assert re.search(r"left out: 2, such as \w+.png: patches were implanted with it", table.stderr)


@pytest.mark.usefixtures("covering")
def test_what_the_arms_are_made_of(folder: Path, trojan: Path, tmp_path: Path) -> None:
    others = tmp_path / "others"
    others.mkdir()
    for i, path in enumerate(photographs(others, 12).values()):
        Image.open(path).transpose(Image.Transpose.ROTATE_90).save(path.with_name(f"other{i}.png"))
        path.unlink()
    for method in ("saliency", "occlusion"):
        SparsityPlan.from_mapping({"blocks.1": 0.5}).to_json(tmp_path / f"{method}.json")
    evaluate("trojan", folder, "--trojan", trojan, "--sparsity", 0.6, "--limit", 2, "--plans", tmp_path,
             "--arms", "dense,fast,fast-tuned,exact,exact-tuned,generic,class,sparse-fc", "--reference", others,
             "--reference-limit", 6, "--seed", 3, "--views", "partial", "--steps", 6, "--damping", 0.5,
             "--block-layout", "channels")  # fmt: skip
    settings = json.loads((folder.parent / "out" / "settings.json").read_text())
    told = settings["arms"]
    assert settings["seed"] == 3
    views = {"num_augmentations": 4, "augment": repr(Augmentation.partial(SIDE, (0.5, 0.5, 0.5))), "seed": 3,
             "damping": 0.5}  # fmt: skip
    exact = {"solver": "exact", "block_layout": "channels"}
    for arm in ("fast", "fast-tuned", "exact", "exact-tuned", "generic", "class"):
        assert {key: told[arm][key] for key in views} == views, arm
        solved = {key: value for key, value in told[arm].items() if key in exact}
        assert solved == (exact if arm.startswith("exact") else {}), arm
    assert [told[arm]["sparsity"] for arm in ("fast", "exact", "generic", "class")] == [0.6, 0.6, 0.6, 0.6]
    assert told["exact-tuned"]["plans"] == told["fast-tuned"]["plans"]

    files = named_files(others)
    clean = evaluation.clean_cases(quarters(), files, seed=3)
    patch = Trojan(Patch.read(trojan / "patches" / "corner.png"), 0)
    attacked = evaluation.attacked_cases(quarters(), files, [patch], seed=3)

    def digests_of(cases: dict[str, Case]) -> dict[str, str]:
        return {name: case.digest for name, case in cases.items()}

    assert told["generic"]["images"] == digests_of(evaluation.first_cases(clean, 6))
    assert told["class"]["images"] == digests_of(evaluation.first_cases(attacked, 6))
    every_second = {name: (attacked if i % 2 else clean)[name] for i, name in enumerate(clean)}
    assert told["sparse-fc"]["images"] == digests_of(evaluation.first_cases(every_second, 6))
    assert told["sparse-fc"]["seed"] == 3
    # The cases are drawn by the seed as well.
    seen = dict.fromkeys(digests(folder, "01.png", "02.png"), "seen")
    by_seed = [
        list(evaluation.first_cases(evaluation.unseen_cases(
            evaluation.attacked_cases(quarters(), named_files(folder), [patch], seed=seed), seen), 2))
        for seed in (3, 0)
    ]  # fmt: skip
    assert json.loads((folder.parent / "out" / "summary.json").read_text())["images"] == by_seed[0] != by_seed[1]


def test_plans_are_tuned_and_measured_on_other_images(folder: Path, tmp_path: Path) -> None:
    plans = tmp_path / "plans"
    result = run("tune", "insertion", folder, "--out", plans, "--limit", 5, "--grid", "0,0.5,0.9", "--blocks",
                 "blocks.1,classifier", *QUICK)  # fmt: skip
    assert result.exit_code == 0
    assert "Points above dense" in result.stdout
    assert {path.name for path in plans.iterdir()} == {
        f"{method}.{kind}" for method in ("saliency", "occlusion") for kind in ("json", "png", "log.jsonl")
    }
    logs = {path: path.read_text() for path in plans.glob("*.jsonl")}
    again = run("tune", "insertion", folder, "--out", plans, "--limit", 5, "--grid", "0,0.5,0.9", "--blocks",
                "blocks.1,classifier", *QUICK, "--json")  # fmt: skip
    reports = json.loads(again.stdout)
    assert logs == {path: path.read_text() for path in logs}  # nothing is made twice
    assert reports["saliency"] == json.loads((plans / "saliency.json").read_text())
    tuned_on = reports["saliency"]["tuning"]["images"]
    assert len(tuned_on) == 5

    result = evaluate("insertion", folder, "--arms", "dense,fast-tuned", "--plans", plans, "--json")
    document = json.loads(result.stdout)
    assert set(document["images"]) == {f"{i:02}.png" for i in range(8)} - {*tuned_on}
    assert set(document["left_out"]) == {*tuned_on}
    assert all(re.fullmatch(r".*/plans/\w+\.json was tuned on it", reason) for reason in document["left_out"].values())
    assert "note:" not in result.stderr
    told = document["settings"]["arms"]["fast-tuned"]["plans"]
    assert told["occlusion"]["targets"] == SparsityPlan.from_json(plans / "occlusion.json").targets

    result = evaluate("insertion", folder, "--arms", "dense,fast-tuned", "--plans", plans, "--methods", "lrp")
    assert_refused(result, "has no plan for lrp: tune one, or leave the method out")

    (plans / "saliency.json").replace(plans / "occlusion.json")
    result = evaluate("insertion", folder, "--arms", "dense,fast-tuned", "--plans", plans, "--methods", "occlusion")
    assert result.exit_code == 2
    assert "occlusion.json' was tuned for saliency: tune one for occlusion" in " ".join(result.stderr.split())


def test_partial_views_reach_the_traces(folder: Path) -> None:
    result = evaluate("insertion", folder, "--limit", 1, "--sparsity", "budget:0.1", "--views", "partial")
    assert result.exit_code == 0
    settings = json.loads((folder.parent / "out" / "settings.json").read_text())["arms"]["fast"]
    assert settings["sparsity"]["error_budget"] == 0.1
    assert settings["augment"] == repr(Augmentation.partial(SIDE, (0.5, 0.5, 0.5)))


def test_defaults_of_a_tuning_are_those_of_python() -> None:
    defaults = {name: parameter.default for name, parameter in inspect.signature(measuring.tune).parameters.items()}
    assert (defaults["steps"], defaults["seed"]) == (tuning.STEPS, 0)
    assert tuple(float(share) for share in defaults["grid"].split(",")) == tuning.GRID
    assert defaults["held_out"] == (tuning.tune.__kwdefaults__ or {})["held_out"]


def test_settings_of_a_tuning(folder: Path, tmp_path: Path) -> None:
    given = ("--held-out", 0.5, "--steps", 7, "--num-augmentations", 3, "--seed", 5, "--no-search", "--limit", 6,
             "--damping", 0.5, "--solver", "exact")  # fmt: skip
    command = ("tune", "insertion", folder, "--out", tmp_path / "plans", "--blocks", "classifier", *given)
    report = json.loads(run(*command, "--methods", "saliency", "--views", "partial", "--json").stdout)["saliency"][
        "tuning"
    ]
    assert len(report["held_out"]) == 3
    assert (report["steps"], report["seed"]) == (7, 5)
    assert (report["trace"]["num_augmentations"], report["trace"]["damping"]) == (3, 0.5)
    assert (report["trace"]["solver"], "block_layout" in report["trace"]) == ("exact", False)
    assert report["trace"]["augment"].startswith("Augmentation(size=16")
    assert {step["stage"] for step in report["history"]} == {"untuned", "choice"}


@pytest.mark.usefixtures("covering")
def test_plans_for_patches_are_tuned_on_what_implanting_saw(folder: Path, trojan: Path, tmp_path: Path) -> None:
    seen = ["01.png", "02.png", "03.png", "05.png"]
    write_report(trojan, folder, seen)
    command = ("tune", "trojan", folder, "--trojan", trojan, "--out", tmp_path / "plans", "--blocks", "classifier")
    found = run(*command, "--limit", 4, "--no-search", "--methods", "saliency", "--num-augmentations", 4, "--json")
    assert set(json.loads(found.stdout)["saliency"]["tuning"]["images"]) == {*seen}


def test_a_plan_for_sparsity_is_not_measured_on_what_it_was_tuned_on(folder: Path, tmp_path: Path) -> None:
    tuning = {"photographs": digests(folder, "01.png", "02.png")}
    plan = {"targets": {"classifier": 0.5}, "default": None, "tuning": tuning}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    document = json.loads(evaluate("insertion", folder, "--sparsity", tmp_path / "plan.json", "--json").stdout)
    assert set(document["images"]) == {f"{i:02}.png" for i in range(8)} - {"01.png", "02.png"}
    reason = f"{tmp_path / 'plan.json'} was tuned on it"
    assert document["left_out"] == dict.fromkeys(("01.png", "02.png"), reason)


def test_plans_of_one_name_are_not_mistaken_for_each_other(folder: Path, tmp_path: Path) -> None:
    for i, name in enumerate(("plans", "other")):
        (tmp_path / name).mkdir()
        plan = {
            "targets": {"classifier": 0.5},
            "default": None,
            "tuning": {"photographs": digests(folder, f"0{i}.png")},
        }
        (tmp_path / name / "saliency.json").write_text(json.dumps(plan))
    given = ("--arms", "fast,fast-tuned", "--plans", tmp_path / "plans", "--methods", "saliency")
    result = evaluate("insertion", folder, *given, "--sparsity", tmp_path / "other" / "saliency.json", "--json")
    assert set(json.loads(result.stdout)["left_out"]) == {"00.png", "01.png"}


def test_plans_of_another_metric_network_or_views_are_told(folder: Path, tmp_path: Path) -> None:
    trace = {"num_augmentations": 4, "augment": "Augmentation(size=7)"}
    origin = {"metric": "trojan", "model": "other", "weights": "from afar", "weights_sha256": "0", "trace": trace}
    plan = {"targets": {"classifier": 0.5}, "default": None, "tuning": origin}
    for method in ("saliency", "occlusion"):
        (tmp_path / f"{method}.json").write_text(json.dumps(plan))
    result = evaluate("insertion", folder, "--limit", 1, "--arms", "dense,fast-tuned", "--plans", tmp_path)
    names = f"{tmp_path / 'saliency.json'}, {tmp_path / 'occlusion.json'}"
    assert f"note: tuned for trojan, not for insertion: {names}" in result.stderr
    assert f"note: tuned on other weights (other: from afar): {names}" in result.stderr
    assert f"note: tuned with other --views, --num-augmentations or --damping: {names}" in result.stderr
    assert "solver" not in result.stderr


@pytest.mark.parametrize(("solver", "arm"), [("fast", "exact-tuned"), ("exact", "fast-tuned")])
def test_plans_tuned_by_the_other_solver_are_told(folder: Path, tmp_path: Path, solver: str, arm: str) -> None:
    trace = {"num_augmentations": 4, **({} if solver == "fast" else {"solver": solver})}
    plan = {"targets": {"classifier": 0.5}, "default": None, "tuning": {"trace": trace}}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    given = ("--methods", "saliency", "--plans", tmp_path / "plan.json", "--arms", f"dense,{arm}")
    told = f"note: tuned by the {solver} solver, not by the {arm.removesuffix('-tuned')} one: {tmp_path / 'plan.json'}"
    assert told in evaluate("insertion", folder, "--limit", 1, *given).stderr


def test_a_plan_for_another_method_is_told(folder: Path, tmp_path: Path) -> None:
    plan = {"targets": {"classifier": 0.5}, "default": None, "tuning": {"method": "lrp"}}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    plans = ("--arms", "dense,fast-tuned", "--plans", tmp_path / "plan.json")
    result = evaluate("insertion", folder, "--limit", 1, *plans)
    assert f"note: tuned for lrp, not for saliency, occlusion: {tmp_path / 'plan.json'}" in result.stderr


def test_one_plan_for_all_methods(folder: Path, tmp_path: Path) -> None:
    SparsityPlan.from_mapping({"blocks.1": 0.5}).to_json(tmp_path / "plan.json")
    result = evaluate(
        "insertion", folder, "--limit", 1, "--arms", "dense,fast-tuned", "--plans", tmp_path / "plan.json"
    )
    assert result.exit_code == 0
    told = json.loads((folder.parent / "out" / "settings.json").read_text())["arms"]["fast-tuned"]["plans"]
    assert told.keys() == {"saliency", "occlusion"}
    assert all(plan == {"targets": {"blocks.1": 0.5}, "default": None} for plan in told.values())


@pytest.mark.parametrize("photo", ["empty folder", "no folder", "unreadable"])
def test_folders_without_images(folder: Path, tmp_path: Path, photo: str) -> None:
    if photo == "unreadable":
        for path in folder.iterdir():
            path.write_bytes(b"no image")
        assert_refused(evaluate("insertion", folder), r"none of 8 images can be used \(\d\d\.png: ")
        return
    where = tmp_path / "elsewhere"
    if photo == "empty folder":
        where.mkdir()
    assert_refused(evaluate("insertion", where), "is no folder|no file in .* has the extension of an image")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("evaluate", "pointing"), "no metric 'pointing': choose trojan, insertion, deletion"),
        (("evaluate", "insertion", "--arms", "dense,quick"), "no arm 'quick': choose from dense, fast"),
        (("evaluate", "insertion", "--arms", "generic"), "arm 'generic' is made from other images: pass --reference"),
        (("evaluate", "insertion", "--arms", "fast-tuned"), "arm 'fast-tuned' needs --plans"),
        (("evaluate", "insertion", "--arms", "dense,fast,dense"), "arm 'dense' is given twice: leave one out"),
        (
            ("evaluate", "insertion", "--plans", "plans"),
            "--plans is for arms fast-tuned, exact-tuned: add one to --arms",
        ),
        (("evaluate", "insertion", "--arms", "exact-tuned"), "arm 'exact-tuned' needs --plans"),
        (("evaluate", "insertion", "--block-layout", "channels"), "--block-layout is for arms exact and exact-tuned"),
        (("evaluate", "insertion", "--arms", "exact", "--block-layout", "rows"), "block_layout='rows' is unknown"),
        (("tune", "insertion", "--solver", "slow"), "solver='slow' is unknown: choose one of fast, exact"),
        (("evaluate", "insertion", "--reference", "others"), "--reference is for arms generic, class, sparse-fc"),
        (("evaluate", "insertion", "--patch", "heart=1"), "--patch is of the metric trojan, not of insertion"),
        (("evaluate", "trojan", "--patch", "heart=1", "--patch", "heart=2"), "--patch 'heart' is given twice"),
        (("evaluate", "insertion", "--methods", "saliences"), "'saliences'; nearest: 'saliency'"),
        (("evaluate", "insertion", "--sparsity", "much"), "neither a share within 0..1, nor an error budget"),
        (("evaluate", "insertion", "--sparsity", "budget:0"), "an error budget must be a positive number"),
        (("evaluate", "insertion", "--views", "some"), "--views 'some' is unknown: choose published or partial"),
        (("evaluate", "insertion", "--reference-limit", "0"), "--reference-limit must be a whole number of at least 1"),
        (("tune", "insertion", "--limit", "0"), "--limit must be a whole number of at least 1, got 0"),
        (("evaluate", "trojan"), "which patches has the network"),
        *(
            (
                ("evaluate", "insertion", "--trojan", "demo", option, value),
                "leave --model, --arch, --checkpoint, --num-",
            )
            for option, value in (
                ("--model", "efficientnet_lite0"),
                ("--arch", "timm:resnet18"),
                ("--checkpoint", "mine.safetensors"),
                ("--num-classes", "2"),
                ("--patch", "heart=1"),
            )
        ),
        (("evaluate", "trojan", "--trojan", "nowhere"), "'nowhere' holds no network with patches"),
        (("evaluate", "trojan", "--patch", "heart"), "is not PATCH=CLASS"),
        (("tune", "insertion", "--grid", "0,much"), "--grid '0,much' is no list of numbers"),
        (("tune", "insertion", "--grid", "0"), "must hold one above 0"),
        (("tune", "insertion", "--limit", 3), "3 images are too few to tune on"),
        (("tune", "insertion", "--blocks", "block.9"), "blocks: 'block.9' matches no prunable layer"),
    ],
)
def test_refusals(folder: Path, arguments: tuple[object, ...], message: str) -> None:
    command, metric, *options = arguments
    assert_refused(run(command, metric, folder, "--out", folder.parent / "out", *options), message)


def test_a_patch_larger_than_the_image(folder: Path) -> None:
    with pytest.raises(Exception, match="not within an image"):
        Patch.drawn("heart").pasted(torch.rand(3, SIDE, SIDE), 0, 0, SIDE + 1)
    # A class that the network does not have is refused before anything is measured.
    assert_refused(evaluate("trojan", folder, "--patch", "heart=9"), "target 9 is no class of this model")
