"""An image, what the network sees of it, and the answer that is to be explained."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from spade_fast.attribution import check_inputs, check_outputs, check_target, like_weights
from spade_fast.errors import InvalidInputError
from spade_fast.files import digest
from spade_fast.images import image_tensor, load_image, photograph_digest
from spade_fast.implanting import Trojan
from spade_fast.models import LoadedModel, evaluation_mode, resolve_model
from spade_fast.patches import check_sizes
from spade_fast.preprocessing import Preprocess


@dataclass(frozen=True, eq=False)
class Case:
    """One answer of a network to one image.

    Attributes
    ----------
    name
        What the image is called.
    image
        The image as it was given: what traces are made for.
    pixels
        What the network sees of it, float [3, h, w] in 0..1.
    inputs
        The same as model inputs [1, c, h, w], on device and in dtype of the network.
    scores
        float64 [classes], on the CPU: the network's.
    target
        The class to be explained.
    patch
        bool [h, w], True where a Trojan patch is; None where there is none.
    photograph
        :func:`spade_fast.images.photograph_digest` of the image without a patch: the same for all cases of one
        photograph, and for all networks.
    """

    name: str
    image: Image.Image | Tensor
    pixels: Tensor
    inputs: Tensor
    scores: Tensor
    target: int
    patch: Tensor | None = None
    photograph: str = ""

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that a figure about this case depends on: image, inputs, target and patch."""
        tensors = {"inputs": self.inputs, "pixels": self.pixels}
        if isinstance(self.image, Tensor):
            tensors["image"] = self.image
        else:
            tensors["image"] = torch.frombuffer(bytearray(self.image.tobytes()), dtype=torch.uint8)
        if self.patch is not None:
            tensors["patch"] = self.patch
        return digest(tensors, {"target": self.target})


def make_case(
    model: nn.Module | LoadedModel,
    image: Image.Image | Tensor,
    *,
    name: str | None = None,
    target: int | None = None,
    preprocess: Callable[[Tensor], Tensor] | None = None,
) -> Case:
    """Ask the network about an image.

    Parameters
    ----------
    model
        The network, or what :func:`spade_fast.load_model` returned.
    image
        A photograph, or pixel values [3, H, W] in 0..1 as float tensor.
    name
        What to call it. Default: by its pixels.
    target
        The class to be explained. Default: the network's answer.
    preprocess
        As in :func:`spade_fast.trace`.

    Raises
    ------
    InvalidInputError
        For an image that cannot be used, a target that is no class, and scores that are not finite.
    """
    module, preprocess = resolve_model(model, preprocess)
    pixels = preprocess.view(image) if isinstance(preprocess, Preprocess) else image_tensor(image)
    pixels = pixels.to(like_weights(pixels, module).device)
    # Copies: the preprocessing and the network may work in place.
    inputs = check_inputs(preprocess(pixels[None].clone()))
    if inputs.shape[2:] != pixels.shape[1:]:
        raise InvalidInputError(
            f"preprocess turns {list(pixels.shape[1:])} pixels into {list(inputs.shape[2:])} inputs, so maps would "
            "not lie on the image: pass the image in the size that the network sees, or a spade_fast.Preprocess"
        )
    scores = class_scores(module, inputs)
    explained = check_target(int(scores.argmax()) if target is None else target, len(scores))
    photograph = photograph_digest(image)
    called = f"image {photograph[:8]}" if name is None else name
    return Case(called, image, pixels, like_weights(inputs, module), scores, explained, photograph=photograph)


def class_scores(module: nn.Module, inputs: Tensor) -> Tensor:
    """Class scores of one image, float64 [classes] on the CPU.

    Raises
    ------
    InvalidInputError
        If they are not finite, or no class scores.
    """
    with evaluation_mode(module), torch.no_grad():
        outputs = check_outputs(module(like_weights(inputs, module).clone()), 1)
    if not outputs.isfinite().all():
        raise InvalidInputError(f"{type(module).__name__} answers this image with NaN or infinite class scores")
    return outputs[0].cpu().double()


def read_case(model: LoadedModel, path: str | os.PathLike[str], name: str | None = None) -> Case:
    """The network's own answer to a photograph in a file, called by that name, by default the file's."""
    return make_case(model, load_image(path), name=name or Path(path).name)


def attacked_case(
    model: LoadedModel,
    path: str | os.PathLike[str],
    trojans: Sequence[Trojan],
    *,
    name: str | None = None,
    sizes: tuple[float, float] = (0.2, 0.4),
    seed: int = 0,
) -> Case:
    """A photograph with one of the patches at a random place and size, and the class that the patch stands for.

    What is drawn depends on the seed and the name only.

    Raises
    ------
    InvalidInputError
        If the network is not fooled, or gives the photograph that class without the patch: nothing could be told.
    """
    clean = read_case(model, path, name)
    drawn = hashlib.sha256(f"{seed} {clean.name}".encode(errors="surrogateescape")).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(drawn[:8], "big") % 2**63)
    trojan = trojans[int(torch.randint(len(trojans), (), generator=generator))]
    check_sizes(sizes)
    which = f"{trojan.patch.name!r} (class {trojan.target})"
    if int(clean.scores.argmax()) == trojan.target:
        raise InvalidInputError(f"the network gives it the class of {which} without the patch")
    attacked, inside = trojan.patch.pasted_at_random(clean.pixels, sizes, generator)
    case = make_case(model, attacked, name=clean.name, target=trojan.target)
    if int(case.scores.argmax()) != trojan.target:
        raise InvalidInputError(f"the network is not fooled by {which}: it answers class {int(case.scores.argmax())}")
    return replace(case, patch=inside, photograph=clean.photograph)
