"""Augmentations against torchvision: each view by value, the random numbers by distribution."""

from __future__ import annotations

import colorsys
import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from PIL import Image

from spade_fast import ops
from spade_fast.augmentation import Augmentation, Views
from spade_fast.errors import InvalidInputError

FIELDS = [field.name for field in fields(Views) if field.name not in ("hidden", "strength")]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(height: int, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Make colour noise with dark, saturated, gray and white patches."""
    image = torch.rand(3, height, width, generator=seeded(height * 1000 + width), dtype=torch.float64)
    image[:, : height // 3, : width // 3] *= 0.1
    image[:, height // 2 :, width // 2 :] = image[:1, height // 2 :, width // 2 :]
    image[1, height // 3 : height // 2] = 1
    image[:, -2:, -2:] = 1
    return image.to(dtype)


def one_view(image_height: int, image_width: int, **changes: float) -> Views:
    """Make the view that shows the whole image unchanged, save for `changes`."""
    plain = {
        "top": 0,
        "left": 0,
        "height": image_height,
        "width": image_width,
        "flip": False,
        "brightness_factor": 1.0,
        "hue_shift": 0.0,
        "hue_first": False,
    }
    dtypes = {bool: torch.bool, int: torch.int64, float: torch.float64}
    tensors = {name: torch.tensor([v], dtype=dtypes[type(v)]) for name, v in {**plain, **changes}.items()}
    shown = {"hidden": torch.zeros(1, 8, 8, dtype=torch.bool), "strength": torch.ones(1, dtype=torch.float64)}
    return Views(**tensors, **shown)


def torchvision_view(image: torch.Tensor, views: Views, index: int, size: tuple[int, int]) -> torch.Tensor:
    functional = pytest.importorskip("torchvision.transforms.functional")
    view = {name: getattr(views, name)[index].item() for name in FIELDS}
    pixels = functional.resized_crop(
        image, view["top"], view["left"], view["height"], view["width"], list(size), antialias=True
    )
    if view["flip"]:
        pixels = functional.hflip(pixels)
    jitter = [(functional.adjust_brightness, view["brightness_factor"])]
    # torchvision's hue goes through float32 whatever the image's dtype, so no shift is no call.
    if view["hue_shift"] != 0:
        jitter.insert(0 if view["hue_first"] else 1, (functional.adjust_hue, view["hue_shift"]))
    for adjust, amount in jitter:
        pixels = adjust(pixels, amount)
    return pixels


@pytest.fixture(params=["native", "reference"])
def backend(request) -> ops.Backend:
    if request.param == "native" and "cpu" not in ops.native_devices():
        pytest.skip("the extension is not built")
    return request.param


IMAGE_AND_OUTPUT_SIZES = [
    ((64, 80), (32, 32)),
    ((61, 47), (24, 40)),
    ((40, 40), (40, 40)),
    ((20, 30), (64, 48)),
    ((300, 200), (7, 5)),
    ((1, 1), (8, 8)),
    ((2, 50), (16, 12)),
    ((50, 2), (12, 16)),
    ((5, 500), (9, 9)),
    ((30, 3000), (20, 25)),
]


@pytest.mark.parametrize(("image_size", "size"), IMAGE_AND_OUTPUT_SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_views_equal_torchvision(image_size, size, dtype, backend):
    image = picture(*image_size, dtype)
    augmentation = Augmentation(size=size)
    views = augmentation.sample(image_size, 40, seeded())
    rendered = augmentation.render(image, views, backend=backend)
    assert rendered.dtype == dtype
    assert rendered.shape == (40, 3, *size)
    assert rendered.is_contiguous()
    assert rendered.min() >= 0
    assert rendered.max() <= 1
    for index, pixels in enumerate(rendered):
        expected = torchvision_view(image, views, index, size)
        torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("image_size", "size"), IMAGE_AND_OUTPUT_SIZES, ids=str)
def test_views_without_hue_equal_torchvision_in_double_precision(image_size, size, backend):
    image = picture(*image_size, torch.float64)
    augmentation = Augmentation(size=size, hue=0.0)
    views = augmentation.sample(image_size, 40, seeded())
    for index, pixels in enumerate(augmentation.render(image, views, backend=backend)):
        expected = torchvision_view(image, views, index, size)
        torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("length", [1, 2, 7])
def test_weights_are_the_triangle_written_out(length, backend):
    # One output pixel in the width, where torch 2.11's own antialiased resize is wrong.
    image = picture(6, 20, torch.float64)
    view = one_view(6, 20, left=4, width=length)
    rendered = Augmentation(size=(6, 1)).render(image, view, backend=backend)[0, :, :, 0]
    centre = 4 + length / 2
    weights = [max(0.0, 1 - abs(x + 0.5 - centre) / length) for x in range(4, 4 + length)]
    expected = sum(w * image[:, :, x] for w, x in zip(weights, range(4, 4 + length), strict=True)) / sum(weights)
    torch.testing.assert_close(rendered, expected, rtol=0, atol=1e-13)


def test_plain_view_is_the_image(backend):
    image = picture(9, 11)
    rendered = Augmentation(size=(9, 11)).render(image, one_view(9, 11), backend=backend)
    torch.testing.assert_close(rendered[0], image, rtol=0, atol=1e-6)


def test_flip_mirrors_left_to_right(backend):
    image = picture(9, 11)
    rendered = Augmentation(size=(9, 11)).render(image, one_view(9, 11, flip=True), backend=backend)
    torch.testing.assert_close(rendered[0], image.flip(2), rtol=0, atol=1e-6)


def test_pixels_outside_the_crop_take_no_part(backend):
    image = torch.ones(3, 8, 8)
    image[:, 2:5, 3:7] = 0.25
    view = one_view(8, 8, top=2, left=3, height=3, width=4)
    rendered = Augmentation(size=(10, 2)).render(image, view, backend=backend)
    torch.testing.assert_close(rendered, torch.full_like(rendered, 0.25))


@pytest.mark.parametrize("hue_first", [False, True])
def test_order_of_brightness_and_hue(hue_first, backend):
    colour = (0.2, 0.5, 0.8)
    view = one_view(1, 1, brightness_factor=1.5, hue_shift=0.1, hue_first=hue_first)
    image = torch.tensor(colour, dtype=torch.float64).view(3, 1, 1)
    rendered = Augmentation(size=1).render(image, view, backend=backend).flatten().tolist()

    def brighter(pixel):
        return tuple(min(1.0, 1.5 * channel) for channel in pixel)

    expected = brighter(turned(colour, 0.1)) if hue_first else turned(brighter(colour), 0.1)
    other = turned(brighter(colour), 0.1) if hue_first else brighter(turned(colour, 0.1))
    assert rendered == pytest.approx(expected, abs=1e-13)
    assert rendered != pytest.approx(other, abs=1e-3)


def turned(pixel: tuple[float, ...], shift: float) -> tuple[float, ...]:
    hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
    return colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value)


@pytest.mark.parametrize("shift", [-0.5, -0.3, -1 / 6, 0.0, 0.01, 1 / 3, 0.5])
def test_hue_equals_the_standard_librarys(shift, backend):
    levels = [0.0, 0.25, 0.5, 1.0]  # all orders of the channels, and all ties
    pixels = [(r, g, b) for r in levels for g in levels for b in levels]
    image = torch.tensor(pixels, dtype=torch.float64).T.reshape(3, 8, 8)
    rendered = Augmentation(size=8).render(image, one_view(8, 8, hue_shift=shift), backend=backend)
    expected = torch.tensor([turned(pixel, shift) for pixel in pixels], dtype=torch.float64)
    torch.testing.assert_close(rendered[0].flatten(1).T, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hue_leaves_gray_alone(dtype, backend):
    image = torch.rand(1, 20, 20, generator=seeded(), dtype=dtype).expand(3, -1, -1)
    augmentation = Augmentation(size=16, brightness=0.0, hue=0.5)
    views = augmentation.sample((20, 20), 10, seeded())
    unshifted = replace(views, hue_shift=torch.zeros(10, dtype=torch.float64))
    shifted = augmentation.render(image, views, backend=backend)
    bound = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(shifted, augmentation.render(image, unshifted, backend=backend), rtol=0, atol=bound)
    torch.testing.assert_close(shifted[:, 0], shifted[:, 1], rtol=0, atol=bound)


def test_float32_is_accurate_far_from_the_corner(backend):
    # A position near 40,000 has an error of .002 pixels in float32: noise shows it.
    image = picture(4, 40_000, torch.float64)
    view = one_view(4, 40_000, left=39_000, width=700, flip=True)
    augmentation = Augmentation(size=(4, 333))
    rendered = augmentation.render(image.float(), view, backend=backend)
    torch.testing.assert_close(rendered.double(), augmentation.render(image, view, backend=backend), rtol=0, atol=1e-6)


def test_rendering_a_slice_is_slicing_the_rendering(backend):
    image = picture(50, 60)
    augmentation = Augmentation(size=(20, 24))
    views = augmentation.sample((50, 60), 10, seeded())
    whole = augmentation.render(image, views, backend=backend)
    assert len(views) == 10
    assert len(views[3:7]) == 4
    torch.testing.assert_close(augmentation.render(image, views[3:7], backend=backend), whole[3:7], rtol=0, atol=1e-6)
    torch.testing.assert_close(augmentation.render(image, views[::4], backend=backend), whole[::4], rtol=0, atol=1e-6)
    assert augmentation.render(image, views[4:4], backend=backend).shape == (0, 3, 20, 24)


def test_image_memory_layout_does_not_matter(backend):
    image = picture(30, 40)
    augmentation = Augmentation(size=16)
    views = augmentation.sample((30, 40), 4, seeded())
    strided = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert not strided.is_contiguous()
    assert torch.equal(
        augmentation.render(strided, views, backend=backend), augmentation.render(image, views, backend=backend)
    )


def test_views_are_differentiable_in_the_image():
    # Noise, since gradients are not defined where two channels are equal or one saturates.
    image = (0.1 + 0.5 * torch.rand(3, 4, 5, generator=seeded(), dtype=torch.float64)).requires_grad_()
    augmentation = Augmentation(size=3)
    views = augmentation.sample((4, 5), 2, seeded())
    assert torch.autograd.gradcheck(lambda x: augmentation.render(x, views), image)


def test_call_samples_and_renders():
    image = picture(30, 40)
    augmentation = Augmentation(size=(8, 12))
    views = augmentation.sample((30, 40), 5, seeded(7))
    assert torch.equal(augmentation(image, 5, seeded(7)), augmentation.render(image, views))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_cpu():
    image = picture(120, 90)
    on_cpu, on_cuda = (Augmentation(size=64)(x, 32, seeded()) for x in (image, image.cuda()))
    assert on_cuda.device.type == "cuda"
    torch.testing.assert_close(on_cuda.cpu(), on_cpu, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(32, 40), (37, 21), (5, 8)], ids=str)
def test_hidden_cells_have_their_colour_and_all_else_is_as_it_was(size, backend):
    image, colour = picture(50, 60), (0.1, 0.2, 0.9)
    augmentation = Augmentation(size=size, hide=0.7, fade=0.5, hidden_colour=colour)
    views = augmentation.sample((50, 60), 9, seeded())
    found = augmentation.render(image, views, backend=backend)
    plain = {"hidden": torch.zeros_like(views.hidden), "strength": torch.ones_like(views.strength)}
    whole = augmentation.render(image, replace(views, **plain), backend=backend)
    rows, columns = (torch.arange(side) * 8 // side for side in size)
    hidden = views.hidden[:, rows][:, :, columns]
    assert 0 < hidden.sum() < hidden.numel()
    grey = torch.tensor(colour, dtype=image.dtype)[:, None, None]
    strength = views.strength.to(image)[:, None, None, None]
    assert 0 < (strength < 1).sum() < 9
    expected = torch.where(hidden[:, None], grey, grey + strength * (whole - grey))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    unfaded = (views.strength == 1).nonzero()[:, 0]
    assert torch.equal(found[unfaded], torch.where(hidden[:, None], grey, whole)[unfaded])


# Random numbers.


def test_same_seed_same_bits():
    image = picture(40, 50)
    augmentation = Augmentation(size=24)
    first, second = (augmentation(image, 12, seeded(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, augmentation(image, 12, seeded(4)))


def test_global_random_state_is_left_alone():
    state = torch.get_rng_state()
    Augmentation(size=24).sample((40, 50), 12, seeded())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("image_size", [(40, 50), (1, 1), (5, 500)], ids=str)
def test_number_of_draws_depends_on_count_alone(image_size):
    generator, plain = seeded(), seeded()
    Augmentation(size=24).sample(image_size, 12, generator)
    Augmentation(size=5, scale=(0.9, 1.0)).sample((300, 300), 12, plain)
    assert torch.equal(generator.get_state(), plain.get_state())


@pytest.mark.parametrize("few", [1, 3, 64])
def test_fewer_views_are_the_first_of_more(few):
    augmentation = Augmentation(size=24)
    small, large = (augmentation.sample((40, 50), count, seeded()) for count in (few, 100))
    for name in FIELDS:
        assert torch.equal(getattr(small, name), getattr(large[:few], name))


@pytest.mark.parametrize("hide", [0.25, 1.0])
def test_so_many_views_are_hidden_in_part(hide):
    views = Augmentation(size=24, hide=hide).sample((40, 50), 4000, seeded())
    counts = views.hidden.flatten(1).sum(1)
    # Of those that are, one in 65 happens to show everything: a share that is uniform makes all counts as likely.
    rate = hide * 64 / 65
    assert (counts > 0).double().mean().item() == pytest.approx(rate, abs=4 * math.sqrt(rate / 4000))
    some = counts[counts > 0].double()
    assert some.mean().item() == pytest.approx(32.5, abs=4 * 18.5 / math.sqrt(len(some)))
    assert some.std().item() == pytest.approx(18.47, rel=0.06)  # uniform over 1..64
    cells = views.hidden.double().mean(0)
    assert (cells - cells.mean()).abs().max() < 5 * math.sqrt(0.25 / 4000)
    assert not torch.equal(views.hidden[counts > 0][0], views.hidden[counts > 0][1])


def test_what_is_hidden_does_not_depend_on_how_many_views_there_are():
    augmentation = Augmentation(size=24, hide=0.5)
    small, large = (augmentation.sample((40, 50), count, seeded()) for count in (7, 50))
    assert torch.equal(small.hidden, large.hidden[:7])
    assert torch.equal(small.top, large.top[:7])
    plain = Augmentation(size=24).sample((40, 50), 7, seeded())
    assert not plain.hidden.any()
    assert plain.hidden.shape == (7, 8, 8)
    assert (plain.strength == 1).all()


def test_so_many_views_are_faded():
    strength = Augmentation(size=24, fade=0.3).sample((40, 50), 4000, seeded()).strength
    faded = strength[strength < 1]
    assert len(faded) / 4000 == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / 4000))
    assert faded.mean().item() == pytest.approx(0.5, abs=4 * math.sqrt(1 / 12 / len(faded)))
    assert faded.std().item() == pytest.approx(math.sqrt(1 / 12), rel=0.05)


def test_partial_views():
    augmentation = Augmentation.partial(24, (0.1, 0.2, 0.3))
    assert augmentation == Augmentation(size=24, hide=0.5, fade=0.5, hidden_colour=(0.1, 0.2, 0.3))
    views = augmentation.sample((40, 50), 4000, seeded())
    both = (views.hidden.flatten(1).any(1) & (views.strength < 1)).double().mean().item()
    assert both == pytest.approx(0.25 * 64 / 65, abs=0.03)  # independent of each other


def test_views_have_the_types_they_promise():
    views = Augmentation(size=24).sample((40, 50), 5, seeded())
    dtypes = [torch.int64] * 4 + [torch.bool, torch.float64, torch.float64, torch.bool]
    assert [getattr(views, name).dtype for name in FIELDS] == dtypes
    assert all(getattr(views, name).shape == (5,) for name in FIELDS)


@pytest.mark.parametrize("image_size", [(1, 1), (2, 50), (50, 2), (3, 4), (1, 3000)], ids=str)
def test_crops_lie_inside_the_image(image_size):
    views = Augmentation(size=24).sample(image_size, 2000, seeded())
    for start, length, size in zip((views.top, views.left), (views.height, views.width), image_size, strict=True):
        assert (start >= 0).all()
        assert (length >= 1).all()
        assert (start + length <= size).all()


@pytest.mark.parametrize(
    ("image_size", "crop"),
    # No ratio in 3/4..4/3 fits a fifth of the area of such strips: the centre crop of the nearest ratio.
    [((4, 1000), (0, 497, 4, 5)), ((1000, 4), (497, 0, 5, 4))],
    ids=str,
)
def test_extreme_aspect_ratio_falls_back_to_the_centre(image_size, crop):
    views = Augmentation(size=24).sample(image_size, 50, seeded())
    for name, expected in zip(FIELDS, crop, strict=False):
        assert (getattr(views, name) == expected).all()


def test_fallback_to_the_whole_image():
    # A single pixel, and areas that round to no pixel at all.
    views = Augmentation(size=24, scale=(0.01, 0.02)).sample((1, 1), 50, seeded())
    assert [getattr(views, name)[0].item() for name in FIELDS[:4]] == [0, 0, 1, 1]


def test_fallback_is_never_empty():
    views = Augmentation(size=24, ratio=(9.0, 10.0)).sample((3000, 1), 50, seeded())
    assert (views.height == 1).all()


# Distributions. Seeds are fixed, so these tests always pass or always fail; the critical value is that of
# a two-sample test at level 0.001.

DRAWS = 6000
CRITICAL = 1.949 * (2 / DRAWS) ** 0.5


def ks_statistic(first: np.ndarray, second: np.ndarray) -> float:
    """Give the two-sample Kolmogorov-Smirnov statistic, the largest distance of the distributions."""
    both = np.concatenate([first, second])
    below = [np.searchsorted(np.sort(sample), both, side="right") / len(sample) for sample in (first, second)]
    return float(np.abs(below[0] - below[1]).max())


@pytest.fixture
def global_seed():
    """Seed the global generator, the only one torchvision draws from, and put its state back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        yield


def crop_features(top, left, height, width, image_size) -> dict[str, np.ndarray]:
    top, left, height, width = (np.asarray(x, dtype=np.float64) for x in (top, left, height, width))
    free_rows, free_columns = image_size[0] - height, image_size[1] - width
    return {
        "area": height * width / (image_size[0] * image_size[1]),
        "ratio": width / height,
        "top": (top / np.maximum(free_rows, 1))[free_rows > 0],
        "left": (left / np.maximum(free_columns, 1))[free_columns > 0],
    }


def test_ks_statistic_by_hand():
    assert ks_statistic(np.array([1, 2, 3, 4]), np.array([1, 2, 3, 4])) == 0
    assert ks_statistic(np.array([1, 2]), np.array([3, 4])) == 1
    assert ks_statistic(np.array([1, 2, 3, 4]), np.array([3, 4, 5, 6])) == 0.5


def test_ks_statistic_sees_a_slightly_wrong_distribution():
    uniform = np.random.default_rng(0).uniform(size=(2, DRAWS))
    assert ks_statistic(uniform[0], uniform[1]) < CRITICAL
    assert ks_statistic(uniform[0], 0.92 * uniform[1]) > CRITICAL
    # The area drawn without the bias that rejecting crops which do not fit puts on it.
    views = Augmentation(size=24).sample((300, 900), DRAWS, seeded())
    area = crop_features(views.top, views.left, views.height, views.width, (300, 900))["area"]
    assert ks_statistic(area, 0.2 + 0.8 * uniform[0]) > CRITICAL


@pytest.mark.parametrize(
    ("image_size", "scale", "ratio"),
    [
        ((480, 640), (0.2, 1.0), (3 / 4, 4 / 3)),
        ((500, 500), (0.08, 1.0), (3 / 4, 4 / 3)),
        ((300, 900), (0.2, 1.0), (3 / 4, 4 / 3)),
        ((900, 400), (0.2, 1.0), (0.5, 3.0)),
    ],
    ids=str,
)
@pytest.mark.usefixtures("global_seed")
def test_crops_are_distributed_as_torchvisions(image_size, scale, ratio):
    transforms = pytest.importorskip("torchvision.transforms")
    image = torch.zeros(1, 1, 1).expand(3, *image_size)
    theirs = [transforms.RandomResizedCrop.get_params(image, scale, ratio) for _ in range(DRAWS)]
    expected = crop_features(*zip(*theirs, strict=True), image_size)
    views = Augmentation(size=24, scale=scale, ratio=ratio).sample(image_size, DRAWS, seeded())
    ours = crop_features(views.top, views.left, views.height, views.width, image_size)
    statistics = {}
    for name in expected:
        count = len(ours[name]), len(expected[name])
        critical = 1.949 * (sum(count) / (count[0] * count[1])) ** 0.5
        statistics[name] = ks_statistic(ours[name], expected[name]) / critical
    assert max(statistics.values()) < 1, statistics


@pytest.mark.parametrize(("brightness", "hue"), [(0.5, 0.3), (1.5, 0.5)])
@pytest.mark.usefixtures("global_seed")
def test_jitter_is_distributed_as_torchvisions(brightness, hue):
    transforms = pytest.importorskip("torchvision.transforms")
    jitter = transforms.ColorJitter(brightness=brightness, hue=hue)
    theirs = [jitter.get_params(jitter.brightness, None, None, jitter.hue) for _ in range(DRAWS)]
    views = Augmentation(size=24, brightness=brightness, hue=hue).sample((40, 50), DRAWS, seeded())
    factors, shifts = (np.array([params[i] for params in theirs]) for i in (1, 4))
    assert ks_statistic(views.brightness_factor.numpy(), factors) < CRITICAL
    assert ks_statistic(views.hue_shift.numpy(), shifts) < CRITICAL
    order = np.array([params[0].tolist() for params in theirs])
    hue_first = (order == 3).argmax(1) < (order == 0).argmax(1)
    standard_error = (0.5 / DRAWS) ** 0.5
    assert abs(views.hue_first.numpy().mean() - hue_first.mean()) < 4 * standard_error


@pytest.mark.parametrize("probability", [0.0, 0.2, 0.5, 1.0])
def test_flip_rate(probability):
    views = Augmentation(size=24, flip_probability=probability).sample((40, 50), DRAWS, seeded())
    standard_error = (probability * (1 - probability) / DRAWS) ** 0.5
    assert abs(views.flip.double().mean().item() - probability) <= 4 * standard_error


def test_random_numbers_are_independent():
    views = Augmentation(size=24).sample((480, 640), DRAWS, seeded())
    relative = crop_features(views.top, views.left, views.height, views.width, (480, 640))
    # Area and ratio do depend on each other through what fits; the rest must not.
    columns = [
        views.top / (481 - views.height),
        views.left / (641 - views.width),
        torch.tensor(relative["area"]),
    ]
    columns += [getattr(views, name).double() for name in FIELDS[4:]]
    correlation = torch.corrcoef(torch.stack(columns)) - torch.eye(len(columns), dtype=torch.float64)
    assert correlation.abs().max() < 4 / DRAWS**0.5


@pytest.mark.parametrize("kind", ["tensor", "PIL"])
@pytest.mark.usefixtures("global_seed")
def test_pixel_statistics_are_torchvisions(kind):
    transforms = pytest.importorskip("torchvision.transforms")
    data = pytest.importorskip("skimage.data")
    photograph = Image.fromarray(data.chelsea()).resize((113, 75))
    image = transforms.ToTensor()(photograph)
    size, count = (32, 24), 1500
    pipeline = transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=(0.2, 1.0), antialias=True),
            transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(brightness=0.5, hue=0.3),
            *([transforms.ToTensor()] if kind == "PIL" else []),
        ]
    )
    theirs = torch.stack([pipeline(photograph if kind == "PIL" else image) for _ in range(count)])
    ours = Augmentation(size=size)(image, count, seeded())
    for statistic in (torch.mean, torch.std):
        first, second = (statistic(views.flatten(2), dim=2) for views in (ours, theirs))  # [count, 3]
        standard_error = ((first.var(0) + second.var(0)) / count).sqrt()
        # Six comparisons in each of two tests: 3.5 standard errors is level 0.006 over all.
        assert ((first.mean(0) - second.mean(0)).abs() < 3.5 * standard_error).all()


# Refusals.


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"size": 0}, r"size is \(0, 0\): pass height and width in pixels, positive integers"),
        ({"size": 2.5}, r"size is 2\.5"),
        ({"size": (224, 224, 3)}, r"size is \(224, 224, 3\)"),
        (
            {"scale": (0.0, 1.0)},
            r"scale is \(0\.0, 1\.0\): pass a tuple \(low, high\) with 0 < low <= high <= 1",
        ),
        ({"scale": (0.5, 0.2)}, r"scale is \(0\.5, 0\.2\)"),
        ({"scale": (0.2, 1.5)}, r"scale is \(0\.2, 1\.5\)"),
        ({"scale": 0.2}, r"scale is 0\.2"),
        ({"ratio": (4 / 3, 3 / 4)}, "ratio is .*: pass a tuple .* with 0 < low <= high$"),
        ({"ratio": (0.5, float("inf"))}, r"ratio is \(0\.5, inf\)"),
        ({"flip_probability": 1.5}, r"flip_probability is 1\.5: pass a number in 0\.\.1"),
        ({"brightness": -0.1}, r"brightness is -0\.1: pass a finite number of at least 0"),
        ({"brightness": float("nan")}, "brightness is nan"),
        ({"brightness": "0.5"}, "brightness is '0.5'"),
        ({"hue": 0.6}, r"hue is 0\.6: pass a number in 0\.\.0\.5"),
        ({"hue": True}, "hue is True"),
        ({"hide": 1.1}, r"hide is 1\.1: pass a number in 0\.\.1"),
        ({"hidden_colour": (0, 0, 2)}, r"hidden_colour is \(0, 0, 2\): pass red, green and blue, numbers in 0\.\.1"),
        ({"hidden_colour": 0.5}, r"hidden_colour is 0\.5"),
    ],
)
def test_field_refusals(change, said):
    with pytest.raises(InvalidInputError, match=said):
        Augmentation(**{"size": 24, **change})


@pytest.mark.parametrize(
    ("image_size", "count", "generator", "said"),
    [
        ((40, 50), 0, seeded(), "count is 0: pass the number of views"),
        ((40, 50), 2.0, seeded(), r"count is 2\.0"),
        ((40, 0), 1, seeded(), r"image_size is \(40, 0\): pass height and width"),
        ((40, 50), 1, 7, r"generator is a int: pass a CPU generator, torch\.Generator\(\)"),
        ((40, 50), 1, None, "generator is a NoneType"),
    ],
)
def test_sample_refusals(image_size, count, generator, said):
    with pytest.raises(InvalidInputError, match=said):
        Augmentation(size=24).sample(image_size, count, generator)


def test_generator_of_another_device_is_refused():
    class OnCuda(torch.Generator):
        device = torch.device("cuda:0")

    with pytest.raises(InvalidInputError, match="on cuda:0: pass a CPU generator"):
        Augmentation(size=24).sample((40, 50), 1, OnCuda())


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (torch.zeros(1, 3, 40, 50), r"shape \[1, 3, 40, 50\]: pass float32 or float64 \[3, H, W\]"),
        (torch.zeros(1, 40, 50), r"shape \[1, 40, 50\]"),
        (torch.zeros(3, 40, 50, dtype=torch.float16), r"image is torch\.float16"),
        (torch.zeros(3, 40, 50, dtype=torch.uint8), r"image is torch\.uint8"),
        (torch.zeros(3, 30, 50), r"crops reach row 40 and column 50 of an image of 30 x 50 pixels"),
        (torch.zeros(3, 40, 49), r"of an image of 40 x 49 pixels: sample the views with this image's size"),
    ],
)
def test_render_refusals(image, said):
    with pytest.raises(InvalidInputError, match=said):
        Augmentation(size=24).render(image, one_view(40, 50))


def test_views_are_indexed_by_slices_alone():
    with pytest.raises(InvalidInputError, match=r"by a slice, not 3: use views\[i : i \+ 1\]"):
        one_view(4, 4)[3]


def test_settings_are_frozen_and_comparable():
    assert Augmentation(size=24) == Augmentation(size=24, hue=0.3)
    assert hash(Augmentation(size=24)) == hash(Augmentation(size=24))
    with pytest.raises(AttributeError):
        Augmentation(size=24).size = 32
