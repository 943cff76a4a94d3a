"""Measuring how faithful the maps of networks and traces are, over many images: SPADE tables 1 and 2."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from spade_fast import metrics
from spade_fast.arms import Arm
from spade_fast.attribution import answer, asked, captum, check_methods, find_method
from spade_fast.cases import Case, attacked_case, read_case
from spade_fast.comparison import Evaluation, Metric
from spade_fast.errors import InvalidInputError, by_reason, check_whole, told
from spade_fast.files import append_line, digest, held_folder, read_lines, write_folder
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
_MOST_REASONS = 3
_DIGEST = re.compile("[0-9a-f]{64}")


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


def unseen_cases(cases: Mapping[str, Callable[[], Case]], seen: Mapping[str, str]) -> dict[str, Callable[[], Case]]:
    """Cases of which those of certain photographs are refused once they are made, so that they are left out.

    Parameters
    ----------
    cases
        As :func:`clean_cases` and :func:`attacked_cases` give them.
    seen
        The reasons, by `Case.photograph` (:func:`spade_fast.images.photograph_digest`).

    Raises
    ------
    InvalidInputError
        For keys that are no such digests.
    """
    if not isinstance(seen, Mapping) or not all(isinstance(key, str) and _DIGEST.fullmatch(key) for key in seen):
        raise InvalidInputError(
            "seen must hold the reasons by Case.photograph: pass {photograph_digest(image): 'a plan was tuned on it'}"
        )

    def made(make: Callable[[], Case]) -> Case:
        case = make()
        if case.photograph in seen:
            raise InvalidInputError(seen[case.photograph])
        return case

    return {name: partial(made, make) for name, make in cases.items()}


def first_cases(cases: Mapping[str, Callable[[], Case]], most: int) -> dict[str, Case]:
    """The first of the cases that can be used, at most so many, by name; of a photograph under several names the first.

    Raises
    ------
    InvalidInputError
        If there are none.
    """
    left_out: dict[str, str] = {}
    found = dict(islice(_usable(cases, left_out), most))
    if not found:
        raise _none_of(cases, left_out)
    return found


def _usable(
    cases: Mapping[str, Callable[[], Case]], left_out: dict[str, str], *, patched: bool = False
) -> Iterator[tuple[str, Case]]:
    """Each photograph's first case, by name, if need be only with a patch; `left_out` is told of the others."""
    photographs: dict[str, str] = {}
    for name, make in cases.items():
        try:
            case = make()
            if patched and case.patch is None:
                raise InvalidInputError("it has no patch: make it with attacked_case")
            if case.photograph and (same := photographs.setdefault(case.photograph, name)) != name:
                raise InvalidInputError(f"it is the same photograph as {same}")
        except InvalidInputError as error:
            left_out[name] = str(error)
            continue
        yield name, case


def _none_of(cases: Mapping[str, Any], left_out: Mapping[str, str]) -> InvalidInputError:
    reasons = by_reason(left_out)
    more = "" if len(reasons) <= _MOST_REASONS else f"; and {len(reasons) - _MOST_REASONS} more reasons"
    return InvalidInputError(f"none of {len(cases)} images can be used ({'; '.join(reasons[:_MOST_REASONS])}{more})")


def _shuffled(names: Collection[str], seed: int) -> list[str]:
    """In random order, whatever other names there are: by a hash of the seed and the name."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed} {name}".encode(errors="surrogateescape")).digest())


def evaluate(
    model: LoadedModel,
    cases: Mapping[str, Callable[[], Case]] | Sequence[Case],
    arms: Mapping[str, Arm],
    out: str | os.PathLike[str],
    *,
    metric: Metric = "insertion",
    methods: Sequence[str] = TEN_METHODS,
    limit: int | None = None,
    steps: int = metrics.STEPS,
    seed: int = 0,
    progress: bool = False,
) -> Evaluation:
    """Measure the maps of every method, on every case, by every arm.

    Each figure is written to the disk once it is there. A run that was cut short goes on when it is called again, and
    comes to the same figures; so does one with more methods, arms or cases. What failed is tried again.

    Parameters
    ----------
    model
        The network, as :func:`spade_fast.load_model` returns it.
    cases
        What :func:`spade_fast.cases.make_case` and its kin make; or functions that make them, by name, as
        :func:`spade_fast.evaluation.clean_cases` and :func:`spade_fast.evaluation.attacked_cases` give them, which are
        called once they are needed.
    arms
        By name; the first is what the others are compared with.
    out
        A folder, made where it is missing.
    metric
        "insertion" or "deletion", of which either brings the other, by the network itself for the maps of every arm; or
        "trojan", the area under the ROC curve of the patch.
    methods
        Names in :data:`spade_fast.METHODS`. Default: the ten of the paper.
    limit
        Cases to measure, from the first on; those that are left out do not count. Default: all. Of several cases of one
        photograph the first is measured, whatever their names and classes: intervals are of photographs.
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
    known: dict[str, tuple[Metric, ...]] = {"trojan": ("trojan",)}
    known |= dict.fromkeys(("insertion", "deletion"), ("insertion", "deletion"))
    if metric not in known:
        raise InvalidInputError(f"metric={metric!r} is unknown: choose one of {', '.join(known)}")
    if not arms:
        raise InvalidInputError("no arm is to be measured: pass {'dense': dense_arm(model), ...}")
    methods = check_methods(methods)
    if not cases:
        raise InvalidInputError("no case is to be measured: pass some, or clean_cases(model, files)")
    check_whole("limit", 1 if limit is None else limit, 1)
    check_whole("steps", steps, 1)
    check_whole("seed", seed, 0)
    captum()
    if not isinstance(cases, Mapping):
        if not all(isinstance(case, Case) for case in cases):
            raise InvalidInputError("cases must be those of make_case and its kin, or clean_cases(model, files)")
        if len({case.name for case in cases}) < len(cases):
            raise InvalidInputError("two cases have one name: give each its own")
        cases = {case.name: partial(_itself, case) for case in cases}
    if not all(callable(make) for make in cases.values()):
        raise InvalidInputError("cases by name must be functions that make them: pass clean_cases(model, files)")
    settings = {
        "metrics": list(known[metric]),
        "model": model.name,
        "weights": model.source,
        "weights_sha256": digest(model.module.state_dict()),
        "steps": None if metric == "trojan" else steps,
        "seed": seed,
    }
    measurement = _Measurement(model, known[metric], steps, seed, progress)
    most = len(cases) if limit is None else min(limit, len(cases))
    left_out: dict[str, str] = {}
    failures: dict[tuple[str, str, str], str] = {}
    used: list[str] = []
    with held_folder(out), tqdm(total=most, desc="images", disable=not progress) as bar:
        records = _Records(Path(out), settings, {name: arm.settings for name, arm in arms.items()})
        for name, case in islice(_usable(cases, left_out, patched=metric == "trojan"), most):
            records.check_same(name, case)
            for arm_name, arm in arms.items():
                if missing := records.missing(name, arm_name, methods):
                    record, reasons = measurement(case, arm, missing)
                    records.add({"image": name, "case_sha256": case.digest, "arm": arm_name, **record})
                    failures |= {(name, arm_name, method): reason for method, reason in reasons.items()}
            used.append(name)
            bar.update()
    if not used:
        raise _none_of(cases, left_out)
    values = {each: records.values(each, used, tuple(arms), methods) for each in known[metric]}
    flat = [place for place in product(used, arms, methods) if place in records.flat]
    return Evaluation(methods, tuple(arms), tuple(used), values, failures, left_out, records.settings, tuple(flat))


def _itself(case: Case) -> Case:
    return case


@dataclass(frozen=True)
class _Measurement:
    """What is done with every case and arm."""

    model: LoadedModel
    metrics: tuple[Metric, ...]
    steps: int
    seed: int
    progress: bool

    def __call__(self, case: Case, arm: Arm, methods: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, str]]:
        """The record, without the names of case and arm; and why there is no figure, by method."""
        maps: dict[str, Tensor] = {}
        failures: dict[str, str] = {}
        values: dict[Metric, dict[str, float]] = {}
        start = time.perf_counter()
        try:
            for group, context in arm.networks(case, methods):
                self._explain(case, group, context, maps, failures)
        except InvalidInputError as error:
            failures |= {method: str(error) for method in methods if method not in maps and method not in failures}
        explained = time.perf_counter()
        try:
            values = self._measure(case, maps) if maps else {}
        except InvalidInputError as error:
            failures |= dict.fromkeys(maps, str(error))
        seconds = {"maps": explained - start, "metrics": time.perf_counter() - explained}
        flat = [method for method, each in maps.items() if bool((each == each.flatten()[0]).all())]
        return {"target": case.target, "values": values, "flat": flat, "seconds": seconds}, failures

    def _explain(
        self,
        case: Case,
        methods: tuple[str, ...],
        network: AbstractContextManager[nn.Module],
        maps: dict[str, Tensor],
        failures: dict[str, str],
    ) -> None:
        with (
            network as module,
            asked(module, case.inputs, case.target, seed=self.seed, progress=self.progress) as question,
        ):
            for method in methods:
                try:
                    maps[method] = answer(question, method, find_method(method))
                except InvalidInputError as error:
                    failures[method] = str(error)

    def _measure(self, case: Case, maps: Mapping[str, Tensor]) -> dict[Metric, dict[str, float]]:
        stack = torch.stack(list(maps.values()))
        found: dict[Metric, Tensor] = {}
        if case.patch is not None and "trojan" in self.metrics:
            found["trojan"] = metrics.trojan_auc(stack, case.patch)
        else:
            asked_about = (self.model, case.inputs, stack, case.target)
            more: dict[str, Any] = {"steps": self.steps, "progress": self.progress}
            found["insertion"] = metrics.insertion(*asked_about, **more).auc
            found["deletion"] = metrics.deletion(*asked_about, **more).auc
        return {metric: dict(zip(maps, values.tolist(), strict=True)) for metric, values in found.items()}


class _Records:
    """What has been measured, in memory and on the disk."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], arms: Mapping[str, Mapping[str, Any]]) -> None:
        self._file = folder / _RECORDS
        self._values: dict[tuple[str, str, Metric], dict[str, float]] = {}  # by image, arm and metric
        self._digests: dict[str, str] = {}  # of cases, by image
        self.flat: set[tuple[str, str, str]] = set()  # maps that are the same everywhere: image, arm and method
        self._metrics: list[Metric] = settings["metrics"]
        known = _read_settings(folder / _SETTINGS)
        lines = read_lines(self._file)
        if lines and not known:
            raise InvalidInputError(f"{os.fspath(folder)!r} has records but no {_SETTINGS}: choose another folder")
        wanted = json.loads(json.dumps({**settings, "arms": {**known.get("arms", {}), **arms}}))
        self.settings: dict[str, Any] = wanted
        for key, value in known.items():
            if key != "arms" and wanted.get(key) != value:
                raise InvalidInputError(
                    f"{os.fspath(folder)!r} holds a run with {key} {value!r}, not {wanted.get(key)!r}: choose another "
                    "folder"
                )
        for name, value in known.get("arms", {}).items():
            if different := _different(value, wanted["arms"][name]):
                raise InvalidInputError(
                    f"{os.fspath(folder)!r} holds a run whose arm {name!r} has another {different}: choose another "
                    "folder, or another name"
                )
        self._unwritten = known != wanted
        for number, line in enumerate(lines, start=1):
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise InvalidInputError(
                    f"line {number} of {os.fspath(self._file)!r} is no record ({told(error)}): delete that line"
                ) from error

    def _take(self, record: dict[str, Any]) -> None:
        if self._digests.setdefault(record["image"], record["case_sha256"]) != record["case_sha256"]:
            raise ValueError(f"case_sha256 of {record['image']} is another in an earlier line")
        for metric, values in record["values"].items():
            known = self._values.setdefault((record["image"], record["arm"], metric), {})
            for method, value in values.items():
                if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                    raise ValueError(f"{metric} of {method!r} is {value!r}, not within 0..1")
                if known.setdefault(method, value) != value:
                    raise ValueError(f"{metric} of {method!r} is {value!r}, but {known[method]!r} in an earlier line")
        self.flat |= {(record["image"], record["arm"], method) for method in record.get("flat", ())}

    def missing(self, image: str, arm: str, methods: Sequence[str]) -> tuple[str, ...]:
        """The methods that are not measured yet."""
        known = self._values.get((image, arm, self._metrics[0]), {})
        return tuple(method for method in methods if method not in known)

    def check_same(self, name: str, case: Case) -> None:
        """Refuse a case that differs from the one of that name that was measured before."""
        if self._digests.get(name, case.digest) != case.digest:
            raise InvalidInputError(
                f"{name} was another image, or was explained for another class or patch, when "
                f"{os.fspath(self._file)!r} was written: choose another folder"
            )

    def add(self, record: dict[str, Any]) -> None:
        if record["values"]:
            if self._unwritten:  # not before there is something to go on with
                write_folder(self._file.parent, {_SETTINGS: (json.dumps(self.settings, indent=2) + "\n").encode()})
                self._unwritten = False
            append_line(self._file, json.dumps(record, allow_nan=False))
            self._take(record)

    def values(
        self, metric: Metric, images: Sequence[str], arms: Sequence[str], methods: Sequence[str]
    ) -> NDArray[np.float64]:
        """[images, arms, methods], NaN where there is no figure."""
        found = [
            [[self._values.get((image, arm, metric), {}).get(each, math.nan) for each in methods] for arm in arms]
            for image in images
        ]
        return np.array(found, dtype=np.float64)


def _different(known: Mapping[str, Any], told: Mapping[str, Any]) -> str | None:
    """The first setting that is another, None where all are the same."""
    return next((key for key in {**known, **told} if known.get(key) != told.get(key)), None)


def _read_settings(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not isinstance(found.get("arms", {}), dict):
            raise ValueError("it holds no object, or no arms")
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"cannot read {os.fspath(file)!r} ({error}): choose another folder") from error
    return found
