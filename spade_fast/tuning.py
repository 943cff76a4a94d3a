"""FastSPADE*: sparsity targets tuned for an attribution method (SPADE section 4.1)."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from spade_fast import metrics, tracer
from spade_fast.arms import check_lasting, plain
from spade_fast.attribution import answer, asked, captum, find_method
from spade_fast.cases import Case, make_case
from spade_fast.comparison import Metric, bootstrap
from spade_fast.errors import InvalidInputError, check_whole
from spade_fast.files import digest, held_file, write_folder
from spade_fast.layers import is_depthwise, prunable_layers
from spade_fast.models import LoadedModel
from spade_fast.operations import INSIDE_METHODS
from spade_fast.plans import ErrorBudget, SparsityPlan, check_prefixes, check_shares, is_prefix
from spade_fast.preparation import Prepared, prepare
from spade_fast.search import FINALISTS, Candidate, Search, Step, Values, in_heat
from spade_fast.sweep import Sweep, sweep
from spade_fast.tracer import Picture
from spade_fast.traces import Trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: (model, case, maps [n, h, w]) to values [n]: the larger, the better.
Score: TypeAlias = Callable[[LoadedModel, Case, Tensor], Tensor]

GRID = (0.0, 0.2, 0.5, 0.8, 0.9, 0.95, 0.99)
#: Of the layers' relative errors, for plans that need no tuning.
BUDGETS = (0.003, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1)
#: Of insertion and deletion, while tuning: few, as more images tell more than more steps.
STEPS = 8
_LEAST = 4
_PNG_DPI = 160


def blocks_of(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Layers by block, in their order: what a plan has one target for.

    A block is the longest part of a layer's name that ends in a number, if another word follows ("layer4.2" of
    "layer4.2.conv1", "blocks.3.0" of "blocks.3.0.conv_pw"). A layer without such a part is a block of its own.
    """
    found: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        ends = [i for i in range(1, len(parts)) if parts[i - 1][-1:].isdigit() and not parts[i][:1].isdigit()]
        found.setdefault(".".join(parts[: ends[-1]]) if ends else name, []).append(name)
    return {block: tuple(layers) for block, layers in found.items()}


@dataclass(frozen=True, eq=False)
class Tuning:
    """A tuned plan, and how it came about.

    Attributes
    ----------
    plan
        The sparsity of every layer.
    method, metric
        What it was tuned for.
    name
        What kind of plan it is: "tuned", or the name of one that needs no tuning; or "dense".
    gain, interval
        Points above the dense network, with a 95 % bootstrap interval: of a tuned plan on the held-out images (NaN of a
        single one), of any other on all. These images had a say in the choice: measure the plan on others
        (:func:`spade_fast.evaluate`).
    images, held_out
        Names of what a search has seen, and of the others.
    history
        All that was tried, in order.
    evaluations
        Maps that it took, those of a run that was gone on with among them.
    settings
        How it was done: plain JSON values.
    """

    plan: SparsityPlan
    method: str
    metric: str
    name: str
    gain: float
    interval: tuple[float, float]
    images: tuple[str, ...]
    held_out: tuple[str, ...]
    history: tuple[Step, ...]
    evaluations: int
    settings: Mapping[str, Any]

    def report(self) -> dict[str, Any]:
        """The plan and how it came about, as plain JSON values: what :meth:`save` writes."""
        return {
            **self.plan.to_dict(),
            "tuning": {
                **self.settings,
                "method": self.method,
                "metric": self.metric,
                "plan": self.name,
                "gain": self.gain,
                "interval": None if math.isnan(self.interval[0]) else list(self.interval),
                "images": {**self.settings["images"]},
                "held_out": list(self.held_out),
                "evaluations": self.evaluations,
                "history": [step.to_dict() for step in self.history],
            },
        }

    def figure(self) -> Figure:
        """What was tried and what it gained: see :func:`spade_fast.charts.tuning_figure`."""
        from spade_fast.charts import tuning_figure

        return tuning_figure(self)

    def save(self, path: str | os.PathLike[str]) -> dict[str, Path]:
        """Write the plan with its history to a JSON file, and a chart beside it (``.png``), each whole or not at all.

        Raises
        ------
        InvalidInputError
            If a file cannot be written.
        """
        path = Path(path)
        png = io.BytesIO()
        self.figure().savefig(png, format="png", dpi=_PNG_DPI)
        chart = path.with_suffix(".png").name
        plan = (json.dumps(self.report(), indent=2, allow_nan=False) + "\n").encode()
        return write_folder(path.parent, {chart: png.getvalue(), path.name: plan})


def tune(
    model: LoadedModel,
    images: Sequence[Case | Picture],
    metric: Metric | Score = "insertion",
    method: str = "saliency",
    *,
    grid: Sequence[float] = GRID,
    blocks: Sequence[str] | None = None,
    held_out: float = 0.25,
    search: bool = True,
    steps: int = STEPS,
    log: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool = False,
    **trace_settings: Any,
) -> Tuning:
    """Tune the sparsity of every block for an attribution method (FastSPADE*; SPADE section 4.1).

    The Hessians and their factors are made once for each image, and all layers solved for the whole grid. Then plans
    that need no tuning are tried: uniform, the last half of the blocks, and by error budget (:class:`ErrorBudget`, with
    the errors' means over the images), in all blocks or in the first half. From the best of them a search goes through
    the blocks, from the last to the first, and tries every target of the grid, and then once more a little less and a
    little more. Candidates race: the best few of a part of the images go on to all of them. In the end, the plan that
    does best on all images is taken, if it is better than the dense network by more than two standard errors; what was
    searched for, only if it does best on the held-out images too, which the search has not seen. Gains differ by some
    points from image to image: twenty images tell no gain below one or two. Each image keeps its solved layers in
    memory, some five times the network's own.

    Parameters
    ----------
    model
        The network, as :func:`spade_fast.load_model` returns it.
    images
        What it is tuned on, 4 at least: photographs, pixel values [3, H, W] in 0..1, or what
        :func:`spade_fast.cases.make_case` and its kin make of either; of the former, the network's own answer counts.
    metric
        "insertion", "deletion", "trojan" (of cases with a patch); or a function (model, case, maps [n, h, w]) to values
        [n], the larger the better.
    method
        A name in :data:`spade_fast.METHODS`.
    grid
        Targets, 0..1.
    blocks
        Names of blocks or layers that have a target each; all other layers stay dense, and so do depthwise convolutions
        that are not named themselves. Default: every block of the network, without the layer that is called first.
    held_out
        Share of the cases that the search does not see.
    search
        Whether to search at all. Otherwise the best of the plans that need no tuning is chosen, in a fraction of the
        time.
    steps
        Of insertion and deletion.
    log
        A file to which every figure is written at once; a run that was cut short goes on from there.
    seed
        Of the search, of methods that draw at random, and of the traces.
    progress
        Show progress bars on stderr.
    trace_settings
        As in :func:`spade_fast.trace`.

    Raises
    ------
    InvalidInputError
        For arguments that cannot be used, and a log of another run.
    """
    tuner = Tuner(
        model, images, metric, grid=grid, blocks=blocks, held_out=held_out, steps=steps, seed=seed, progress=progress,
        **trace_settings,
    )  # fmt: skip
    return tuner.tune(method, search=search, log=log)


class Tuner:
    """Tunes plans for several methods on the same images, whose layers are solved once.

    Parameters
    ----------
    model, images, metric, grid, blocks, held_out, steps, seed, progress, trace_settings
        As in :func:`tune`.

    Attributes
    ----------
    cases, held_out
        What a search sees, in random order, and what it does not.
    metric
        Its name.
    blocks
        The layers of each block, in the order of the network.
    layers
        Those that may be pruned, block by block.
    settings
        How it is done: plain JSON values.
    """

    def __init__(
        self,
        model: LoadedModel,
        images: Sequence[Case | Picture],
        metric: Metric | Score = "insertion",
        *,
        grid: Sequence[float] = GRID,
        blocks: Sequence[str] | None = None,
        held_out: float = 0.25,
        steps: int = STEPS,
        seed: int = 0,
        progress: bool = False,
        **trace_settings: Any,
    ) -> None:
        if not isinstance(model, LoadedModel):
            raise InvalidInputError(f"model is a {type(model).__name__}: pass what spade_fast.load_model returns")
        if "layers" in trace_settings:
            raise InvalidInputError("which layers are tuned is told by `blocks`: leave `layers` out")
        cases = [each if isinstance(each, Case) else make_case(model, each) for each in images]
        if len(cases) < _LEAST:
            raise InvalidInputError(f"{len(cases)} images are too few to tune on: pass at least {_LEAST}")
        if len({case.name for case in cases}) < len(cases):
            raise InvalidInputError("two cases have one name: give each its own")
        known: dict[str, str] = {}
        for case in cases:
            if case.photograph and (same := known.setdefault(case.photograph, case.name)) != case.name:
                raise InvalidInputError(f"{case.name} is the same photograph as {same}: leave one out")
        if not 0 < held_out < 1:
            raise InvalidInputError(f"held_out must be a share of the images above 0 and below 1, got {held_out!r}")
        if metric == "trojan" and any(case.patch is None for case in cases):
            raise InvalidInputError("metric 'trojan' needs cases with a patch: make them with attacked_case")
        check_whole("steps", steps, 1)
        check_whole("seed", seed, 0)
        check_whole("num_augmentations", trace_settings.get("num_augmentations", 1), 1)
        captum()
        self._model, self._progress = model, progress
        self._score = metric if callable(metric) else _score(metric, steps)
        self.metric = plain(metric)
        self._seed, self._trace_settings = seed, {"seed": seed, **trace_settings}
        self._grid = (0.0, *check_shares(grid))
        self._shares = check_shares((*self._grid, *ErrorBudget(1).shares))
        self.blocks = _chosen_blocks(model, cases[0], blocks, self._trace_settings)
        self.layers = [layer for layers in self.blocks.values() for layer in layers]
        order = torch.randperm(len(cases), generator=torch.Generator().manual_seed(seed)).tolist()
        count = max(1, min(len(cases) - _LEAST + 1, round(held_out * len(cases))))
        self.held_out = [cases[i] for i in order[:count]]
        self.cases = [cases[i] for i in order[count:]]
        self.settings: dict[str, Any] = {
            "model": model.name,
            "weights": model.source,
            "weights_sha256": digest(model.module.state_dict()),
            "metric": self.metric,
            "steps": steps,
            "seed": seed,
            "shares": list(self._shares),
            "layers": self.layers,
            "images": {case.name: case.digest for case in cases},
            "photographs": [case.photograph for case in cases if case.photograph],
            "trace": {key: plain(value) for key, value in self._trace_settings.items()},
        }
        self._sweeps: dict[str, Sweep] = {}
        self._prepared: Prepared | None = None

    def tune(self, method: str, *, search: bool = True, log: str | os.PathLike[str] | None = None) -> Tuning:
        """A plan for a method: see :func:`tune`."""
        find_method(method)
        if log is not None:
            check_lasting({key: self.settings[key] for key in ("metric", "trace")})
        with (
            nullcontext() if log is None else held_file(log),
            tqdm(total=self._expected(search), desc=f"tuning for {method}", disable=not self._progress) as bar,
        ):
            values = Values(log, {**self.settings, "method": method})
            found = Search(self, method, values, bar).run(search=search)
        gain, interval = bootstrap(found.gains)
        return Tuning(
            plan=self.plan(found.candidate),
            method=method,
            metric=self.metric,
            name=found.name,
            gain=gain,
            interval=interval,
            images=tuple(case.name for case in self.cases),
            held_out=tuple(case.name for case in self.held_out),
            history=found.history,
            evaluations=found.evaluations,
            settings=self.settings,
        )

    def _expected(self, search: bool) -> int:
        """About how many maps it will take."""
        images, choices = len(self.cases), len(self._grid) - 1
        heat = in_heat(images)
        untuned = 2 * (choices + len(BUDGETS)) * heat + 4 * FINALISTS * (images - heat)
        one_pass = len(self.blocks) * (choices * heat + FINALISTS * (images - heat))
        return untuned + 6 * len(self.held_out) + (one_pass + one_pass // 2 if search else 0)

    # What a search asks

    def moves(self, candidate: Candidate, block: str, *, neighbours: bool) -> dict[str, Candidate]:
        """The candidate with other targets for one block, by name: one of the grid, or each layer's next ones."""
        steps = (0.0, *self._shares)

        def changed(change: Callable[[float], float]) -> Candidate:
            inside = self.blocks[block]
            return tuple(
                change(share) if layer in inside else share for layer, share in zip(self.layers, candidate, strict=True)
            )

        def always(target: float) -> Callable[[float], float]:
            return lambda _: target

        if neighbours:
            found = {
                f"{block} denser": changed(lambda share: steps[max(steps.index(share) - 1, 0)]),
                f"{block} sparser": changed(lambda share: steps[min(steps.index(share) + 1, len(steps) - 1)]),
            }
        else:
            found = {f"{block} at {share:g}": changed(always(share)) for share in self._grid}
        return {name: each for name, each in found.items() if each != candidate}

    def untuned_plans(self) -> dict[str, dict[str, Candidate]]:
        """Plans that need no search, by kind and name."""
        blocks = list(self.blocks)
        late = {layer for block in blocks[len(blocks) // 2 :] for layer in self.blocks[block]}
        early = {*self.layers} - late
        shares = self._grid[1:]
        errors = np.mean([[self.sweep(case).errors[layer] for layer in self.layers] for case in self.cases], axis=0)

        def within(budget: float, inside: Collection[str]) -> Candidate:
            share_of = ErrorBudget(budget, self._shares).target
            return tuple(
                share_of(of_layer) if layer in inside else 0.0
                for layer, of_layer in zip(self.layers, errors, strict=True)
            )

        return {
            "uniform": {f"all blocks at {share:g}": (share,) * len(self.layers) for share in shares},
            "last half": {
                f"last half at {share:g}": tuple(share if layer in late else 0.0 for layer in self.layers)
                for share in shares
            },
            "error budget": {f"error budget {budget:g}": within(budget, self.layers) for budget in BUDGETS},
            "error budget, first half": {
                f"error budget {budget:g}, first half": within(budget, early) for budget in BUDGETS
            },
        }

    def told(self, candidate: Candidate) -> dict[str, float]:
        """Its targets above 0, by block, or by layer where those of a block differ."""
        by_layer = dict(zip(self.layers, candidate, strict=True))
        found: dict[str, float] = {}
        for block, layers in self.blocks.items():
            shares = {by_layer[layer] for layer in layers}
            found |= {block: shares.pop()} if len(shares) == 1 else {layer: by_layer[layer] for layer in layers}
        return {name: share for name, share in found.items() if share}

    def sweep(self, case: Case) -> Sweep:
        """The case's layers, solved for the whole grid."""
        if case.name not in self._sweeps:
            self._sweeps[case.name] = sweep(
                self._model, case.image, self._shares, layers=self.layers, **self._trace_settings
            )
        return self._sweeps[case.name]

    def _prepared_for(self, method: str) -> Prepared | None:
        """The network that a method looks inside; None for others."""
        if method not in INSIDE_METHODS:
            return None
        if self._prepared is None:
            self._prepared = prepare(self._model)
        return self._prepared

    def maps(self, case: Case, method: str, candidates: Sequence[Candidate]) -> list[Tensor | None]:
        """A map by each candidate; None where the method fails on it, which on the dense network is an error."""
        module, prepared = self._model.module, self._prepared_for(method)
        found: list[Tensor | None] = []
        for candidate in candidates:
            plan = self.plan(candidate)
            trace = self.sweep(case).trace(plan) if any(candidate) else Trace({})
            with (
                trace.applied(module),
                nullcontext() if prepared is None else trace.applied(prepared.module),
                asked(module, case.inputs, case.target, seed=self._seed, again=True, prepared=prepared) as question,
            ):
                try:
                    found.append(answer(question, method, find_method(method)))
                except InvalidInputError as error:
                    if not any(candidate):
                        raise InvalidInputError(f"{case.name}, dense network: {error}") from error
                    found.append(None)
        return found

    def plan(self, candidate: Candidate) -> SparsityPlan:
        """The candidate as a plan."""
        return SparsityPlan.from_mapping(
            {layer: share for layer, share in zip(self.layers, candidate, strict=True) if share}
        )

    def score(self, case: Case, maps: Sequence[Tensor]) -> list[float | None]:
        """The metric of the maps; NaN and infinite ones stand for none."""
        given = self._score(self._model, case, torch.stack(list(maps)))
        try:
            values = [float(value) for value in given]
        except (TypeError, ValueError) as error:
            raise InvalidInputError(
                f"{self.metric} gives a {type(given).__name__} for {len(maps)} maps: it must give a value each, as a "
                f"tensor [{len(maps)}]"
            ) from error
        if len(values) != len(maps):
            raise InvalidInputError(
                f"{self.metric} gives {len(values)} values for {len(maps)} maps: it must give one each"
            )
        return [value if math.isfinite(value) else None for value in values]


def _score(metric: str, steps: int) -> Score:
    def insertion(model: LoadedModel, case: Case, maps: Tensor) -> Tensor:
        return metrics.insertion(model, case.inputs, maps, case.target, steps=steps).auc

    def deletion(model: LoadedModel, case: Case, maps: Tensor) -> Tensor:
        return -metrics.deletion(model, case.inputs, maps, case.target, steps=steps).auc

    def trojan(_: LoadedModel, case: Case, maps: Tensor) -> Tensor:
        assert case.patch is not None
        return metrics.trojan_auc(maps, case.patch)

    scores: dict[str, Score] = {"insertion": insertion, "deletion": deletion, "trojan": trojan}
    if metric not in scores:
        raise InvalidInputError(f"metric={metric!r} is unknown: choose {', '.join(scores)}, or pass a function")
    return scores[metric]


def _chosen_blocks(
    model: LoadedModel, case: Case, names: Sequence[str] | None, trace_settings: Mapping[str, Any]
) -> dict[str, tuple[str, ...]]:
    """The layers of each block that has a target of its own."""
    prunable = prunable_layers(model.module)
    if names is not None:
        check_prefixes(names, prunable, "blocks:")
    # What can be pruned is known once the network has run: a small trace tells.
    few = {**trace_settings, "num_augmentations": 1, "layers": names}
    probe = tracer.trace(model, case.image, 1.0, **few)
    able = [name for name in prunable if name in probe.layers]
    leader_of: dict[int, str] = {}  # tied layers have one target, that of the first
    leaders = {name: leader_of.setdefault(id(prunable[name].weight), name) for name in able}
    if names is None:
        blocks = blocks_of([name for name in able if leaders[name] == name and not is_depthwise(prunable[name])])
        return _with_tied(blocks, leaders)
    if inner := [(outer, name) for outer in names for name in names if name != outer and is_prefix(outer, name)]:
        raise InvalidInputError(f"blocks: {inner[0][1]!r} is a part of {inner[0][0]!r}: leave one of them out")
    if len({*names}) < len(names):
        raise InvalidInputError(f"blocks: {max(names, key=list(names).count)!r} is there twice: leave one out")
    found = {}
    for block in names:
        inside = [name for name in able if is_prefix(block, name)]
        layers = tuple(name for name in inside if name == block or not is_depthwise(prunable[name]))
        if not layers:
            raise InvalidInputError(f"block {block!r} has no layer that can be pruned, but for depthwise convolutions")
        found[block] = tuple(name for name in layers if leaders[name] == name)
    return _with_tied(found, leaders)


def _with_tied(blocks: Mapping[str, tuple[str, ...]], leaders: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """The blocks with all layers that share a weight of theirs; without those that have none of their own."""
    found = {
        block: tuple(name for name, leader in leaders.items() if leader in layers) for block, layers in blocks.items()
    }
    return {block: layers for block, layers in found.items() if layers}


def tuning_record(path: str | os.PathLike[str]) -> dict[str, Any]:
    """How a plan in a file was tuned, as :meth:`Tuning.report` tells it; nothing for a plan of another origin.

    Raises
    ------
    InvalidInputError
        If the file cannot be read.
    """
    try:
        tuning = json.loads(Path(path).read_text(encoding="utf-8")).get("tuning", {})
        if not isinstance(tuning, dict):
            raise ValueError("its tuning is no object")
        photographs = tuning.get("photographs", None if "images" in tuning else [])
        if not isinstance(photographs, list) or not all(isinstance(each, str) for each in photographs):
            raise ValueError("it does not tell the photographs that it was tuned on: tune it anew")
    except (OSError, ValueError, AttributeError) as error:
        raise InvalidInputError(f"cannot read the sparsity plan {os.fspath(path)!r} ({error})") from error
    return tuning
