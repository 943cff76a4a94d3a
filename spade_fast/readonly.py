"""Dataclasses whose mappings cannot be changed, yet can be pickled and copied."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any


class ReadOnlyMappings:
    """Base of frozen dataclasses: every mapping among their fields becomes a read-only copy."""

    def __post_init__(self) -> None:
        for name, value in _values(self).items():
            if isinstance(value, Mapping):
                object.__setattr__(self, name, MappingProxyType(dict(value)))

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        values = _values(self).values()
        return type(self), tuple(dict(value) if isinstance(value, MappingProxyType) else value for value in values)


def _values(instance: Any) -> dict[str, Any]:
    return {field.name: getattr(instance, field.name) for field in fields(instance)}
