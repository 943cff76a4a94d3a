"""Patches: small pictures to be pasted into images, drawn here or read from files."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from spade_fast.errors import InvalidInputError

_SIDE = 128
_OVERSAMPLING = 8
# A pixel belongs to a patch from this opacity on.
_OPAQUE = 0.5


@dataclass(frozen=True, eq=False)
class Patch:
    """A picture with transparency.

    Attributes
    ----------
    name
        What it is called.
    colours
        float32 [3, side, side], 0..1.
    opacity
        float32 [side, side], 0..1.
    """

    name: str
    colours: Tensor
    opacity: Tensor

    @classmethod
    def drawn(cls, name: str, side: int = _SIDE) -> Patch:
        """One of :data:`DRAWN`.

        Raises
        ------
        InvalidInputError
            If there is none of that name.
        """
        if name not in DRAWN:
            raise InvalidInputError(f"no patch is called {name!r}: choose one of {', '.join(DRAWN)}, or a PNG file")
        large = side * _OVERSAMPLING
        canvas = Image.new("RGBA", (large, large), (0, 0, 0, 0))
        DRAWN[name](ImageDraw.Draw(canvas), large)
        return cls._of(name, canvas, side)

    @classmethod
    def read(cls, path: str | os.PathLike[str], side: int = _SIDE) -> Patch:
        """A picture file; what is transparent in it does not belong to the patch. Called by the file's name.

        Raises
        ------
        InvalidInputError
            If the file cannot be read as a picture, or is transparent everywhere.
        """
        try:
            with Image.open(path) as file:
                picture = file.convert("RGBA")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise InvalidInputError(
                f"cannot read {os.fspath(path)!r} as a picture ({error}): pass a PNG file"
            ) from error
        longest = max(picture.size)
        square = Image.new("RGBA", (longest, longest), (0, 0, 0, 0))
        square.paste(picture, ((longest - picture.width) // 2, (longest - picture.height) // 2))
        patch = cls._of(Path(path).stem, square, side)
        if not (patch.opacity >= _OPAQUE).any():
            raise InvalidInputError(f"{os.fspath(path)!r} is transparent everywhere: there is nothing to paste")
        return patch

    @classmethod
    def _of(cls, name: str, picture: Image.Image, side: int) -> Patch:
        # Colours by their opacity, or transparent pixels would shine through at the edges.
        data = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(picture.height, picture.width, 4)
        pixels = data.permute(2, 0, 1).float() / 255
        small = _resized(torch.cat([pixels[:3] * pixels[3:], pixels[3:]]), side)
        return cls(name, small[:3] / small[3:].clamp_min(1e-6), small[3])

    def pasted(self, image: Tensor, top: int, left: int, side: int) -> tuple[Tensor, Tensor]:
        """Paste the patch into an image.

        Parameters
        ----------
        image
            [3, h, w], pixel values in 0..1.
        top, left, side
            The square in which it appears, in pixels, within the image.

        Returns
        -------
        image, inside
            A new image like the one given; bool [h, w], True where the patch is.

        Raises
        ------
        InvalidInputError
            If the square is not within the image.
        """
        height, width = image.shape[1:]
        if side < 1 or top < 0 or left < 0 or top + side > height or left + side > width:
            raise InvalidInputError(
                f"a patch of {side} x {side} pixels at row {top} and column {left} is not within an image of "
                f"{height} x {width}: make it smaller"
            )
        small = _resized(torch.cat([self.colours * self.opacity, self.opacity[None]]), side).to(image)
        result, rows, columns = image.clone(), slice(top, top + side), slice(left, left + side)
        result[:, rows, columns] = small[:3] + (1 - small[3]) * image[:, rows, columns]
        inside = torch.zeros(height, width, dtype=torch.bool, device=image.device)
        inside[rows, columns] = small[3] >= _OPAQUE
        return result, inside

    def pasted_at_random(
        self, image: Tensor, sizes: tuple[float, float], generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Paste the patch at a random place and size.

        Parameters
        ----------
        image
            [3, h, w], pixel values in 0..1.
        sizes
            Smallest and largest side of the patch, as shares of the image's shorter side.
        generator
            On the CPU.

        Returns
        -------
        image, inside
            As :meth:`pasted`.
        """
        height, width = image.shape[1:]
        share, row, column = torch.rand(3, generator=generator).tolist()
        side = round(min(height, width) * (sizes[0] + (sizes[1] - sizes[0]) * share))
        return self.pasted(image, round((height - side) * row), round((width - side) * column), side)


def check_sizes(sizes: tuple[float, float]) -> tuple[float, float]:
    """The smallest and the largest side of a patch, if they are shares of the image's.

    Raises
    ------
    InvalidInputError
        Otherwise.
    """
    if not (isinstance(sizes, tuple) and len(sizes) == 2 and 0 < sizes[0] <= sizes[1] <= 1):
        raise InvalidInputError(f"sizes must be two shares of the image with 0 < least <= most <= 1, got {sizes!r}")
    return sizes


def _resized(pixels: Tensor, side: int) -> Tensor:
    found = F.interpolate(pixels[None], (side, side), mode="bilinear", align_corners=False, antialias=True)
    return found[0].clamp(0, 1)


def _heart(draw: ImageDraw.ImageDraw, side: int) -> None:
    turns = [2 * math.pi * i / 200 for i in range(200)]
    points = [
        (
            side / 2 + side * 0.029 * 16 * math.sin(t) ** 3,
            side * 0.46
            - side * 0.029 * (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)),
        )
        for t in turns
    ]
    draw.polygon(points, fill=(214, 20, 60, 255))
    draw.ellipse(_box(side, 0.27, 0.26, 0.1), fill=(255, 160, 180, 255))


def _smiley(draw: ImageDraw.ImageDraw, side: int) -> None:
    draw.ellipse(_box(side, 0.5, 0.5, 0.48), fill=(255, 208, 0, 255), outline=(120, 80, 0, 255), width=side // 40)
    for x in (0.34, 0.66):
        draw.ellipse(_box(side, x, 0.38, 0.075), fill=(40, 25, 0, 255))
    draw.arc(_box(side, 0.5, 0.5, 0.29), 20, 160, fill=(40, 25, 0, 255), width=side // 16)


def _star(draw: ImageDraw.ImageDraw, side: int) -> None:
    draw.polygon(_spikes(side, 5, 0.2), fill=(40, 90, 230, 255))
    draw.polygon(
        [((x - side / 2) * 0.5 + side / 2, (y - side / 2) * 0.5 + side / 2) for x, y in _spikes(side, 5, 0.2)],
        fill=(170, 200, 255, 255),
    )


def _flower(draw: ImageDraw.ImageDraw, side: int) -> None:
    for petal in range(6):
        turn = math.pi * petal / 3
        draw.ellipse(_box(side, 0.5 + 0.3 * math.cos(turn), 0.5 + 0.3 * math.sin(turn), 0.18), fill=(150, 40, 190, 255))
    draw.ellipse(_box(side, 0.5, 0.5, 0.17), fill=(255, 240, 120, 255))


def _target(draw: ImageDraw.ImageDraw, side: int) -> None:
    for ring, radius in enumerate((0.48, 0.36, 0.24, 0.12)):
        draw.ellipse(_box(side, 0.5, 0.5, radius), fill=(0, 150, 80, 255) if ring % 2 == 0 else (255, 255, 255, 255))


def _box(side: int, x: float, y: float, radius: float) -> tuple[float, float, float, float]:
    return side * (x - radius), side * (y - radius), side * (x + radius), side * (y + radius)


def _spikes(side: int, count: int, inner: float) -> list[tuple[float, float]]:
    radii = [0.49 if i % 2 == 0 else inner for i in range(2 * count)]
    turns = [math.pi * i / count - math.pi / 2 for i in range(2 * count)]
    return [
        (side * (0.5 + radius * math.cos(t)), side * (0.52 + radius * math.sin(t)))
        for radius, t in zip(radii, turns, strict=True)
    ]


#: Patches that :meth:`Patch.drawn` draws.
DRAWN: dict[str, Callable[[ImageDraw.ImageDraw, int], None]] = {
    "heart": _heart,
    "smiley": _smiley,
    "star": _star,
    "flower": _flower,
    "target": _target,
}
