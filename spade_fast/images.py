"""Photographs in: files and PIL images to RGB pixels, and the checks an image tensor must pass."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from spade_fast.errors import InvalidInputError
from spade_fast.files import digest

_WHITE = (255, 255, 255)
_LARGEST_FILE = 2**30
# Resampling and half precision overshoot 0..1 by about this much; normalised pixels by far more.
_RANGE_TOLERANCE = 1e-3


def load_image(path: str | os.PathLike[str], *, background: tuple[int, int, int] = _WHITE) -> Image.Image:
    """Read a photograph from a file, as an image viewer shows it.

    See `rgb_image` for what is converted and how. Of an animation or a multi-page file, the first frame.

    Parameters
    ----------
    path
        Image file in any format Pillow reads.
    background
        Red, green, blue in 0..255, seen through transparent pixels.

    Returns
    -------
    PIL.Image.Image
        Mode RGB, pixels in memory, the file closed.

    Raises
    ------
    InvalidInputError
        If the file is missing, a directory, empty, damaged, not an image, or has more than
        ``PIL.Image.MAX_IMAGE_PIXELS`` pixels (where Pillow itself only warns, up to twice as many).
    """
    if not isinstance(path, (str, os.PathLike)):
        raise InvalidInputError(f"path is a {type(path).__name__}: pass the name of an image file")
    where = _where(path)
    _check_file(path, where)
    with _refusals(where):
        return _decoded(path, background)


def read_image_file(path: str | os.PathLike[str]) -> bytes:
    """The bytes of an image file, for :func:`decoded_image`.

    Raises
    ------
    InvalidInputError
        If it is missing, no regular file, empty, or of more than a gibibyte.
    """
    where = _where(path)
    _check_file(path, where)
    with _refusals(where), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size <= _LARGEST_FILE:
            return file.read()
    raise InvalidInputError(f"{where} has {size} bytes, more than {_LARGEST_FILE}: make it smaller")


def decoded_image(content: bytes, path: str | os.PathLike[str]) -> Image.Image:
    """What :func:`load_image` gives of a file, from its bytes; `path` is for the message of a refusal."""
    with _refusals(_where(path)):
        return _decoded(io.BytesIO(content), _WHITE)


def _where(path: str | os.PathLike[str]) -> str:
    return f"image file {os.fspath(path)!r}"


def _check_file(path: str | os.PathLike[str], where: str) -> None:
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise InvalidInputError(f"{where} is no regular file, which might never end: copy its contents to one")
    if os.path.isfile(path) and os.path.getsize(path) == 0:
        raise InvalidInputError(f"{where} is empty (0 bytes): copy or download it again")


def _decoded(source: str | os.PathLike[str] | io.BytesIO, background: tuple[int, int, int]) -> Image.Image:
    with Image.open(source) as image:
        # Not by making Pillow's warning an error: the warning filters are shared by all threads.
        if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError(
                f"{image.width} x {image.height} pixels exceed the limit of {Image.MAX_IMAGE_PIXELS}"
            )
        return rgb_image(image, background=background)


@contextlib.contextmanager
def _refusals(where: str) -> Iterator[None]:
    """Turn whatever goes wrong with a file into a refusal that says where."""
    try:
        yield
    except InvalidInputError as error:
        raise InvalidInputError(f"{where}: {error}") from (error.__cause__ or error)
    except FileNotFoundError as error:
        raise InvalidInputError(f"{where} does not exist: check the path") from error
    except IsADirectoryError as error:
        raise InvalidInputError(f"{where} is a directory: name one image file in it") from error
    except UnidentifiedImageError as error:
        raise InvalidInputError(
            f"{where} is not an image in a format Pillow {PIL.__version__} reads: convert it to PNG or JPEG"
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InvalidInputError(
            f"{where} is too large to decode safely ({error}): make it smaller, "
            "or raise PIL.Image.MAX_IMAGE_PIXELS if you trust the file"
        ) from error
    except MemoryError:
        raise
    except Exception as error:
        raise InvalidInputError(
            f"{where} cannot be opened ({type(error).__name__}: {error}): check that it is whole and may be read"
        ) from error


def rgb_image(image: Image.Image, *, background: tuple[int, int, int] = _WHITE) -> Image.Image:
    """Convert a PIL image of any mode to RGB, as an image viewer shows it.

    EXIF rotation is applied; transparency (alpha channel, palette or key colour) is composited on
    `background`; grayscale, palette, CMYK and the other modes are converted. Deep grayscale is scaled to
    8 bits by the range of its format: 0..65535 in the 16-bit modes and in ``I``, 0..1 in ``F`` (Pillow's
    ``convert`` clips at 255 instead). ICC profiles are left alone: the numbers are taken as sRGB.

    Parameters
    ----------
    image
        Image of any mode; it is not changed.
    background
        Red, green, blue in 0..255, seen through transparent pixels.

    Returns
    -------
    PIL.Image.Image
        Mode RGB.

    Raises
    ------
    InvalidInputError
        If the image has no pixels, cannot be decoded, holds deep grayscale outside its range, or if
        `background` is not three integers in 0..255.
    """
    if len(background) != 3 or not all(isinstance(c, int) and 0 <= c <= 255 for c in background):
        raise InvalidInputError(f"background is {background!r}: pass red, green, blue as integers in 0..255")
    if 0 in image.size:
        raise InvalidInputError(f"the image has no pixels ({image.width} x {image.height}): pass at least 1 x 1")
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith(("I", "F")):
            image = _eight_bit(image)
        if not image.has_transparency_data:
            return image.convert("RGB")
        if image.mode == "La":  # Pillow has no direct way from here to RGBA
            image = image.convert("LA")
        canvas = Image.new("RGBA", image.size, (*background, 255))
        return Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")
    except InvalidInputError:
        raise
    # On a damaged file Pillow's decoders raise nearly every type there is.
    except Exception as error:
        raise InvalidInputError(
            f"the image cannot be decoded ({type(error).__name__}: {error}): if the file is "
            "damaged or cut short, copy or download it again"
        ) from error


def _eight_bit(image: Image.Image) -> Image.Image:
    """Scale deep grayscale (modes I;16*, I, F) to mode L, or LA where a key colour is transparent."""
    values = np.asarray(image)
    top = 1.0 if image.mode == "F" else 65535.0
    low, high = values.min(), values.max()
    if not 0 <= low <= high <= top:  # also false for NaN
        raise InvalidInputError(
            f"grayscale values of mode {image.mode} span {low:g} to {high:g}, outside 0..{top:g}: "
            "scale them to that range first"
        )
    scaled = Image.fromarray(np.rint(values * (255.0 / top)).astype(np.uint8))
    key = image.info.get("transparency")
    if isinstance(key, int):
        scaled.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return scaled


def image_tensor(image: Image.Image | Tensor) -> Tensor:
    """Give the pixels of an image as a tensor, or check a tensor of pixels.

    Parameters
    ----------
    image
        A PIL image of any mode, converted by `rgb_image` on white; or a floating-point tensor [3, H, W] of
        pixel values in 0..1, on any device.

    Returns
    -------
    Tensor
        float32 [3, H, W] in 0..1, detached, on the tensor's device (CPU for a PIL image). A float32 tensor
        is not copied. Values up to 0.001 outside 0..1, as resampling leaves them, are clamped.

    Raises
    ------
    InvalidInputError
        If the type, dtype or shape is another, or a value is NaN, infinite or outside 0..1.
    """
    if isinstance(image, Image.Image):
        pixels = torch.from_numpy(np.array(rgb_image(image)))
        return pixels.permute(2, 0, 1).contiguous().to(torch.float32).div_(255)
    if not isinstance(image, Tensor):
        raise InvalidInputError(f"image is a {_type_name(image)}: {_type_cure(image)}")
    if not image.is_floating_point():
        raise InvalidInputError(
            f"image tensor has dtype {image.dtype}: convert it to float and divide by 255 (or by the largest "
            "value of its format), so that pixels are in 0..1"
        )
    if image.layout != torch.strided or image.is_meta:
        kind = "has no values, being on the meta device" if image.is_meta else f"has layout {image.layout}"
        raise InvalidInputError(f"image tensor {kind}: pass a dense tensor [3, H, W] of pixel values")
    _check_shape(image)
    image = image.detach().to(torch.float32)
    finite = image.isfinite()
    if not finite.all():
        bad = (~finite).nonzero()
        channel, row, column = bad[0].tolist()
        raise InvalidInputError(
            f"{len(bad)} of {image.numel()} pixel values are NaN or infinite, the first "
            f"({image[channel, row, column].item()}) at channel {channel}, row {row}, column {column}: "
            "mend the image where it was made"
        )
    low, high = (bound.item() for bound in image.aminmax())
    if low < -_RANGE_TOLERANCE or high > 1 + _RANGE_TOLERANCE:
        if low < -_RANGE_TOLERANCE:
            cure = "looks normalised already: pass pixel values, normalisation belongs to preprocess="
        else:
            cure = "divide by the largest value of its format (255 for 8 bits)"
        raise InvalidInputError(f"pixel values span {low:g} to {high:g}, outside 0..1: {cure}")
    return image if low >= 0 and high <= 1 else image.clamp(0, 1)


def photograph_digest(image: Image.Image | Tensor) -> str:
    """SHA-256 of the pixels of a photograph, of any size: tells whether two are the same one."""
    pixels = image if isinstance(image, Tensor) else torch.from_numpy(np.array(rgb_image(image)))
    return digest({"pixels": pixels})


def _type_name(value: Any) -> str:
    module = type(value).__module__
    return type(value).__name__ if module == "builtins" else f"{module}.{type(value).__name__}"


def _type_cure(value: Any) -> str:
    if isinstance(value, (str, os.PathLike)):
        return f"read the file first, load_image({os.fspath(value)!r})"
    if isinstance(value, np.ndarray):
        return "pass PIL.Image.fromarray(array) for uint8 [H, W, 3], or a float tensor [3, H, W] in 0..1"
    return "pass a PIL image or a float tensor [3, H, W] in 0..1"


def _check_shape(image: Tensor) -> None:
    shape = tuple(image.shape)
    if image.ndim == 3 and shape[0] == 3:
        if image.numel() > 0:
            return
        cure = "it has no pixels, pass at least 1 x 1"
    elif image.ndim == 3 and shape[2] == 3:
        cure = "channels come first, use image.permute(2, 0, 1)"
    elif image.ndim == 4 and shape[:2] == (1, 3):
        cure = "it is a batch of one, use image[0]"
    elif image.ndim == 4:
        cure = "it is a batch, pass its images one by one"
    elif image.ndim == 2 or (image.ndim == 3 and shape[0] == 1):
        cure = "it is grayscale, use image.expand(3, -1, -1)"
    elif image.ndim == 3 and shape[0] == 4:
        cure = "composite its alpha channel on a background first"
    else:
        cure = "pass red, green and blue planes"
    raise InvalidInputError(f"image tensor has shape {list(shape)}, not [3, H, W]: {cure}")
