"""What is compared: ways to make the network that attribution methods are asked about."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn

from spade_fast import tracer
from spade_fast.cases import Case
from spade_fast.errors import InvalidInputError
from spade_fast.models import LoadedModel
from spade_fast.plans import ErrorBudget, SparsityPlan
from spade_fast.sparse_classifier import penultimate_features, sparse_fc
from spade_fast.sweep import sweep
from spade_fast.tracer import Sparsity
from spade_fast.traces import Trace

#: Networks to be asked about a case, each with the methods that ask it.
Networks: TypeAlias = Iterator[tuple[tuple[str, ...], AbstractContextManager[nn.Module]]]


@dataclass(frozen=True, eq=False)
class Arm:
    """One way to make the network that methods are asked about: what is compared.

    Attributes
    ----------
    settings
        How: plain JSON values, by which a run that goes on knows that it is the same.
    networks
        From a case and the methods wanted to the networks that answer; an InvalidInputError leaves the case out.
    """

    settings: Mapping[str, Any]
    networks: Callable[[Case, tuple[str, ...]], Networks]


def dense_arm(model: LoadedModel) -> Arm:
    """The network as it is."""

    def networks(_: Case, methods: tuple[str, ...]) -> Networks:
        yield methods, nullcontext(model.module)

    return Arm({"arm": "dense"}, networks)


def trace_arm(model: LoadedModel, sparsity: Sparsity, **settings: Any) -> Arm:
    """A trace of each image, by one plan for all methods. `settings` are those of :func:`spade_fast.trace`."""

    def networks(case: Case, methods: tuple[str, ...]) -> Networks:
        yield methods, tracer.trace(model, case.image, sparsity, **settings).applied(model)

    return Arm({"arm": "trace", "sparsity": _plain_sparsity(model, sparsity), **_plain(settings)}, networks)


def tuned_arm(model: LoadedModel, plans: Mapping[str, SparsityPlan], **settings: Any) -> Arm:
    """Traces of each image by a plan for each method; all share the image's Hessians and their factors."""

    def networks(case: Case, methods: tuple[str, ...]) -> Networks:
        if absent := [method for method in methods if method not in plans]:
            raise InvalidInputError(f"there is no plan for method {absent[0]!r}: tune one, or leave the method out")
        groups: dict[str, list[str]] = {}
        for method in methods:
            groups.setdefault(json.dumps(_plain_sparsity(model, plans[method])), []).append(method)
        targets = {share for method in methods for share in plans[method].shares if share}
        keys = {key for method in methods for key in plans[method].targets}
        has_default = any(plans[method].default is not None for method in methods)
        layers = None if has_default else sorted(keys)
        solved = sweep(model, case.image, sorted(targets), layers=layers, **settings) if targets else None
        for group in groups.values():
            plan = plans[group[0]]
            trace = solved.trace(plan) if solved is not None and any(plan.shares) else Trace({})
            yield tuple(group), trace.applied(model)

    told = {method: _plain_sparsity(model, plan) for method, plan in plans.items()}
    return Arm({"arm": "tuned", "plans": told, **_plain(settings)}, networks)


def set_arm(
    model: LoadedModel, reference: Sequence[Case], sparsity: Sparsity, *, by_class: bool = False, **settings: Any
) -> Arm:
    """One trace for many images, made once from others: all of them, or those with the answer to be explained.

    A case that is itself among the others, or whose class is not among theirs, is left out.
    """
    made: dict[int | None, Trace] = {}

    def networks(case: Case, methods: tuple[str, ...]) -> Networks:
        key = case.target if by_class else None
        chosen = [each for each in reference if key in (None, each.target)]
        if case.name in {each.name for each in chosen}:
            raise InvalidInputError("it is among the images that the trace is made from")
        if not chosen:
            raise InvalidInputError(f"no image to make a trace from has class {key}")
        if key not in made:
            made[key] = tracer.trace(model, [each.image for each in chosen], sparsity, **settings)
        yield methods, made[key].applied(model)

    told = {"sparsity": _plain_sparsity(model, sparsity), "images": [each.name for each in reference]}
    return Arm({"arm": "class" if by_class else "set", **told, **_plain(settings)}, networks)


def module_arm(module: nn.Module, settings: Mapping[str, Any]) -> Arm:
    """Another network of the same inputs and classes, such as one with a sparse classifier."""

    def networks(_: Case, methods: tuple[str, ...]) -> Networks:
        yield methods, nullcontext(module)

    return Arm({"arm": "module", **settings}, networks)


def sparse_fc_arm(model: LoadedModel, reference: Sequence[Case], *, views: int = 4, seed: int = 0) -> Arm:
    """The network with a sparse classifier (:func:`spade_fast.sparse_fc`), fitted to its own answers to images.

    A case whose class is no answer to any of them is left out.
    """
    made: list[tuple[nn.Module, set[int]]] = []

    def networks(case: Case, methods: tuple[str, ...]) -> Networks:
        if not made:
            found = penultimate_features(model, [case.image for case in reference], views=views, seed=seed)
            fitted = sparse_fc(model, found, found.answers, seed=seed)
            made.append((fitted.sparse_copy(model), set(found.answers.tolist())))
        module, classes = made[0]
        if case.target not in classes:
            raise InvalidInputError(f"no image that the sparse classifier is fitted to has class {case.target}")
        yield methods, nullcontext(module)

    told = {"images": [case.name for case in reference], "views": views, "seed": seed}
    return Arm({"arm": "sparse_fc", **told}, networks)


def _plain_sparsity(model: LoadedModel, sparsity: Sparsity) -> Any:
    """As JSON values."""
    plan = sparsity(model.module) if callable(sparsity) else sparsity
    if isinstance(plan, ErrorBudget):
        return {"error_budget": plan.error, "shares": list(plan.shares)}
    return plan.to_dict() if isinstance(plan, SparsityPlan) else dict(plan) if isinstance(plan, Mapping) else plan


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON values."""
    is_plain = (bool, int, float, str, type(None))
    return {key: value if isinstance(value, is_plain) else str(value) for key, value in settings.items()}
