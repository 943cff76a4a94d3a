"""Which layers are pruned, and how far."""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

from spade_fast.errors import InvalidInputError
from spade_fast.files import write_whole
from spade_fast.readonly import ReadOnlyMappings


@dataclass(frozen=True)
class SparsityPlan(ReadOnlyMappings):
    """Target sparsities by layer.

    A key names a layer exactly ("layer4.2.conv3") or a block by prefix ("layer4.2", "layer4"). The longest match
    wins. Layers that no key matches get `default`.

    Attributes
    ----------
    targets
        Key to share of weights to prune, 0..1.
    default
        Target of all other layers; None leaves them dense.

    Raises
    ------
    InvalidInputError
        If a sparsity is not a number within 0..1.
    """

    targets: Mapping[str, float] = field(default_factory=dict)
    default: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.targets, Mapping) or not all(isinstance(key, str) for key in self.targets):
            raise InvalidInputError(f"a plan maps names of layers or blocks to sparsities, got {self.targets!r}")
        checked = {key: check_sparsity(value, f"sparsity of {key!r}") for key, value in self.targets.items()}
        object.__setattr__(self, "targets", checked)
        if self.default is not None:
            object.__setattr__(self, "default", check_sparsity(self.default, "default sparsity"))
        super().__post_init__()

    @classmethod
    def uniform(cls, sparsity: float, *, layers: Iterable[str] | None = None) -> SparsityPlan:
        """One target for the given layers or block prefixes; without `layers`, for all of them."""
        if layers is None:
            return cls(default=sparsity)
        return cls(targets=dict.fromkeys([layers] if isinstance(layers, str) else layers, sparsity))

    @classmethod
    def from_mapping(cls, targets: Mapping[str, float]) -> SparsityPlan:
        """The given targets; every other layer stays dense."""
        return cls(targets=targets)

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> SparsityPlan:
        """Read what :meth:`to_json` wrote, or :func:`spade_fast.tune`, whose history is passed over.

        Raises
        ------
        InvalidInputError
            If the file cannot be read or is not a plan; the message names the file.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise InvalidInputError(f"cannot read the sparsity plan {os.fspath(path)!r}: {error}") from error
        is_plan = isinstance(content, dict) and set(content) <= {"targets", "default", "tuning"}
        if not is_plan or not isinstance(content.get("targets", {}), dict):
            raise InvalidInputError(
                f"{os.fspath(path)!r} is not a sparsity plan: it must hold an object with 'targets' (layer or "
                "block name to sparsity) and, if wanted, 'default'"
            )
        try:
            return cls(targets=content.get("targets", {}), default=content.get("default"))
        except InvalidInputError as error:
            raise InvalidInputError(f"{os.fspath(path)!r}: {error}") from error

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON.

        Raises
        ------
        InvalidInputError
            If the file cannot be written.
        """
        write_whole(path, (json.dumps(self.to_dict(), indent=2) + "\n").encode())

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON values."""
        return {"targets": dict(self.targets), "default": self.default}

    @property
    def shares(self) -> tuple[float, ...]:
        """All targets, each once, ascending."""
        return tuple(sorted({*self.targets.values(), *([] if self.default is None else [self.default])}))

    def match(self, layer: str) -> str | None:
        """The longest key that names `layer` or one of its blocks."""
        matches = (key for key in self.targets if is_prefix(key, layer))
        return max(matches, key=len, default=None)

    def target(self, layer: str) -> float | None:
        """Target sparsity of `layer`, None where it stays dense."""
        key = self.match(layer)
        return self.default if key is None else self.targets[key]

    def check_keys(self, layers: Iterable[str]) -> None:
        """Raise InvalidInputError if a key matches none of the `layers`, naming those that come nearest."""
        check_prefixes(self.targets, layers, "sparsity key")


@dataclass(frozen=True)
class ErrorBudget:
    """Every layer pruned as far as the error of its outputs allows, for each image anew.

    On the views of the image, the squared error of a layer's outputs may be this share of the outputs (without their
    bias) at most; of the `shares`, each layer gets the largest that keeps it, before any `refit`. On other views the
    error is larger, much so where few views or positions are the evidence: a trace from a single view is sparser, and
    worse, than one from 64. Depthwise convolutions, which have few
    weights, and the layer that is called first stay dense unless they are named in `layers` of
    :func:`spade_fast.trace`.

    Attributes
    ----------
    error
        The largest relative error of a layer, above 0.
    shares
        Sparsities to choose from, 0..1.

    Raises
    ------
    InvalidInputError
        If the error is not a positive number, or a share not within 0..1.
    """

    error: float
    shares: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)

    def __post_init__(self) -> None:
        is_number = isinstance(self.error, Real) and not isinstance(self.error, bool)
        if not is_number or not 0 < self.error < math.inf:
            raise InvalidInputError(f"an error budget must be a positive number, such as 0.03, got {self.error!r}")
        object.__setattr__(self, "shares", check_shares(self.shares))

    def target(self, errors: Sequence[float]) -> float:
        """The largest share whose error, among those of `shares`, is within the budget; 0 if none is."""
        allowed = (share for share, error in zip(self.shares, errors, strict=True) if error <= self.error)
        return max(allowed, default=0.0)


def check_shares(shares: object) -> tuple[float, ...]:
    """Sparsities above 0, each once, ascending, or InvalidInputError if they are none or hold none."""
    if isinstance(shares, str) or not isinstance(shares, Sequence):
        raise InvalidInputError(f"sparsities to choose from must be a sequence of numbers, got {shares!r}")
    found = tuple(sorted({check_sparsity(share, "a sparsity to choose from") for share in shares} - {0.0}))
    if not found:
        raise InvalidInputError(f"sparsities to choose from must hold one above 0, got {list(shares)}")
    return found


def check_sparsity(value: object, what: str) -> float:
    """`value` as a float within 0..1, or InvalidInputError that begins with `what`."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InvalidInputError(f"{what} must be a number within 0..1, got {value!r}")
    try:
        value = float(value)
    except OverflowError:  # of a whole number
        value = math.inf
    if not 0 <= value <= 1:  # also catches NaN
        hint = f"; did you mean {value / 100:g}?" if math.isfinite(value) and 2 <= value <= 100 else ""
        raise InvalidInputError(f"{what} must lie within 0 (dense) and 1 (all pruned), got {value!r}{hint}")
    return value


def is_prefix(key: str, layer: str) -> bool:
    """Whether `key` is the name of `layer` or of a block that holds it."""
    return layer == key or layer.startswith(f"{key}.")


def check_prefixes(keys: Iterable[str], layers: Iterable[str], what: str) -> None:
    """Raise InvalidInputError if a key names no layer and no block, with the nearest names that do."""
    layers = list(layers)
    for key in keys:
        if any(is_prefix(key, layer) for layer in layers):
            continue
        parts = (layer.split(".") for layer in layers)
        names = dict.fromkeys(".".join(split[: n + 1]) for split in parts for n in range(len(split)))
        nearest = difflib.get_close_matches(key, names, n=4, cutoff=0.5) or list(layers)[:4]
        raise InvalidInputError(
            f"{what} {key!r} matches no prunable layer or block of the model; nearest: {', '.join(map(repr, nearest))}"
        )
