"""What a network was evaluated on: resize, centre crop, normalise."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from spade_fast.errors import InvalidInputError
from spade_fast.images import image_tensor, rgb_image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
# A 1 x 10,000 strip would be enlarged to 256 x 2,560,000.
_MAX_ASPECT_RATIO = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocess:
    """Evaluation preprocessing of a network, the one its published accuracy was measured with.

    Equal to torchvision's ``Resize(resize_size)``, ``CenterCrop(input_size)``, ``ToTensor`` and
    ``Normalize(mean, std)`` on a PIL image, in three steps: `frame` (the whole photograph, what
    augmentations crop from), `view` (what the network answers on) and the call (normalisation).

    Parameters
    ----------
    mean, std
        Per channel, in units of pixel values 0..1; ``std > 0``.
    input_size
        Side of the square centre crop, in pixels.
    resize_size
        Short side before the crop, in pixels, at least `input_size`.
    interpolation
        Filter of the resize, antialiased.

    Raises
    ------
    InvalidInputError
        If a field is outside what is stated above.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    input_size: int = 224
    resize_size: int = 256
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", _three_numbers("mean", self.mean))
        object.__setattr__(self, "std", _three_numbers("std", self.std))
        if min(self.std) <= 0:
            raise InvalidInputError(f"std is {self.std}: every channel's must be above 0")
        for name in ("input_size", "resize_size"):
            if type(getattr(self, name)) is not int:
                raise InvalidInputError(f"{name} is {getattr(self, name)!r}: pass an integer, in pixels")
        if not 0 < self.input_size <= self.resize_size:
            raise InvalidInputError(
                f"input_size is {self.input_size} and resize_size {self.resize_size}: "
                "pass 0 < input_size <= resize_size"
            )
        if self.interpolation not in list(_RESAMPLING):
            raise InvalidInputError(
                f"interpolation is {self.interpolation!r}: pass one of {', '.join(map(repr, _RESAMPLING))}"
            )

    def frame(self, image: Image.Image | Tensor) -> Tensor:
        """Give the whole photograph, its short side `resize_size` pixels.

        Parameters
        ----------
        image
            A PIL image of any mode, or a floating-point tensor [3, H, W] in 0..1, which keeps its size.

        Returns
        -------
        Tensor
            float32 [3, H, W] in 0..1.

        Raises
        ------
        InvalidInputError
            If the image is refused by `image_tensor`, or the long side of a PIL image is more than 20 times
            its short side.
        """
        if not isinstance(image, Image.Image):
            return image_tensor(image)
        image = rgb_image(image)
        width, height = image.size
        short, long = sorted(image.size)
        if long > _MAX_ASPECT_RATIO * short:
            raise InvalidInputError(
                f"the image is {width} x {height} pixels, its long side more than {_MAX_ASPECT_RATIO} times "
                "the short one: cut out the part to explain, or pass a tensor of the size you want"
            )
        # Truncated as in torchvision, so that both see the same pixels.
        long = int(self.resize_size * long / short)
        size = (self.resize_size, long) if width <= height else (long, self.resize_size)
        return image_tensor(image.resize(size, _RESAMPLING[self.interpolation]))

    def view(self, image: Image.Image | Tensor) -> Tensor:
        """Give the pixels the network answers on: `frame`, then the centre crop.

        Parameters
        ----------
        image
            A PIL image of any mode, or a floating-point tensor [3, H, W] in 0..1, which is the view already,
            whatever its size.

        Returns
        -------
        Tensor
            float32 [3, input_size, input_size] in 0..1, or the tensor's own size.

        Raises
        ------
        InvalidInputError
            As `frame`.
        """
        frame = self.frame(image)
        if isinstance(image, Tensor):
            return frame
        # Halves round to even, as in torchvision's CenterCrop.
        top, left = (round((side - self.input_size) / 2.0) for side in frame.shape[1:])
        return frame[:, top : top + self.input_size, left : left + self.input_size].contiguous()

    def __call__(self, batch: Tensor) -> Tensor:
        """Normalise pixels.

        Parameters
        ----------
        batch
            Floating-point [n, 3, h, w] in 0..1, on any device. Values are not checked: that would make the
            host wait for the device.

        Returns
        -------
        Tensor
            ``(batch - mean) / std``, same shape, dtype and device; gradients flow through.

        Raises
        ------
        InvalidInputError
            If the shape or dtype is another.
        """
        if batch.ndim != 4 or batch.shape[1] != 3:
            raise InvalidInputError(
                f"batch has shape {list(batch.shape)}, not [n, 3, h, w]: use image[None] for one image"
            )
        if not batch.is_floating_point():
            raise InvalidInputError(f"batch has dtype {batch.dtype}: pass floating-point pixels in 0..1")
        # As `new_tensor`, but for a GPU the host does not wait.
        constants = torch.tensor([self.mean, self.std], dtype=batch.dtype).to(batch.device, non_blocking=True)
        mean, std = constants[:, :, None, None].unbind()
        return (batch - mean) / std

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as plain JSON types, for `from_dict`."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocess:
        """Rebuild what `to_dict` gave.

        Parameters
        ----------
        values
            Field names to values; those with a default may be left out.

        Returns
        -------
        Preprocess
            Equal to the original.

        Raises
        ------
        InvalidInputError
            If a key is unknown, ``mean`` or ``std`` is missing, or a value is refused.
        """
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
                raise InvalidInputError(f"unknown preprocessing key {key!r}: {hint}")
        missing = [key for key in ("mean", "std") if key not in values]
        if missing:
            raise InvalidInputError(f"preprocessing key {missing[0]!r} is missing: pass three numbers, one per channel")
        return cls(**values)


def _three_numbers(name: str, values: Any) -> tuple[float, float, float]:
    if (
        not isinstance(values, (tuple, list))
        or len(values) != 3
        or not all(isinstance(value, (int, float)) and math.isfinite(value) for value in values)
    ):
        raise InvalidInputError(f"{name} is {values!r}: pass three finite numbers, in units of pixel values 0..1")
    red, green, blue = map(float, values)
    return red, green, blue


IMAGENET = Preprocess(mean=IMAGENET_MEAN, std=IMAGENET_STD, interpolation="bilinear")
