"""Checkpoints.

Two rules hold throughout. A checkpoint is data: it is read without executing anything it contains. And it fits or it
does not: nothing is copied into a network before every key, shape and value has been checked.
"""

from __future__ import annotations

import os
import pickle
import pickletools
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from spade_fast.errors import InvalidInputError, first_line

# Where checkpoints keep the state dict, and what data-parallel and adversarial-training wrappers add to it.
_STATE_KEYS = ("state_dict", "model")
_PREFIXES = ("module.model.", "module.", "model.")
_WRAPPER_WORDS = ("attacker", "normalizer")

_LISTED = 10  # keys of each kind that an error message names


def load_checkpoint(path: str | os.PathLike[str], module: nn.Module) -> None:
    """Copy the weights of a file into a network, all of them or, on any error, none.

    ``.safetensors`` files are read as such, all others as ``torch.save`` files, with ``weights_only=True``
    and never otherwise. The state dict may be bare or under ``"state_dict"`` or ``"model"``; what isn't a
    tensor beside it is ignored. Wrappers are undone where the network itself has no such names: the
    prefixes ``module.``, ``model.`` and ``module.model.`` if all keys carry them; the keys of an adversarial
    training wrapper (``attacker``, ``normalizer``); ``fc.0.`` for ``fc.``. After that every key, shape
    and kind of number must match, save that ``num_batches_tracked`` may be absent.

    Parameters
    ----------
    path
        The checkpoint.
    module
        The network, changed in place; dtype and device of its parameters stay.

    Raises
    ------
    InvalidInputError
        If the file is missing, damaged, needs pickle (and so might run code), holds no state dict, doesn't
        fit `module` (the first ten missing, unexpected and mis-shaped keys are listed), or has NaN or
        infinite weights.
    """
    file = Path(path)
    state = read_state(file)
    load_strictly(_plain_names(state, module.state_dict()), module, where=f"checkpoint {file}")


def read_state(file: Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint, bare or under ``"state_dict"`` or ``"model"``; nothing in it is executed.

    Raises
    ------
    InvalidInputError
        If the file is missing, damaged, needs pickle or holds no state dict.
    """
    return _find_state(_read_data(file), file)


def _read_data(file: Path) -> object:
    """Contents of a checkpoint, read without executing anything in it."""
    if not file.is_file():
        raise InvalidInputError(f"checkpoint {file}: there is no such file; check the path")
    try:
        if file.suffix.lower() == ".safetensors":
            return load_file(file)
        with warnings.catch_warnings():
            # torch's remarks on foreign pickles and TorchScript archives: each ends in an error here anyway.
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail anywhere in the readers, in any way
        objects = _foreign_objects(file, error)
        if objects:
            raise InvalidInputError(
                f"checkpoint {file}: refused, because it needs pickle for {objects}, which could run any "
                "code. If you trust its author, convert it once, in a container without network or secrets: "
                "torch.load(file, weights_only=False) there, pick out the state dict, write it with "
                "safetensors.torch.save_file, and pass the .safetensors file here"
            ) from error
        raise InvalidInputError(
            f"checkpoint {file}: can't be read ({first_line(error)}); it is incomplete, or neither a "
            ".safetensors file nor one of torch.save(module.state_dict(), ...): fetch or save it again"
        ) from error


def _foreign_objects(file: Path, error: Exception) -> str:
    """What a pickle holds beside tensors, found without unpickling it; empty if that isn't what's wrong."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:  # not an archive of torch.save
        names = []
    if names:
        return ", ".join(sorted(names)[:_LISTED])
    whole = isinstance(error, pickle.UnpicklingError) and _is_whole_pickle(file)
    return "its Python objects" if whole else ""


def _is_whole_pickle(file: Path) -> bool:
    """Whether a file begins with a pickle that isn't cut off, or with the four of torch before 1.6."""
    try:
        with file.open("rb") as stream:
            for _ in range(4):  # format, version, platform, contents
                if not stream.peek(1):
                    break
                for _ in pickletools.genops(stream):  # disassembles, executes nothing
                    pass
    except Exception:  # not a pickle, or cut off
        return False
    return True


def _find_state(content: object, file: Path) -> dict[str, Tensor]:
    found = f"a {type(content).__name__}"
    if isinstance(content, Mapping):
        found = f"the keys {[str(key) for key in content][:_LISTED]}"
        nested = [content[key] for key in _STATE_KEYS if isinstance(content.get(key), Mapping)]
        leaves = (nested[0] if nested else content).items()
        state = {key: leaf for key, leaf in leaves if isinstance(key, str) and isinstance(leaf, Tensor)}
        if state:
            return state
    raise InvalidInputError(
        f"checkpoint {file}: holds no state dict, but {found}; needed are tensors by name, at the top or "
        "under 'state_dict' or 'model'"
    )


def _plain_names(state: Mapping[str, Tensor], own: Mapping[str, Any]) -> dict[str, Tensor]:
    """Undo what training wrappers did to the keys, as far as the network's own names don't speak against it.

    Parameters
    ----------
    state
        Tensors of the checkpoint by key.
    own
        State dict of the network.
    """
    words = [word for word in _WRAPPER_WORDS if not any(word in key for key in own)]
    kept = {key: value for key, value in state.items() if not any(word in key for word in words)}
    # A network may itself have all its layers under "model.": the reading that fits best is the right one.
    prefixes = ["", *(prefix for prefix in _PREFIXES if all(key.startswith(prefix) for key in kept))]
    best = max(prefixes, key=lambda prefix: sum(key.removeprefix(prefix) in own for key in kept))
    plain = {key.removeprefix(best): value for key, value in kept.items()}
    if "fc.weight" in own and "fc.0.weight" not in own and "fc.weight" not in plain:
        plain = {f"fc.{key[5:]}" if key.startswith("fc.0.") else key: value for key, value in plain.items()}
    return plain


def load_strictly(state: Mapping[str, Tensor], module: nn.Module, where: str) -> None:
    """Copy a state dict whose keys, shapes and values all fit; otherwise raise with `module` untouched."""
    own = {key: value for key, value in module.state_dict().items() if isinstance(value, Tensor)}
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    shared = [key for key in own if key in state]
    misshapen = [key for key in shared if not _same_form(state[key], own[key])]
    if missing or unexpected or misshapen:
        forms = [f"{key} {_form(state[key])} instead of {_form(own[key])}" for key in misshapen]
        cure = "use the network that it was saved from"
        if misshapen and not missing and not unexpected:
            sizes = {_leading_size(state[key], own[key]) for key in misshapen}
            size = sizes.pop()
            if size is not None and not sizes:
                cure = f"its classifier has {size} outputs: pass num_classes={size} to load_model"
        raise InvalidInputError(
            f"{where} does not fit {type(module).__name__}: "
            + "; ".join(
                f"{len(keys)} {what}: {_listed(keys)}"
                for what, keys in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", forms))
                if keys
            )
            + f"; {cure}"
        )
    unfit = [key for key in shared if not _is_finite(state[key], own[key].dtype)]
    if unfit:
        raise InvalidInputError(
            f"{where}: NaN, infinity or no plain values at all in {len(unfit)} of {len(state)} tensors: "
            f"{_listed(unfit)}; the training diverged or the file is damaged: use another one"
        )
    # Not strict only for the sake of num_batches_tracked: all else has just been checked.
    module.load_state_dict(dict(state), strict=False)


def _same_form(theirs: Tensor, ours: Tensor) -> bool:
    # Integers in the place of weights are quantized values that mean nothing without their scale.
    return theirs.shape == ours.shape and theirs.is_floating_point() == ours.is_floating_point()


def _form(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _leading_size(theirs: Tensor, ours: Tensor) -> int | None:
    """First dimension of a tensor that differs in that alone, as a classifier of another size does."""
    only_leading = theirs.dim() == ours.dim() > 0 and theirs.shape[1:] == ours.shape[1:]
    return int(theirs.shape[0]) if only_leading and theirs.shape != ours.shape else None


def _is_finite(tensor: Tensor, dtype: torch.dtype) -> bool:
    plain = tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    # In the network's own precision: a float64 weight may be finite, but too large for float32.
    return plain and bool(tensor.to(dtype).isfinite().all())


def _listed(names: Sequence[str]) -> str:
    rest = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + rest
