"""Images as they stand in a page: small, in 8 bits, as data URIs, so that no file is beside it."""

from __future__ import annotations

import base64
import functools
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from spade_fast.errors import require
from spade_fast.figures import COLOURS, scaled

_QUALITY = 85


@dataclass(frozen=True)
class Picture:
    """An image of a page.

    Attributes
    ----------
    source
        The image file as a data URI.
    width, height
        In pixels.
    """

    source: str
    width: int
    height: int


def photograph(pixels: Tensor, longest: int) -> Picture:
    """A JPEG of pixels [3, h, w] in 0..1, its sides at most `longest` pixels."""
    values = (255 * _reduced(pixels.float(), longest).clamp(0, 1)).round().byte()
    image = Image.fromarray(values.permute(1, 2, 0).contiguous().numpy())
    return _encoded(image, "jpeg", quality=_QUALITY, optimize=True)


def heat_map(heat: Tensor, longest: int) -> Picture:
    """A PNG of a map [h, w] in the colours and the scale of figures, its sides at most `longest` pixels."""
    values = np.round(255 * scaled(_reduced(heat.float()[None], longest)[0])).astype(np.uint8)
    image = Image.fromarray(values)
    image.putpalette(_palette())
    return _encoded(image, "png", optimize=True)


def _reduced(image: Tensor, longest: int) -> Tensor:
    """An image [c, h, w], means of its pixels where a side would be longer than `longest`."""
    height, width = image.shape[1:]
    if max(height, width) <= longest:
        return image
    size = [max(1, round(side * longest / max(height, width))) for side in (height, width)]
    return F.interpolate(image[None], size=size, mode="area")[0]


def _encoded(image: Image.Image, kind: str, **options: Any) -> Picture:
    stream = io.BytesIO()
    image.save(stream, format=kind, **options)
    source = f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
    return Picture(source, image.width, image.height)


@functools.cache
def _palette() -> bytes:
    colours = require("matplotlib", "interpret").colormaps[COLOURS](np.arange(256), bytes=True)
    return bytes(colours[:, :3].tobytes())
