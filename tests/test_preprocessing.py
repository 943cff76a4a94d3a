"""Preprocessing equals torchvision's, pixel for pixel."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from spade_fast.errors import InvalidInputError
from spade_fast.preprocessing import IMAGENET, IMAGENET_MEAN, IMAGENET_STD, Preprocess

HALF = (0.5, 0.5, 0.5)
SIZES = [
    (512, 512),
    (400, 600),
    (601, 401),
    (333, 777),
    (224, 225),
    (257, 256),
    (256, 256),
    (1000, 51),
    (31, 7),
]


def photograph(height: int, width: int) -> Image.Image:
    """Make smooth shapes with edges and some grain, as a photograph has."""
    rng = np.random.default_rng(height * 10_000 + width)
    y, x = np.mgrid[0:height, 0:width]
    waves = [127 + 100 * np.sin(x / (9 + 4 * c)) * np.cos(y / (17 - 3 * c)) for c in range(3)]
    image = np.stack(waves, axis=2) + rng.normal(0, 12, (height, width, 3))
    image[height // 3 : height // 2, width // 4 : width // 2] = (250, 10, 60)
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))


def published(preprocess: Preprocess):
    transforms = pytest.importorskip("torchvision.transforms")
    return transforms.Compose(
        [
            transforms.Resize(preprocess.resize_size, transforms.InterpolationMode(preprocess.interpolation)),
            transforms.CenterCrop(preprocess.input_size),
            transforms.ToTensor(),
            transforms.Normalize(preprocess.mean, preprocess.std),
        ]
    )


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    "preprocess",
    [
        IMAGENET,
        Preprocess(mean=HALF, std=HALF),
        Preprocess(mean=IMAGENET_MEAN, std=IMAGENET_STD, input_size=299, resize_size=342),
        Preprocess(mean=HALF, std=HALF, input_size=64, resize_size=64, interpolation="bilinear"),
        Preprocess(mean=HALF, std=HALF, input_size=33, resize_size=72),
    ],
    ids=["imagenet", "lite0", "299", "64", "odd"],
)
def test_equals_torchvision(preprocess, size):
    image = photograph(*size)
    ours = preprocess(preprocess.view(image)[None])[0]
    torch.testing.assert_close(ours, published(preprocess)(image), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea"])
def test_equals_torchvision_on_photographs(name):
    data = pytest.importorskip("skimage.data")
    image = Image.fromarray(getattr(data, name)())
    ours = IMAGENET(IMAGENET.view(image)[None])[0]
    torch.testing.assert_close(ours, published(IMAGENET)(image), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_frame_equals_torchvisions_resize(size):
    transforms = pytest.importorskip("torchvision.transforms")
    image = photograph(*size)
    expected = transforms.ToTensor()(transforms.Resize(256)(image))
    torch.testing.assert_close(IMAGENET.frame(image), expected, rtol=0, atol=1e-6)


def test_view_is_the_middle_of_the_frame():
    small = Preprocess(mean=HALF, std=HALF, input_size=2, resize_size=5)
    frame = small.frame(photograph(5, 9))
    assert frame.shape == (3, 5, 9)
    # Margins of 1.5 and 3.5 pixels: halves go to the even neighbour.
    assert torch.equal(small.view(photograph(5, 9)), frame[:, 2:4, 4:6])


def test_rotation_is_applied_before_the_size_is_taken(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    photograph(300, 600).save(tmp_path / "portrait.png", exif=exif)
    with Image.open(tmp_path / "portrait.png") as image:
        assert IMAGENET.frame(image).shape == (3, 512, 256)


def test_tensor_is_its_own_frame_and_view():
    image = torch.rand(3, 50, 70, generator=torch.Generator().manual_seed(0))
    assert torch.equal(IMAGENET.frame(image), image)
    assert torch.equal(IMAGENET.view(image), image)


@pytest.mark.parametrize("method", ["frame", "view"])
def test_tensor_is_validated(method):
    with pytest.raises(InvalidInputError, match="looks normalised already"):
        getattr(IMAGENET, method)(torch.full((3, 4, 4), -1.0))


@pytest.mark.parametrize(("size", "refused"), [((1, 20), False), ((1, 21), True), ((2100, 100), True)])
def test_extreme_aspect_ratio(size, refused):
    image = photograph(*size)
    if not refused:
        assert IMAGENET.frame(image).shape == (3, 256, 5120)
        return
    with pytest.raises(InvalidInputError, match=rf"{size[1]} x {size[0]} pixels.* more than 20 times"):
        IMAGENET.frame(image)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_normalisation_keeps_dtype(dtype):
    batch = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    normalised = IMAGENET(batch)
    assert normalised.dtype == dtype
    mean = torch.tensor(IMAGENET_MEAN, dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD, dtype=torch.float64).view(3, 1, 1)
    expected = (batch.double() - mean) / std
    # Pixel minus mean is below 1 and rounds once, as mean and std do; then 1 / std magnifies.
    bound = 4 * torch.finfo(dtype).eps / min(IMAGENET_STD)
    torch.testing.assert_close(normalised.double(), expected, rtol=0, atol=bound)


def test_normalisation_is_differentiable_and_leaves_the_batch_alone():
    batch = torch.full((1, 3, 2, 2), 0.5, requires_grad=True)
    IMAGENET(batch).sum().backward()
    expected = (1 / torch.tensor(IMAGENET_STD)).view(3, 1, 1).expand(1, 3, 2, 2)
    torch.testing.assert_close(batch.grad, expected)
    assert (batch == 0.5).all()


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (torch.zeros(3, 4, 4), r"\[3, 4, 4\], not \[n, 3, h, w\]: use image\[None\]"),
        (torch.zeros(2, 1, 4, 4), r"\[2, 1, 4, 4\]"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), r"dtype torch\.uint8"),
    ],
)
def test_batch_refusals(batch, said):
    with pytest.raises(InvalidInputError, match=said):
        IMAGENET(batch)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mean": (0.5, 0.5)}, r"mean is \(0\.5, 0\.5\): pass three finite numbers"),
        ({"mean": 0.5}, "mean is 0.5"),
        ({"mean": "123"}, "mean is '123'"),
        ({"mean": (0.5, float("nan"), 0.5)}, "mean is .*nan"),
        ({"std": (0.5, None, 0.5)}, "std is .*None"),
        ({"std": (0.2, 0.0, 0.2)}, r"std is \(0\.2, 0\.0, 0\.2\): every channel's must be above 0"),
        ({"input_size": 224.0}, r"input_size is 224\.0: pass an integer"),
        ({"resize_size": True}, "resize_size is True"),
        ({"input_size": 0}, "input_size is 0 and resize_size 256"),
        ({"input_size": 257}, "input_size is 257 and resize_size 256: pass 0 < input_size <= resize_size"),
        ({"interpolation": "nearest"}, r"interpolation is 'nearest': pass one of 'bilinear', 'bicubic'"),
        ({"interpolation": ["bicubic"]}, "interpolation is"),
    ],
)
def test_field_refusals(change, said):
    with pytest.raises(InvalidInputError, match=said):
        Preprocess(**{"mean": HALF, "std": HALF, **change})


def test_survives_json():
    preprocess = Preprocess(mean=HALF, std=IMAGENET_STD, input_size=299, resize_size=342)
    assert Preprocess.from_dict(json.loads(json.dumps(preprocess.to_dict()))) == preprocess
    assert hash(preprocess) == hash(Preprocess.from_dict(preprocess.to_dict()))


def test_defaults_may_be_left_out_of_a_dict():
    assert Preprocess.from_dict({"mean": HALF, "std": HALF}) == Preprocess(mean=HALF, std=HALF)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"mean": HALF, "std": HALF, "input_siez": 1}, "'input_siez': did you mean 'input_size'"),
        ({"mean": HALF, "std": HALF, "q": 1}, "'q': known are mean, std"),
        ({"mean": HALF}, "'std' is missing"),
    ],
)
def test_dict_refusals(values, said):
    with pytest.raises(InvalidInputError, match=said):
        Preprocess.from_dict(values)


def test_is_frozen():
    with pytest.raises(AttributeError):
        IMAGENET.input_size = 10
