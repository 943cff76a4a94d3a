"""The errors this package raises on purpose, and the import of optional dependencies."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from types import ModuleType

# Characters of another library's message that are quoted.
_QUOTED = 200


class SpadeError(Exception):
    """Base of every refusal: its message says what was wrong, where, and what to do."""


class InvalidInputError(SpadeError, ValueError):
    """An argument, image, model, checkpoint or file that cannot be used as given."""


class MissingDependencyError(SpadeError, ImportError):
    """An optional package is needed and absent."""


def check_whole(what: str, value: object, least: int) -> int:
    """The value, if it is a whole number of at least so much that 64 bits hold.

    Raises
    ------
    InvalidInputError
        Otherwise, with `what` it is that must be one.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**63:
        limit = ", below 2**63" if isinstance(value, int) and value >= 2**63 else ""
        raise InvalidInputError(f"{what} must be a whole number of at least {least}{limit}, got {value!r}")
    return value


def check_names(what: str, values: object) -> tuple[str, ...]:
    """The names in a sequence.

    Raises
    ------
    InvalidInputError
        If it is none, or a single string, or holds something else than text, with `what` it is.
    """
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise InvalidInputError(f"{what} must be a sequence of names, got {values!r}: pass a list")
    for each in values:
        if not isinstance(each, str):
            raise InvalidInputError(f"{what} must be names, got {each!r} among them")
    return tuple(values)


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency.

    Parameters
    ----------
    module
        Dotted name to import, ``"captum.attr"``.
    extra
        The extra of this package that installs it, ``"interpret"``.

    Raises
    ------
    MissingDependencyError
        If the package is not installed; the message gives the line that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # Only the absence of the dependency itself: one that is installed but broken must say so.
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise MissingDependencyError(
            f"this needs the package {error.name!r}, which is not installed: pip install 'spade-fast[{extra}]'"
        ) from error


def by_reason(reasons: Mapping[str, str]) -> list[str]:
    """Names and their reasons as text, those of one reason in one line."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return [
        f"{of[0]}: {reason}" if len(of) == 1 else f"{len(of)}, such as {of[0]}: {reason}"
        for reason, of in names.items()
    ]


def told(error: Exception) -> str:
    """What is wrong with a record: a key that is missing is called so."""
    return f"it has no {error}" if isinstance(error, KeyError) else str(error)


def first_line(error: Exception) -> str:
    """Type and first line of an error, cut short where it is long, to be quoted in another."""
    text = str(error).strip()
    if not text:
        return type(error).__name__
    return f"{type(error).__name__}: {_shortened(text.splitlines()[0])}"


def quoted(text: str) -> str:
    """Text from elsewhere in quotation marks, cut short where it is long."""
    return repr(_shortened(text))


def _shortened(text: str) -> str:
    return text if len(text) <= _QUOTED else text[:_QUOTED].rstrip() + " ..."
