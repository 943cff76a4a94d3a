"""Measuring how faithful the maps of networks and traces are, over many images: SPADE tables 1 and 2."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from spade_fast import metrics
from spade_fast.arms import Arm
from spade_fast.attribution import answer, asked, captum, check_methods, find_method
from spade_fast.cases import Case, attacked_case, read_case
from spade_fast.comparison import METRICS, Evaluation, Kind, Metric
from spade_fast.errors import InvalidInputError, SpadeError, check_whole
from spade_fast.files import append_line, digest, read_lines, write_folder
from spade_fast.implanting import Trojan
from spade_fast.models import LoadedModel

#: The methods of the tables of the SPADE paper.
TEN_METHODS = (
    "saliency",
    "input_x_gradient",
    "deep_lift",
    "lrp",
    "guided_backprop",
    "guided_grad_cam",
    "lime",
    "occlusion",
    "integrated_gradients",
    "gradient_shap",
)
_RECORDS, _SETTINGS = "records.jsonl", "settings.json"


def clean_cases(model: LoadedModel, files: Mapping[str, Path], seed: int = 0) -> dict[str, Callable[[], Case]]:
    """The network's own answers to photographs, by name, in random order."""
    return {name: partial(read_case, model, files[name], name) for name in _shuffled(files, seed)}


def attacked_cases(
    model: LoadedModel,
    files: Mapping[str, Path],
    trojans: Sequence[Trojan],
    *,
    sizes: tuple[float, float] = (0.2, 0.4),
    seed: int = 0,
) -> dict[str, Callable[[], Case]]:
    """Photographs with a patch each, by name, in random order: see :func:`spade_fast.cases.attacked_case`."""
    return {
        name: partial(attacked_case, model, files[name], trojans, name=name, sizes=sizes, seed=seed)
        for name in _shuffled(files, seed)
    }


def first_cases(cases: Mapping[str, Callable[[], Case]], most: int) -> dict[str, Case]:
    """The first of the cases that can be used, at most so many, by name.

    Raises
    ------
    InvalidInputError
        If there are none.
    """
    found: dict[str, Case] = {}
    reason = "there is none"
    for name, make in cases.items():
        if len(found) == most:
            break
        try:
            found[name] = make()
        except InvalidInputError as error:
            reason = f"{name}: {error}"
    if not found:
        raise InvalidInputError(f"none of {len(cases)} images can be used ({reason})")
    return found


def _shuffled(names: Collection[str], seed: int) -> list[str]:
    """In random order, whatever other names there are: by a hash of the seed and the name."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())


def evaluate(
    model: LoadedModel,
    cases: Mapping[str, Callable[[], Case]] | Sequence[Case],
    kind: Kind,
    arms: Mapping[str, Arm],
    out: str | os.PathLike[str],
    *,
    methods: Sequence[str] = TEN_METHODS,
    limit: int | None = None,
    steps: int = metrics.STEPS,
    seed: int = 0,
    progress: bool = False,
) -> Evaluation:
    """Measure the maps of every method, on every case, by every arm.

    Each figure is written to the disk once it is there. A run that was cut short goes on when it is called again, and
    comes to the same figures; so does one with more methods, arms or cases.

    Parameters
    ----------
    model
        The network, as :func:`spade_fast.load_model` returns it.
    cases
        What :func:`spade_fast.cases.make_case` and its kin make; or functions that make them, by name, as
        :func:`clean_cases` and :func:`attacked_cases` give them, which are called once they are needed.
    kind
        "faithfulness": insertion and deletion, by the network itself for the maps of every arm; "trojan": the area
        under the ROC curve of the patch.
    arms
        By name; the first is what the others are compared with.
    out
        A folder, made where it is missing.
    methods
        Names in :data:`spade_fast.METHODS`. Default: the ten of the paper.
    limit
        Cases to measure, from the first on; those that are left out do not count. Default: all.
    steps
        Of insertion and deletion.
    seed
        Of methods that draw at random.
    progress
        Show progress bars on stderr.

    Returns
    -------
    Evaluation

    Raises
    ------
    InvalidInputError
        For arguments that cannot be used, a folder that holds another run, and where no case can be used.
    """
    if kind not in METRICS:
        raise InvalidInputError(f"kind={kind!r} is unknown: choose one of {', '.join(METRICS)}")
    if not arms:
        raise InvalidInputError("no arm is to be measured: pass {'dense': dense_arm(model), ...}")
    methods = check_methods(methods)
    check_whole("limit", 1 if limit is None else limit, 1)
    check_whole("steps", steps, 1)
    captum()
    if not isinstance(cases, Mapping):
        cases = {case.name: partial(_itself, case) for case in cases}
    folder = Path(out)
    settings = {
        "kind": kind,
        "model": model.name,
        "weights": model.source,
        "weights_sha256": digest(model.module.state_dict()),
        "steps": steps if kind == "faithfulness" else None,
        "seed": seed,
    }
    records = _Records(folder, settings, {name: arm.settings for name, arm in arms.items()})
    used: list[str] = []
    most = len(cases) if limit is None else min(limit, len(cases))
    with tqdm(total=most, desc="images", disable=not progress) as bar:
        for name, make in cases.items():
            if len(used) == most:
                break
            wanted = {arm: records.missing(name, arm, methods) for arm in arms}
            if name not in records.left_out and any(wanted.values()):
                try:
                    case = make()
                    if kind == "trojan" and case.patch is None:
                        raise InvalidInputError("it has no patch: make it with attacked_case")
                except InvalidInputError as error:
                    records.leave_out(name, str(error))
                else:
                    records.check_same(case)
                    for arm, todo in wanted.items():
                        if todo:
                            records.add(_measure(model, case, kind, arm, arms[arm], todo, steps, seed, progress))
            if name not in records.left_out:
                used.append(name)
                bar.update()
    if not used:
        reason = next((f"{name}: {why}" for name, why in records.left_out.items()), "there is none")
        raise InvalidInputError(f"none of {len(cases)} images can be used ({reason})")
    left_out = {name: reason for name, reason in records.left_out.items() if name in cases}
    values = {metric: records.values(metric, used, tuple(arms), methods) for metric in METRICS[kind]}
    failures = records.failures(used, tuple(arms), methods)
    return Evaluation(kind, methods, tuple(arms), tuple(used), values, failures, left_out, records.settings)


def _itself(case: Case) -> Case:
    return case


def _measure(
    model: LoadedModel,
    case: Case,
    kind: Kind,
    name: str,
    arm: Arm,
    methods: tuple[str, ...],
    steps: int,
    seed: int,
    progress: bool,
) -> dict[str, Any]:
    """The record of a case and an arm."""
    maps: dict[str, Tensor] = {}
    failures: dict[str, str] = {}
    start = time.perf_counter()
    try:
        for group, context in arm.networks(case, methods):
            with context as module, asked(module, case.inputs, case.target, seed=seed, progress=progress) as question:
                for method in group:
                    try:
                        maps[method] = answer(question, method, find_method(method))
                    except SpadeError as error:
                        failures[method] = str(error)
    except InvalidInputError as error:
        failures |= {method: str(error) for method in methods if method not in maps}
    explained = time.perf_counter()
    values: dict[Metric, list[float]] = {}
    if maps:
        stack = torch.stack(list(maps.values()))
        if kind == "trojan":
            assert case.patch is not None
            values["trojan"] = metrics.trojan_auc(stack, case.patch).tolist()
        else:
            asked_about = (model, case.inputs, stack, case.target)
            values["insertion"] = metrics.insertion(*asked_about, steps=steps, progress=progress).auc.tolist()
            values["deletion"] = metrics.deletion(*asked_about, steps=steps, progress=progress).auc.tolist()
    return {
        "image": case.name,
        "inputs_sha256": digest({"inputs": case.inputs}),
        "arm": name,
        "target": case.target,
        "probability": case.scores.softmax(dim=0)[case.target].item(),
        "values": {metric: dict(zip(maps, found, strict=True)) for metric, found in values.items()},
        "failures": failures,
        "seconds": {"maps": explained - start, "metrics": time.perf_counter() - explained},
    }


class _Records:
    """What has been measured, in memory and on the disk."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], arms: Mapping[str, Mapping[str, Any]]) -> None:
        self._file = folder / _RECORDS
        self.left_out: dict[str, str] = {}
        self._found: dict[tuple[str, str], dict[str, Any]] = {}  # by image and arm
        self._inputs: dict[str, tuple[str, int]] = {}  # by image: what the network saw, and the class to be explained
        known = _read_settings(folder / _SETTINGS)
        told = json.loads(json.dumps({**settings, "arms": {**known.get("arms", {}), **arms}}))
        self.settings: dict[str, Any] = told
        for key, value in known.items():
            if key != "arms" and told[key] != value:
                raise InvalidInputError(
                    f"{os.fspath(folder)!r} holds a run with {key} {value!r}, not {told[key]!r}: choose another folder"
                )
        for name, value in known.get("arms", {}).items():
            if told["arms"][name] != value:
                raise InvalidInputError(
                    f"{os.fspath(folder)!r} holds a run whose arm {name!r} was made otherwise: choose another folder, "
                    "or another name"
                )
        if known != told:
            write_folder(folder, {_SETTINGS: (json.dumps(told, indent=2) + "\n").encode()})
        for number, line in enumerate(read_lines(self._file), start=1):
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise InvalidInputError(
                    f"line {number} of {os.fspath(self._file)!r} is no record ({error}): delete that line"
                ) from error

    def _take(self, record: dict[str, Any]) -> None:
        if "left_out" in record:
            self.left_out[record["image"]] = record["left_out"]
            return
        self._inputs[record["image"]] = record["inputs_sha256"], record["target"]
        whole = self._found.setdefault((record["image"], record["arm"]), {"values": {}, "failures": {}})
        for metric, values in record["values"].items():
            whole["values"].setdefault(metric, {}).update(values)
        whole["failures"].update(record["failures"])

    def missing(self, image: str, arm: str, methods: Sequence[str]) -> tuple[str, ...]:
        """The methods that are not measured yet."""
        found = self._found.get((image, arm), {"values": {}, "failures": {}})
        known = {method for values in found["values"].values() for method in values} | found["failures"].keys()
        return tuple(method for method in methods if method not in known)

    def check_same(self, case: Case) -> None:
        """Refuse a case that differs from the one of that name that was measured before."""
        now = (digest({"inputs": case.inputs}), case.target)
        if self._inputs.get(case.name, now) != now:
            raise InvalidInputError(
                f"{case.name} was another image, or was explained for another class, when {os.fspath(self._file)!r} "
                "was written: choose another folder"
            )

    def add(self, record: dict[str, Any]) -> None:
        append_line(self._file, json.dumps(record, allow_nan=False))
        self._take(record)

    def leave_out(self, image: str, reason: str) -> None:
        self.add({"image": image, "left_out": reason})

    def values(
        self, metric: Metric, images: Sequence[str], arms: Sequence[str], methods: Sequence[str]
    ) -> NDArray[np.float64]:
        """[images, arms, methods], NaN where there is no figure."""
        return np.array(
            [
                [
                    [self._found[image, arm]["values"].get(metric, {}).get(method, math.nan) for method in methods]
                    for arm in arms
                ]
                for image in images
            ]
        )

    def failures(
        self, images: Sequence[str], arms: Sequence[str], methods: Sequence[str]
    ) -> dict[tuple[str, str, str], str]:
        """Reasons, by image, arm and method."""
        places = [(image, arm, method) for image in images for arm in arms for method in methods]
        found = {place: self._found[place[:2]]["failures"].get(place[2]) for place in places}
        return {place: reason for place, reason in found.items() if reason is not None}


def _read_settings(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"cannot read {os.fspath(file)!r} ({error}): choose another folder") from error
    return found
