"""What is compared: ways to make the network that attribution methods are asked about."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from types import MappingProxyType
from typing import Any, TypeAlias

from torch import nn

from spade_fast import tracer
from spade_fast.cases import Case
from spade_fast.errors import InvalidInputError
from spade_fast.files import digest
from spade_fast.models import LoadedModel, bare_module
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
    check_trace_settings(model, sparsity, settings)

    def networks(case: Case, methods: tuple[str, ...]) -> Networks:
        yield methods, tracer.trace(model, case.image, sparsity, **settings).applied(model)

    return Arm({"arm": "trace", "sparsity": plain_sparsity(model, sparsity), **plain_settings(settings)}, networks)


def tuned_arm(model: LoadedModel, plans: Mapping[str, SparsityPlan], **settings: Any) -> Arm:
    """Traces of each image by a plan for each method; plans that name all that they prune share a dense pass."""
    for method, plan in plans.items():
        if not isinstance(plan, SparsityPlan):
            raise InvalidInputError(
                f"the plan for {method!r} is a {type(plan).__name__}: pass SparsityPlans, or use trace_arm"
            )
        if any(plan.shares):
            check_trace_settings(model, plan, settings)

    def networks(case: Case, methods: tuple[str, ...]) -> Networks:
        if absent := [method for method in methods if method not in plans]:
            raise InvalidInputError(f"there is no plan for method {absent[0]!r}: tune one, or leave the method out")
        groups: dict[str, list[str]] = {}
        for method in methods:
            groups.setdefault(json.dumps(plans[method].to_dict()), []).append(method)
        chosen = {key: plans[group[0]] for key, group in groups.items()}
        together = [plan for plan in chosen.values() if any(plan.shares) and plan.default is None]
        solved = None
        if len(together) > 1:
            grid = sorted({share for plan in together for share in plan.shares})
            solved = sweep(
                model, case.image, grid, layers=[*{*chain(*(plan.targets for plan in together))}], **settings
            )
        for key, plan in chosen.items():
            if not any(plan.shares):
                trace = Trace({})
            elif solved is not None and plan.default is None:
                trace = solved.trace(plan)
            else:
                trace = tracer.trace(model, case.image, plan, **settings)
            yield tuple(groups[key]), trace.applied(model)

    told = {method: plan.to_dict() for method, plan in plans.items()}
    return Arm({"arm": "tuned", "plans": told, **plain_settings(settings)}, networks)


def set_arm(
    model: LoadedModel, reference: Sequence[Case], sparsity: Sparsity, *, by_class: bool = False, **settings: Any
) -> Arm:
    """One trace for many images, made once from others: all of them, or those with the answer to be explained.

    A case whose photograph is itself among the others, or whose class is not among theirs, is left out. Traces of
    classes are kept, each as large as the layers it prunes.
    """
    check_trace_settings(model, sparsity, settings)
    made: dict[int | None, Trace] = {}

    def networks(case: Case, methods: tuple[str, ...]) -> Networks:
        key = case.target if by_class else None
        chosen = [each for each in reference if key in (None, each.target)]
        _check_other(case, chosen)
        if not chosen:
            raise InvalidInputError(f"no image to make a trace from has class {key}")
        if key not in made:
            made[key] = tracer.trace(model, [each.image for each in chosen], sparsity, **settings)
        yield methods, made[key].applied(model)

    told = {"sparsity": plain_sparsity(model, sparsity), "images": {each.name: each.digest for each in reference}}
    return Arm({"arm": "class" if by_class else "set", **told, **plain_settings(settings)}, networks)


def module_arm(module: nn.Module, settings: Mapping[str, Any] = MappingProxyType({})) -> Arm:
    """Another network of the same inputs and classes."""

    def networks(_: Case, methods: tuple[str, ...]) -> Networks:
        yield methods, nullcontext(module)

    return Arm({"arm": "module", "weights_sha256": digest(module.state_dict()), **settings}, networks)


def sparse_fc_arm(model: LoadedModel, reference: Sequence[Case], *, views: int = 4, seed: int = 0) -> Arm:
    """The network with a sparse classifier (:func:`spade_fast.sparse_fc`), fitted to its own answers to images.

    A case whose photograph is itself among them, or whose class is no answer to any of them, is left out.
    """
    made: list[tuple[nn.Module, set[int]] | InvalidInputError] = []

    def fitted() -> tuple[nn.Module, set[int]]:
        found = penultimate_features(model, [case.image for case in reference], views=views, seed=seed)
        return sparse_fc(model, found, found.answers, seed=seed).sparse_copy(model), set(found.answers.tolist())

    def networks(case: Case, methods: tuple[str, ...]) -> Networks:
        _check_other(case, reference)
        if not made:
            try:
                made.append(fitted())
            except InvalidInputError as error:
                made.append(error)
        if isinstance(made[0], InvalidInputError):
            raise made[0]
        module, classes = made[0]
        if case.target not in classes:
            raise InvalidInputError(f"no image that the sparse classifier is fitted to has class {case.target}")
        yield methods, nullcontext(module)

    told = {"images": {case.name: case.digest for case in reference}, "views": views, "seed": seed}
    return Arm({"arm": "sparse_fc", **told}, networks)


def check_trace_settings(model: nn.Module | LoadedModel, sparsity: Sparsity, settings: Mapping[str, Any]) -> None:
    """Refuse what no image could be traced with."""
    defaults: dict[str, Any] = tracer.trace.__kwdefaults__ or {}
    if unknown := sorted(settings.keys() - defaults.keys()):
        raise TypeError(f"{unknown[0]!r} is no setting of spade_fast.trace")
    tracer.prepare_tracing(model, sparsity, **{**defaults, **settings})


def _check_other(case: Case, reference: Sequence[Case]) -> None:
    if case.photograph in {each.photograph for each in reference}:
        raise InvalidInputError("its photograph is among those that this arm is made from")


def plain_sparsity(model: nn.Module | LoadedModel, sparsity: Sparsity) -> Any:
    """As JSON values."""
    plan = sparsity(bare_module(model)) if callable(sparsity) else sparsity
    if isinstance(plan, ErrorBudget):
        return {"error_budget": plan.error, "shares": list(plan.shares)}
    return plan.to_dict() if isinstance(plan, SparsityPlan) else dict(plan) if isinstance(plan, Mapping) else plan


def plain_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON values, by which a later run can tell whether it goes on with the same ones."""
    told = {key: plain(value) for key, value in settings.items()}
    check_lasting(told)
    return told


def plain(value: Any) -> Any:
    """A setting as a JSON value, functions by their names: the same in every process, but see :func:`check_lasting`."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, partial):
        given = {**{str(i): each for i, each in enumerate(value.args)}, **value.keywords}
        return {"function": plain(value.func), **{name: plain(each) for name, each in given.items()}}
    return f"{value.__module__}.{value.__qualname__}" if hasattr(value, "__qualname__") else repr(value)


def check_lasting(settings: Mapping[str, Any]) -> None:
    """Refuse plain settings by which a later run could not tell whether it goes on with the same ones.

    Raises
    ------
    InvalidInputError
        For lambdas, which all have one name, and objects whose text is their place in memory.
    """
    for key, value in settings.items():
        if isinstance(value, Mapping):
            check_lasting(value)
        elif isinstance(value, str) and ("<lambda>" in value or " at 0x" in value):
            raise InvalidInputError(
                f"{key}={value} cannot be told from others in a later run: pass a named function, functools.partial of "
                "one, or an object with a repr of its own"
            )
