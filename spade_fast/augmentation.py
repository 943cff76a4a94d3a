"""Random views of one image, drawn on the host and rendered on its device in one batch."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spade_fast import ops
from spade_fast.autocast import without_autocast
from spade_fast.errors import InvalidInputError

_TRIES = 10  # torchvision's RandomResizedCrop gives up after as many
_DRAWS = 2 * _TRIES + 6
# Parts of a view are hidden cell by cell: so many in a row and in a column.
_CELLS = 8
_MORE_DRAWS = 4 + _CELLS**2


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Views:
    """The random numbers behind n views of one image: tensors [n] on the CPU.

    Parameters
    ----------
    top, left, height, width
        int64, the crop in pixels of the image.
    flip
        bool, mirrored left to right.
    brightness_factor
        float64, at least 0; 1 changes nothing.
    hue_shift
        float64 in -0.5..0.5, in turns of the colour circle.
    hue_first
        bool, whether hue shifts before brightness; the order matters where brightness saturates.
    hidden
        bool [n, 8, 8], the cells of the view of which nothing is shown.
    strength
        float64 in 0..1, what is left of all colours' distance from the hidden one; 1 changes nothing.
    """

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor
    flip: Tensor
    brightness_factor: Tensor
    hue_shift: Tensor
    hue_first: Tensor
    hidden: Tensor
    strength: Tensor

    def __len__(self) -> int:
        """Give the number of views."""
        return len(self.top)

    def __getitem__(self, index: slice) -> Views:
        """Give some of the views: ``views[start:stop]``."""
        if not isinstance(index, slice):
            raise InvalidInputError(f"views are indexed by a slice, not {index!r}: use views[i : i + 1] for one")
        return Views(**{field.name: getattr(self, field.name)[index] for field in fields(self)})


@dataclass(frozen=True, kw_only=True, slots=True)
class Augmentation:
    """The augmentations of the SPADE paper (arXiv 2310.04519), batched on the image's device.

    The same distribution as torchvision's ``RandomResizedCrop(size, scale, ratio)``,
    ``RandomHorizontalFlip(flip_probability)`` and ``ColorJitter(brightness=brightness, hue=hue)`` in a row,
    with antialiased bilinear resizing. If asked to, it hides parts of views and fades them, as methods and metrics do
    that ask about images with something missing (occlusion, LIME, insertion) or between image and baseline (integrated
    gradients): see :meth:`partial`.

    Parameters
    ----------
    size
        Output height and width in pixels; one integer for a square.
    scale
        Smallest and largest area of the crop, as fractions of the image's area.
    ratio
        Smallest and largest width / height of the crop, log-uniform in between.
    flip_probability
        Probability of a mirrored view, in 0..1.
    brightness
        Factors are uniform in ``max(0, 1 - brightness)..1 + brightness``.
    hue
        Shifts are uniform in ``-hue..hue``, in turns of the colour circle; in 0..0.5.
    hide
        Probability that parts of a view are hidden, in 0..1: each of 8 x 8 cells then is with a probability that is
        uniform in 0..1 from view to view. The published views hide nothing.
    fade
        Probability that all colours of a view are drawn towards the hidden one, in 0..1: to a share of their distance
        that is uniform in 0..1.
    hidden_colour
        What stands there instead: red, green and blue in 0..1. As a rule the mean that the preprocessing subtracts.

    Raises
    ------
    InvalidInputError
        If a field is outside what is stated above.
    """

    size: int | tuple[int, int]
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip_probability: float = 0.5
    brightness: float = 0.5
    hue: float = 0.3
    hide: float = 0.0
    fade: float = 0.0
    hidden_colour: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        _check_size("size", (self.size, self.size) if isinstance(self.size, int) else self.size)
        _check_range("scale", self.scale, 1.0)
        _check_range("ratio", self.ratio, math.inf)
        for name, top in (
            ("flip_probability", 1.0),
            ("brightness", math.inf),
            ("hue", 0.5),
            ("hide", 1.0),
            ("fade", 1.0),
        ):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value <= top:
                allowed = "a finite number of at least 0" if top == math.inf else f"a number in 0..{top:g}"
                raise InvalidInputError(f"{name} is {value!r}: pass {allowed}")
        colour = self.hidden_colour
        if not isinstance(colour, tuple) or len(colour) != 3 or not all(_is_number(c) and 0 <= c <= 1 for c in colour):
            raise InvalidInputError(f"hidden_colour is {colour!r}: pass red, green and blue, numbers in 0..1")

    @classmethod
    def partial(
        cls, size: int | tuple[int, int], hidden_colour: tuple[float, float, float] = (0.5, 0.5, 0.5)
    ) -> Augmentation:
        """The published views, of which every second has hidden parts, and every second is faded."""
        return cls(size=size, hide=0.5, fade=0.5, hidden_colour=hidden_colour)

    def sample(self, image_size: tuple[int, int], count: int, generator: torch.Generator) -> Views:
        """Draw the random numbers of `count` views.

        Every view takes the same number of random draws, in turn: with the same seed, a smaller count gives
        the first of the views that a larger count gives.

        Parameters
        ----------
        image_size
            Height and width of the image, in pixels.
        count
            Number of views, at least 1.
        generator
            Source of the randomness, on the CPU whatever the image's device, so that all devices see the
            same views.

        Returns
        -------
        Views
            Tensors [count] on the CPU.

        Raises
        ------
        InvalidInputError
            If the size or count is not positive, or the generator is not a CPU generator.
        """
        _check_size("image_size", image_size)
        if type(count) is not int or count < 1:
            raise InvalidInputError(f"count is {count!r}: pass the number of views, an integer of at least 1")
        if not isinstance(generator, torch.Generator) or generator.device.type != "cpu":
            device = f" on {generator.device}" if isinstance(generator, torch.Generator) else ""
            raise InvalidInputError(
                f"generator is a {type(generator).__name__}{device}: pass a CPU generator, torch.Generator()"
            )
        draws = _DRAWS + (_MORE_DRAWS if self.hide or self.fade else 0)
        uniform = torch.rand(count, draws, generator=generator, dtype=torch.float64, device="cpu")
        top, left, flip, brightness, hue, order = uniform[:, 2 * _TRIES : _DRAWS].unbind(1)
        hidden, strength = torch.zeros(count, _CELLS, _CELLS, dtype=torch.bool), torch.ones(count, dtype=torch.float64)
        if self.hide or self.fade:
            is_faded, left, is_partial, share = uniform[:, _DRAWS : _DRAWS + 4].unbind(1)
            strength = torch.where(is_faded < self.fade, left, strength)
            cells = uniform[:, _DRAWS + 4 :].view(hidden.shape)
            hidden = (is_partial < self.hide)[:, None, None] & (cells < share[:, None, None])
        height, width = self._crop_sizes(image_size, uniform[:, :_TRIES], uniform[:, _TRIES : 2 * _TRIES])

        # A crop by fallback is not placed at random but in the centre.
        fallback = height == 0
        fallback_height, fallback_width = self._fallback_size(image_size)
        height = torch.where(fallback, fallback_height, height)
        width = torch.where(fallback, fallback_width, width)
        free_rows, free_columns = image_size[0] - height, image_size[1] - width
        darkest = max(0.0, 1 - self.brightness)
        return Views(
            top=torch.where(fallback, free_rows // 2, (top * (free_rows + 1)).long()),
            left=torch.where(fallback, free_columns // 2, (left * (free_columns + 1)).long()),
            height=height,
            width=width,
            flip=flip < self.flip_probability,
            brightness_factor=darkest + (1 + self.brightness - darkest) * brightness,
            hue_shift=(2 * hue - 1) * self.hue,
            hue_first=order < 0.5,
            hidden=hidden,
            strength=strength,
        )

    def _crop_sizes(
        self,
        image_size: tuple[int, int],
        area: Tensor,  # [n, tries], uniform in 0..1
        ratio: Tensor,  # [n, tries], uniform in 0..1
    ) -> tuple[Tensor, Tensor]:
        """Give the first crop height and width [n] that fit the image, 0 where no try does."""
        area = (self.scale[0] + (self.scale[1] - self.scale[0]) * area) * (image_size[0] * image_size[1])
        shortest, longest = (math.log(bound) for bound in self.ratio)
        ratio = (shortest + (longest - shortest) * ratio).exp()
        height, width = (area / ratio).sqrt().round().long(), (area * ratio).sqrt().round().long()
        fits = (height > 0) & (height <= image_size[0]) & (width > 0) & (width <= image_size[1])
        # argmax gives the first of equals.
        first = fits.long().argmax(1, keepdim=True)
        return (height * fits).gather(1, first)[:, 0], (width * fits).gather(1, first)[:, 0]

    def _fallback_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Give height and width of the whole image, cut to the nearest ratio allowed."""
        height, width = image_size
        if width / height < self.ratio[0]:
            return max(1, round(width / self.ratio[0])), width
        if width / height > self.ratio[1]:
            return height, max(1, round(height * self.ratio[1]))
        return height, width

    @without_autocast
    def render(self, image: Tensor, views: Views, *, backend: ops.Backend = "auto") -> Tensor:
        """Render views of an image: crop, resize, flip, then brightness and hue in each view's order; fade and
        hide.

        Rendering ``views[a:b]`` gives the same values, to rounding. The plain PyTorch implementation is differentiable
        with respect to the image and is what images that want a gradient get: two batched matrix products,
        ``rows @ image @ columns^T``. Its peak memory is a few times ``(3 h + w) W + h H`` numbers a view, and where
        float32 products are allowed to use TF32, pixels keep its three digits.

        Parameters
        ----------
        image
            [3, H, W] in 0..1, float32 or float64, on any device. Values are not checked (`image_tensor`
            does): that would make the host wait for the device.
        views
            From `sample` with ``image_size=(H, W)``.
        backend
            "auto" (native, or with a warning the reference), "native" or "reference", the plain PyTorch one.

        Returns
        -------
        Tensor
            [n, 3, h, w] in 0..1, contiguous, dtype and device of the image.

        Raises
        ------
        InvalidInputError
            If the image has another shape or dtype, or a crop reaches outside it.
        """
        if image.ndim != 3 or image.shape[0] != 3 or image.dtype not in (torch.float32, torch.float64):
            raise InvalidInputError(
                f"image is {image.dtype} of shape {list(image.shape)}: pass float32 or float64 [3, H, W] in 0..1"
            )
        _, image_height, image_width = image.shape
        bottom, right = views.top + views.height, views.left + views.width
        if (bottom > image_height).any() or (right > image_width).any():
            raise InvalidInputError(
                f"crops reach row {int(bottom.max())} and column {int(right.max())} of an image of "
                f"{image_height} x {image_width} pixels: sample the views with this image's size"
            )
        height, width = (self.size, self.size) if isinstance(self.size, int) else self.size
        rows = _resize_bands(views.top, views.height, torch.zeros_like(views.flip), height, image_height, image)
        columns = _resize_bands(views.left, views.width, views.flip, width, image_width, image)
        factor = views.brightness_factor
        before, after = torch.where(views.hue_first, 1.0, factor), torch.where(views.hue_first, factor, 1.0)
        colours = torch.stack([before, views.hue_shift, after], 1).to(image, non_blocking=True)
        differentiable = torch.is_grad_enabled() and image.requires_grad
        native = not differentiable and ops.resolve_backend(backend, image.device) == "native"
        pixels = ops.render_views(image, *rows, *columns, colours) if native else _render(image, rows, columns, colours)
        if not views.hidden.any() and bool((views.strength == 1).all()):
            return pixels
        shown = torch.where(views.hidden, 0.0, views.strength[:, None, None])[:, None].to(image, non_blocking=True)
        colour = torch.tensor(self.hidden_colour, dtype=image.dtype).to(image.device, non_blocking=True)
        return torch.lerp(colour[:, None, None].expand_as(pixels), pixels, F.interpolate(shown, (height, width)))

    def __call__(self, image: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Draw and render `count` views of an image.

        Parameters
        ----------
        image
            [3, H, W] in 0..1, float32 or float64, on any device.
        count
            Number of views, at least 1.
        generator
            A CPU generator.

        Returns
        -------
        Tensor
            [count, 3, h, w] in 0..1, dtype and device of the image.

        Raises
        ------
        InvalidInputError
            As `sample` and `render`.
        """
        views = self.sample((image.shape[-2], image.shape[-1]), count, generator)
        return self.render(image, views)


def _resize_bands(
    start: Tensor,  # [n] int64 on the CPU, first pixel of the crop
    length: Tensor,  # [n] int64 on the CPU, pixels in the crop
    flip: Tensor,  # [n] bool on the CPU
    size: int,
    image_size: int,
    like: Tensor,  # gives dtype and device
) -> tuple[Tensor, Tensor]:
    """Give the bands that crop, flip and resize along one axis: first pixels [n, size], weights [n, taps, size].

    Output pixel i of a crop lies at ``c_i = start + (i + 1/2) length / size``. Input pixel x in the crop has
    weight ``max(0, 1 - |x + 1/2 - c_i| / max(1, length / size))``, normalised to sum 1: a triangle as wide
    as the downsampling asks for, as in torch's antialiased bilinear resize.
    """
    step = length.double() / size
    # Of values on the host, which would wait for the device's.
    taps = min(image_size, math.ceil(2 * step.clamp(min=1).max().item())) if len(start) else 1
    # From here on where the image is. CUDA takes so few numbers along with its commands: the host does not wait.
    begin, end, flip = torch.stack([start, start + length, flip.long()]).to(like.device, non_blocking=True)[:, :, None]
    step = step.to(like.device, non_blocking=True)[:, None]
    output = torch.arange(size, dtype=torch.float64, device=like.device) + 0.5
    output = torch.where(flip > 0, size - output, output)  # [n, size]
    centre = begin + output * step
    radius = step.clamp(min=1)
    first = (centre - radius - 0.5).floor().long() + 1  # the first pixel that lies less than the radius away
    first = first.clamp(0, image_size - taps)
    x = first[:, None] + torch.arange(taps, device=like.device)[:, None]
    weights = (1 - (x + 0.5 - centre[:, None]).abs() / radius[:, None]).clamp(min=0)
    weights *= (x >= begin[:, None]) & (x < end[:, None])
    weights /= weights.sum(1, keepdim=True)
    return first, weights.to(like)


def _render(image: Tensor, rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor], colours: Tensor) -> Tensor:
    """Do what `ops.render_views` does, in plain PyTorch."""
    _, image_height, image_width = image.shape
    by_row, by_column = _dense_weights(*rows, image_height), _dense_weights(*columns, image_width)
    count, height, width = len(colours), by_row.shape[1], by_column.shape[1]
    # One plain product for all views and channels, then one batched by view.
    resized = by_row.flatten(0, 1) @ image.transpose(0, 1).reshape(image_height, 3 * image_width)
    resized = resized.view(count, 3 * height, image_width) @ by_column.transpose(1, 2)
    pixels = resized.view(count, height, 3, width).transpose(1, 2)
    before, turn, after = colours.unbind(1)
    pixels = _shift_hue((pixels * before.view(-1, 1, 1, 1)).clamp(0, 1), turn)
    return (pixels * after.view(-1, 1, 1, 1)).clamp(0, 1)


def _dense_weights(first: Tensor, weights: Tensor, image_size: int) -> Tensor:
    """Weights [n, size, image_size] from bands."""
    taps, size = weights.shape[1:]
    places = first[:, :, None] + torch.arange(taps, device=first.device)
    return weights.new_zeros(len(weights), size, image_size).scatter_(2, places, weights.transpose(1, 2))


def _shift_hue(pixels: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of RGB pixels [n, 3, h, w] by `shift` [n] turns; HSV saturation and value stay.

    With hue H in sixths of a turn, value V and chroma C, the channels are
    ``V - C clamp(min(k, 4 - k), 0, 1)`` at ``k = (H + 5, 3, 1) mod 6`` for red, green and blue.
    """
    red, green, blue = pixels.unbind(1)
    value = pixels.amax(1)
    chroma = value - pixels.amin(1)
    safe = torch.where(chroma > 0, chroma, 1.0)
    hue = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    hue = hue + 6 * shift.view(-1, 1, 1)
    channels = []
    for corner in (5, 3, 1):
        k = torch.remainder(hue + corner, 6)
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, 1)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_size(name: str, size: Any) -> None:
    if not isinstance(size, tuple) or len(size) != 2 or not all(type(n) is int and n > 0 for n in size):
        raise InvalidInputError(f"{name} is {size!r}: pass height and width in pixels, positive integers")


def _check_range(name: str, bounds: Any, top: float) -> None:
    if isinstance(bounds, tuple) and len(bounds) == 2 and all(map(_is_number, bounds)):
        low, high = bounds
        if 0 < low <= high <= top:
            return
    limit = "" if top == math.inf else f" <= {top:g}"
    raise InvalidInputError(f"{name} is {bounds!r}: pass a tuple (low, high) with 0 < low <= high{limit}")
