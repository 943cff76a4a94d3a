"""Patches: drawn, read, pasted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spade_fast.errors import InvalidInputError
from spade_fast.patches import DRAWN, Patch


@pytest.mark.parametrize("name", DRAWN)
def test_patches_are_drawn(name: str) -> None:
    patch = Patch.drawn(name)
    assert patch.name == name
    assert patch.colours.shape == (3, 128, 128)
    assert patch.opacity.shape == (128, 128)
    assert 0 <= patch.colours.min() <= patch.colours.max() <= 1
    covered = (patch.opacity >= 0.5).float()
    assert 0.2 < covered.mean() < 0.9
    assert patch.opacity[0, 0] == patch.opacity[-1, -1] == 0  # corners are transparent
    middle = (covered * torch.arange(128.0)).sum() / covered.sum()
    assert middle.item() == pytest.approx(63.5, abs=1)  # as much to the left as to the right


def test_patches_differ() -> None:
    drawn = [Patch.drawn(name, 16) for name in DRAWN]
    for i, one in enumerate(drawn):
        for other in drawn[:i]:
            assert (one.colours * one.opacity - other.colours * other.opacity).abs().mean() > 0.05


def test_pasting_by_hand() -> None:
    """A patch whose left half is red and opaque, its right half green and half transparent."""
    colours = torch.zeros(3, 4, 4)
    colours[0, :, :2] = colours[1, :, 2:] = 1
    opacity = torch.ones(4, 4)
    opacity[:, 2:] = 0.25
    image = torch.full((3, 6, 8), 0.4)
    before = image.clone()
    pasted, inside = Patch("mine", colours, opacity).pasted(image, 1, 3, 4)
    assert torch.equal(image, before)
    expected = image.clone()
    expected[:, 1:5, 3:5] = torch.tensor([1.0, 0, 0]).view(3, 1, 1)
    expected[:, 1:5, 5:7] = torch.tensor([0.3, 0.55, 0.3]).view(3, 1, 1)
    torch.testing.assert_close(pasted, expected)
    where = torch.zeros(6, 8, dtype=torch.bool)
    where[1:5, 3:5] = True
    assert torch.equal(inside, where)


@pytest.mark.parametrize("side", [16, 40, 200])
def test_patches_keep_their_looks_at_any_size(side: int) -> None:
    patch = Patch.drawn("smiley")
    black, white = (patch.pasted(torch.full((3, 200, 200), shade), 0, 0, side) for shade in (0.0, 1.0))
    assert torch.equal(black[1], white[1])
    assert black[1][:side, :side].float().mean().item() == pytest.approx(0.73, abs=0.03)
    # Where it is opaque, nothing shines through.
    opaque = (black[0] - white[0]).abs().amax(0) < 1e-3
    assert opaque[:side, :side].float().mean() >= 0.5
    assert not black[1][side:].any()


def test_pictures_are_read_as_they_are(tmp_path: Path) -> None:
    pixels = np.zeros((20, 40, 4), dtype=np.uint8)
    pixels[5:15, 10:30] = (0, 0, 255, 255)
    pixels[:5] = (255, 255, 255, 0)  # white, but transparent
    Image.fromarray(pixels, "RGBA").save(tmp_path / "sign.png")
    patch = Patch.read(tmp_path / "sign.png", side=40)
    assert patch.name == "sign"
    assert (patch.opacity >= 0.5).nonzero().amin(0).tolist() == [15, 10]  # centred in a square
    assert (patch.opacity >= 0.5).nonzero().amax(0).tolist() == [24, 29]
    inside = patch.colours[:, 16:24, 12:28]
    torch.testing.assert_close(inside, torch.tensor([0.0, 0, 1]).view(3, 1, 1).expand_as(inside), rtol=0, atol=1e-3)
    pasted, _ = patch.pasted(torch.zeros(3, 40, 40), 0, 0, 40)
    assert pasted[:2].max() < 1e-3  # nothing of the transparent white


def test_pictures_that_cannot_be_patches(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(InvalidInputError, match=r"cannot read '.*text\.png' as a picture"):
        Patch.read(tmp_path / "text.png")
    with pytest.raises(InvalidInputError, match=r"cannot read '.*absent\.png'"):
        Patch.read(tmp_path / "absent.png")
    Image.new("RGBA", (4, 4)).save(tmp_path / "empty.png")
    with pytest.raises(InvalidInputError, match="is transparent everywhere"):
        Patch.read(tmp_path / "empty.png")
    with pytest.raises(InvalidInputError, match="no patch is called 'hart': choose one of heart, smiley"):
        Patch.drawn("hart")


@pytest.mark.parametrize("place", [(-1, 0, 4), (0, 5, 4), (5, 0, 4), (0, 0, 9), (0, 0, 0)])
def test_patches_beyond_the_image(place: tuple[int, int, int]) -> None:
    with pytest.raises(InvalidInputError, match="is not within an image of 8 x 8: make it smaller"):
        Patch.drawn("star").pasted(torch.zeros(3, 8, 8), *place)


def test_places_and_sizes_at_random() -> None:
    patch, image = Patch.drawn("heart"), torch.rand(3, 40, 60)
    share, row, column = torch.rand(3, generator=torch.Generator().manual_seed(4)).tolist()
    attacked, inside = patch.pasted_at_random(image, (0.2, 0.8), torch.Generator().manual_seed(4))
    side = round(40 * (0.2 + 0.6 * share))
    expected, where = patch.pasted(image, round((40 - side) * row), round((60 - side) * column), side)
    assert torch.equal(attacked, expected)
    assert torch.equal(inside, where)
    assert min(abs(row - column), abs(share - 0)) > 0.05  # so that no two could be mistaken
