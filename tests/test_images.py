"""Photographs to pixels: each mode and file a user may hand over, and each refusal."""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spade_fast.errors import InvalidInputError
from spade_fast.images import image_tensor, load_image, read_image_file, rgb_image

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def noise(height: int = 5, width: int = 7) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def write_png_header(path: Path, width: int, height: int) -> Path:
    """Write a PNG that claims a size and holds almost no data."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))
    return path


def test_rgb_file_is_read_unchanged(tmp_path):
    noise().save(tmp_path / "rgb.png")
    loaded = load_image(tmp_path / "rgb.png")
    assert loaded.mode == "RGB"
    assert np.array_equal(loaded, noise())
    assert np.array_equal(load_image(str(tmp_path / "rgb.png")), noise())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied_once(tmp_path, orientation):
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = noise().transpose(undo[orientation]) if orientation in undo else noise()
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "rotated.png", exif=exif)

    loaded = load_image(tmp_path / "rotated.png")
    assert np.array_equal(loaded, noise())
    # The tag is gone from what was loaded, so that the next conversion does not rotate again.
    assert torch.equal(image_tensor(loaded), image_tensor(noise()))


@pytest.mark.parametrize("background", [WHITE, BLUE])
def test_alpha_is_composited_on_the_background(tmp_path, background):
    image = Image.new("RGBA", (3, 1))
    image.putdata([(255, 0, 0, 255), (255, 0, 0, 0), (255, 0, 0, 51)])
    image.save(tmp_path / "rgba.png")
    loaded = load_image(tmp_path / "rgba.png", background=background)
    mixed = tuple(round(0.2 * red + 0.8 * behind) for red, behind in zip(RED, background, strict=True))
    assert [loaded.getpixel((x, 0)) for x in range(3)] == [RED, background, mixed]


def test_gray_alpha_is_composited(tmp_path):
    image = Image.new("LA", (2, 1))
    image.putdata([(100, 255), (100, 0)])
    image.save(tmp_path / "la.png")
    loaded = load_image(tmp_path / "la.png", background=GREEN)
    assert [loaded.getpixel((x, 0)) for x in range(2)] == [(100, 100, 100), GREEN]


@pytest.mark.parametrize("transparency", [1, bytes([255, 0])], ids=["index", "table"])
def test_palette_transparency_is_composited(tmp_path, transparency):
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putdata([0, 1])
    image.save(tmp_path / "p.png", transparency=transparency)
    loaded = load_image(tmp_path / "p.png", background=GREEN)
    assert [loaded.getpixel((x, 0)) for x in range(2)] == [RED, GREEN]


def test_opaque_palette_is_converted(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putdata([0, 1])
    image.save(tmp_path / "p.gif")
    loaded = load_image(tmp_path / "p.gif")
    assert [loaded.getpixel((x, 0)) for x in range(2)] == [RED, BLUE]


def test_one_bit_is_converted(tmp_path):
    image = Image.new("1", (2, 1))
    image.putdata([0, 1])
    image.save(tmp_path / "one.png")
    loaded = load_image(tmp_path / "one.png")
    assert [loaded.getpixel((x, 0)) for x in range(2)] == [(0, 0, 0), WHITE]


def test_cmyk_is_converted(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.tiff")
    assert load_image(tmp_path / "cmyk.tiff").getpixel((4, 4)) == RED


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, suffix):
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"deep.{suffix}")
    loaded = np.asarray(load_image(tmp_path / f"deep.{suffix}"))
    assert loaded[0].tolist() == [[v, v, v] for v in (0, 1, 128, 255)]


def test_sixteen_bit_key_colour_is_transparent(tmp_path):
    Image.fromarray(np.array([[257, 65535]], dtype=np.uint16)).save(tmp_path / "key.png", transparency=257)
    loaded = load_image(tmp_path / "key.png", background=GREEN)
    assert [loaded.getpixel((x, 0)) for x in range(2)] == [GREEN, WHITE]


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L", "I"])
def test_deep_modes_share_the_range_of_sixteen_bits(mode):
    image = Image.new(mode, (2, 1))
    image.putpixel((1, 0), 65535)
    assert np.asarray(rgb_image(image)).tolist() == [[[0] * 3, [255] * 3]]


def test_float_mode_is_zero_to_one(tmp_path):
    Image.fromarray(np.array([[0.0, 0.2, 1.0]], dtype=np.float32)).save(tmp_path / "float.tiff")
    assert np.asarray(load_image(tmp_path / "float.tiff"))[0, :, 0].tolist() == [0, 51, 255]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.array([[0, 65536]], dtype=np.int32), r"mode I span 0 to 65536, outside 0\.\.65535"),
        (np.array([[-1, 5]], dtype=np.int32), r"mode I span -1 to 5"),
        (np.array([[0, 255]], dtype=np.float32), r"mode F span 0 to 255, outside 0\.\.1"),
        (np.array([[0, np.nan]], dtype=np.float32), r"mode F span nan to nan"),
    ],
)
def test_deep_values_outside_their_range_are_refused(values, said):
    with pytest.raises(InvalidInputError, match=f"^grayscale values of {said}"):
        rgb_image(Image.fromarray(values))


@pytest.mark.parametrize("mode", Image.MODES)
def test_every_mode_gives_pixels(mode):
    pixels = image_tensor(Image.new(mode, (4, 3)))
    assert pixels.shape == (3, 3, 4)
    assert pixels.dtype == torch.float32
    assert ((pixels >= 0) & (pixels <= 1)).all()


def test_the_image_given_is_not_changed():
    image = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    rgb_image(image)
    assert image.mode == "RGBA"
    assert image.getpixel((0, 0)) == (255, 0, 0, 0)


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLUE)]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "two.gif").getpixel((0, 0)) == RED


def test_colour_profile_is_left_alone(tmp_path):
    noise().save(tmp_path / "icc.png", icc_profile=b"not really a profile")
    assert np.array_equal(load_image(tmp_path / "icc.png"), noise())


def test_file_is_closed(tmp_path, monkeypatch):
    opened = []
    plain_open = Image.open

    def remember(path):
        opened.append(plain_open(path))
        return opened[-1]

    monkeypatch.setattr(Image, "open", remember)
    noise(100, 100).save(tmp_path / "closed.jpg")
    load_image(tmp_path / "closed.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "closed.jpg").read_bytes()[:-500])
    with pytest.raises(InvalidInputError):
        load_image(tmp_path / "cut.jpg")
    assert len(opened) == 2
    assert all(getattr(image, "fp", None) is None or image.fp.closed for image in opened)


def test_missing_file(tmp_path):
    with pytest.raises(InvalidInputError, match=r"nowhere\.png' does not exist: check the path") as caught:
        load_image(tmp_path / "nowhere.png")
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_directory(tmp_path):
    with pytest.raises(InvalidInputError, match=r"is a directory: name one image file in it") as caught:
        load_image(tmp_path)
    assert isinstance(caught.value.__cause__, IsADirectoryError)


def test_empty_file(tmp_path):
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(InvalidInputError, match=r"empty\.jpg' is empty \(0 bytes\)"):
        load_image(tmp_path / "empty.jpg")


def test_file_that_is_no_image(tmp_path):
    (tmp_path / "letter.png").write_text("Dear network,")
    with pytest.raises(InvalidInputError, match=r"letter\.png' is not an image .* convert it to PNG or JPEG"):
        load_image(tmp_path / "letter.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "tiff"])
@pytest.mark.parametrize("kept", [0.5, 0.9])
def test_truncated_file(tmp_path, suffix, kept):
    noise(100, 100).save(tmp_path / f"whole.{suffix}")
    data = (tmp_path / f"whole.{suffix}").read_bytes()
    (tmp_path / f"cut.{suffix}").write_bytes(data[: int(kept * len(data))])
    with pytest.raises(InvalidInputError, match=rf"cut\.{suffix}'.*(is not an image|cannot be)") as caught:
        load_image(tmp_path / f"cut.{suffix}")
    assert not isinstance(caught.value.__cause__, InvalidInputError)
    assert caught.value.__cause__ is not None


def test_truncated_header(tmp_path):
    noise().save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:20])
    with pytest.raises(InvalidInputError, match=r"cut\.png'"):
        load_image(tmp_path / "cut.png")


def test_a_file_that_is_larger_than_any_image_is_not_read(tmp_path):
    path = tmp_path / "vast.png"
    path.touch()
    os.truncate(path, 2**30 + 1)  # which takes no space
    with pytest.raises(InvalidInputError, match=r"vast\.png' has 1073741825 bytes, more than 1073741824"):
        read_image_file(path)
    os.truncate(path, 1000)
    assert read_image_file(path) == bytes(1000)


def test_name_no_file_can_have():
    with pytest.raises(InvalidInputError, match=r"cannot be opened \(ValueError: embedded null byte\)"):
        load_image("a\0b.png")


@pytest.mark.parametrize("filter_", ["error", "ignore"])
@pytest.mark.parametrize("side", [10_000, 30_000], ids=["Pillow warns", "Pillow refuses"])
def test_decompression_bomb(tmp_path, side, filter_):
    path = write_png_header(tmp_path / "bomb.png", side, side)
    with warnings.catch_warnings():
        warnings.simplefilter(filter_)
        before = list(warnings.filters)
        with pytest.raises(InvalidInputError, match=r"bomb\.png' is too large .*MAX_IMAGE_PIXELS") as caught:
            load_image(path)
        assert warnings.filters == before
    assert isinstance(caught.value.__cause__, (Image.DecompressionBombError, Image.DecompressionBombWarning))


def test_decompression_limit_is_the_users(tmp_path, monkeypatch):
    noise().save(tmp_path / "small.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5 * 7)
    load_image(tmp_path / "small.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    load_image(tmp_path / "small.png")


@pytest.mark.parametrize("background", [(0, 0), (0, 0, 256), (0.5, 0.5, 0.5)])
def test_background_that_is_no_colour(tmp_path, background):
    noise().save(tmp_path / "rgb.png")
    with pytest.raises(InvalidInputError, match=r"background is .* integers in 0\.\.255"):
        load_image(tmp_path / "rgb.png", background=background)


def test_path_of_another_type():
    with pytest.raises(InvalidInputError, match="path is a Image: pass the name of an image file"):
        load_image(noise())


def test_image_without_pixels():
    with pytest.raises(InvalidInputError, match=r"no pixels \(0 x 5\)"):
        image_tensor(Image.new("RGB", (0, 5)))


def test_damaged_file_opened_by_the_user(tmp_path):
    noise(100, 100).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-500])
    with (
        Image.open(tmp_path / "cut.jpg") as image,
        pytest.raises(InvalidInputError, match="cannot be decoded"),
    ):
        image_tensor(image)


def test_pil_pixels_become_channels_first():
    image = Image.new("RGB", (2, 1))
    image.putdata([(255, 0, 51), (0, 102, 255)])
    expected = torch.tensor([[[1, 0]], [[0, 0.4]], [[0.2, 1]]])
    torch.testing.assert_close(image_tensor(image), expected)
    assert image_tensor(image).is_contiguous()


def test_valid_tensor_is_given_back():
    image = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0))
    assert image_tensor(image).data_ptr() == image.data_ptr()


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.rand(3, 4, 5).to_sparse(), "image tensor has layout torch.sparse_coo: pass a dense tensor"),
        (torch.rand(3, 4, 5, device="meta"), "image tensor has no values, being on the meta device"),
    ],
)
def test_tensors_without_plain_values(pixels, message):
    with pytest.raises(InvalidInputError, match=message):
        image_tensor(pixels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_become_float32(dtype):
    image = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    converted = image_tensor(image)
    assert converted.dtype == torch.float32
    assert torch.equal(converted, image.float())


def test_gradient_is_detached():
    image = torch.full((3, 2, 2), 0.5, requires_grad=True)
    assert not image_tensor(image).requires_grad
    assert image.requires_grad


def test_small_overshoot_is_clamped():
    image = torch.tensor([-0.0009, 0.5, 1.0009]).view(3, 1, 1)
    assert image_tensor(image).flatten().tolist() == [0, 0.5, 1]
    assert image[0, 0, 0] == pytest.approx(-0.0009)


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (torch.zeros(3, 2, 2, dtype=torch.uint8), r"dtype torch\.uint8: .* divide by 255"),
        (torch.zeros(2, 2, 3), r"\[2, 2, 3\], not \[3, H, W\]: .*permute\(2, 0, 1\)"),
        (torch.zeros(1, 3, 2, 2), r"\[1, 3, 2, 2\].* batch of one, use image\[0\]"),
        (torch.zeros(5, 3, 2, 2), r"\[5, 3, 2, 2\].* one by one"),
        (torch.zeros(2, 2), r"\[2, 2\].* grayscale, use image\.expand\(3, -1, -1\)"),
        (torch.zeros(1, 2, 2), r"\[1, 2, 2\].* grayscale"),
        (torch.zeros(4, 2, 2), r"\[4, 2, 2\].* alpha"),
        (torch.zeros(5, 2, 2), r"\[5, 2, 2\].* red, green and blue"),
        (torch.zeros(3, 0, 2), r"\[3, 0, 2\].* no pixels"),
        (torch.full((3, 2, 2), -2.0), r"span -2 to -2, outside 0\.\.1: looks normalised .* preprocess="),
        (torch.tensor([0.0, 7.0, 255.0]).view(3, 1, 1), r"span 0 to 255.* divide by .*255"),
        (torch.full((3, 2, 2), 1.002), r"outside 0\.\.1"),
        (np.zeros((2, 2, 3)), r"image is a numpy\.ndarray: pass PIL\.Image\.fromarray"),
        ("cat.jpg", r"image is a str: read the file first, load_image\('cat\.jpg'\)"),
        (Path("cat.jpg"), r"load_image\('cat\.jpg'\)"),
        ([torch.zeros(3, 2, 2)], r"image is a list: pass a PIL image or a float tensor"),
        (None, r"image is a NoneType"),
    ],
)
def test_refusals_name_what_and_cure(image, said):
    with pytest.raises(InvalidInputError, match=said):
        image_tensor(image)


def test_non_finite_values_are_counted_and_located():
    image = torch.zeros(3, 4, 5)
    image[1, 2, 3] = float("inf")
    image[2, 0, 0] = float("nan")
    with pytest.raises(InvalidInputError, match=r"2 of 60 .* \(inf\) at channel 1, row 2, column 3"):
        image_tensor(image)
