"""How faithful attribution maps are: insertion and deletion, and the area under the ROC curve of a Trojan patch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from spade_fast.attribution import check_inputs, check_outputs, check_target, like_weights
from spade_fast.autocast import without_autocast
from spade_fast.errors import InvalidInputError, check_whole
from spade_fast.heap import kept_heap
from spade_fast.models import LoadedModel, Runner, bare_module, evaluation_mode

#: What stands where a pixel is not shown: a blurred image, zero model inputs, or model inputs [c, h, w].
Baseline: TypeAlias = Literal["blur", "zero"] | Tensor

#: Parts in which pixels come and go, unless told otherwise.
STEPS = 32
# A Gaussian of 5 pixels at 224, cut off there: so much of the shorter side.
_BLUR, _REFERENCE_SIDE = 5.0, 224
_CPU_BATCH, _BATCH = 16, 128


@dataclass(frozen=True, eq=False)
class Curves:
    """The probability of a class as pixels come or go, a curve for each map.

    Attributes
    ----------
    shares
        float64 [points], 0..1: the share of the pixels that has come or gone.
    probabilities
        float64 [maps, points], 0..1.
    auc
        float64 [maps], 0..1: the areas under the curves, by trapezoids.
    """

    shares: Tensor
    probabilities: Tensor
    auc: Tensor


def insertion(
    model: nn.Module | LoadedModel,
    inputs: Tensor,
    maps: Tensor,
    target: int,
    *,
    steps: int = STEPS,
    start: Baseline = "blur",
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Curves:
    """How soon the class is recognised as the pixels of an image come, those of the largest attribution first.

    As in RISE (Petsiuk et al. 2018, section 4.2): a good map has a large area under the curve.

    Parameters
    ----------
    model
        The network that is asked: [n, c, h, w] to class scores [n, classes], each image on its own. For the maps of a
        trace, too, this is the dense network.
    inputs
        Model inputs [1, c, h, w], already normalised.
    maps
        [maps, h, w] or [h, w], real numbers: all are measured in one go.
    target
        The class, an index into the outputs.
    steps
        Equal parts in which the pixels come; as many as there are pixels, where those are fewer. RISE takes 224, a
        row's worth of pixels each.
    start
        What the pixels come into: "blur", the image itself under a Gaussian of 5 pixels at 224, cut off at 5, its edges
        repeated beyond them (RISE's blur is as wide, but flatter, and has zeros beyond the edges); "zero" model inputs,
        the mean colour of the training images as a rule; or model inputs [c, h, w].
    batch_size
        Images that go through the network at a time. Default: 16 on a CPU, else 128.
    seed
        Of the order among pixels of equal attribution, the same for all maps.
    progress
        Show a progress bar on stderr.

    Returns
    -------
    Curves
        On the CPU. At share 0 nothing of the image is shown but `start`, at share 1 all of it.

    Raises
    ------
    InvalidInputError
        For maps of another size than the inputs or with NaN or infinite values (the message gives the first such map),
        a class that the network does not have, settings out of range, and outputs that are no class scores.
    """
    image, module = _like_model(model, inputs)
    return _curves(
        module, _baseline(start, image, "start"), image, maps, target, steps, batch_size, seed, progress, "insertion"
    )


def deletion(
    model: nn.Module | LoadedModel,
    inputs: Tensor,
    maps: Tensor,
    target: int,
    *,
    steps: int = STEPS,
    end: Baseline = "zero",
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Curves:
    """How soon the class is lost as the pixels of an image go, those of the largest attribution first.

    As in RISE (Petsiuk et al. 2018, section 4.2): a good map has a small area under the curve.

    Parameters
    ----------
    end
        What the pixels go into: "zero" model inputs as in RISE, "blur", or model inputs [c, h, w].
    model, inputs, maps, target, steps, batch_size, seed, progress
        As in :func:`insertion`.

    Returns
    -------
    Curves
        On the CPU. At share 0 all of the image is shown, at share 1 nothing but `end`.

    Raises
    ------
    InvalidInputError
        As :func:`insertion`.
    """
    image, module = _like_model(model, inputs)
    return _curves(
        module, image, _baseline(end, image, "end"), maps, target, steps, batch_size, seed, progress, "deletion"
    )


def trojan_auc(maps: Tensor, patch: Tensor) -> Tensor:
    """How well maps find a patch: the area under the ROC curve of "this pixel belongs to it" (SPADE section 4.1).

    The share of pairs of a pixel inside and one outside in which the inside one has the larger attribution; pairs of
    equal attribution count half.

    Parameters
    ----------
    maps
        [maps, h, w] or [h, w], real numbers.
    patch
        bool [h, w]: True where the patch is.

    Returns
    -------
    Tensor
        float64 [maps], 0..1, on the CPU; one half for a map that knows nothing.

    Raises
    ------
    InvalidInputError
        If sizes differ, maps hold NaN or infinite values, or the patch covers nothing or everything.
    """
    values, inside = _against_patch(maps, patch)
    ordered = values.sort(dim=1).values
    # The mean place of a pixel among all, of those that are equal the mean of their places.
    places = torch.searchsorted(ordered, values) + torch.searchsorted(ordered, values, right=True)
    count = int(inside.sum())
    wins = places[:, inside].sum(dim=1).double() / 2 - count * count / 2
    return (wins / (count * (inside.numel() - count))).cpu()


def roc_curve(map: Tensor, patch: Tensor) -> tuple[Tensor, Tensor]:
    """The ROC curve whose area :func:`trojan_auc` gives.

    Parameters
    ----------
    map
        [h, w], real numbers.
    patch
        bool [h, w].

    Returns
    -------
    outside, inside
        float64 [points], from 0 to 1: of the pixels outside of the patch and of those inside, the share whose
        attribution is at least a threshold, for every threshold that makes a difference, the highest first.

    Raises
    ------
    InvalidInputError
        As :func:`trojan_auc`.
    """
    values, inside = _against_patch(map, patch)
    if len(values) != 1:
        raise InvalidInputError(f"a ROC curve is of one map [h, w], got {list(map.shape)}")
    ordered, order = values[0].sort(descending=True)
    is_last = torch.cat([ordered[1:] != ordered[:-1], ordered.new_ones(1, dtype=torch.bool)])
    found = inside[order].cumsum(0)[is_last]
    taken = is_last.nonzero()[:, 0] + 1
    count = int(inside.sum())
    shares = ((taken - found) / (inside.numel() - count), found / count)
    outside, within = (torch.cat([share.new_zeros(1), share]).double().cpu() for share in shares)
    return outside, within


def _against_patch(maps: Tensor, patch: Tensor) -> tuple[Tensor, Tensor]:
    """Maps [maps, h * w] and patch [h * w] on the device of the maps."""
    if not isinstance(patch, Tensor) or patch.dtype != torch.bool or patch.dim() != 2:
        got = f"{patch.dtype} {list(patch.shape)}" if isinstance(patch, Tensor) else type(patch).__name__
        raise InvalidInputError(f"patch must be a bool tensor [h, w], got {got}")
    values = _check_maps(maps, (patch.shape[0], patch.shape[1]), "the patch")
    inside = patch.flatten().to(values.device)
    if not inside.any() or inside.all():
        raise InvalidInputError(f"the patch covers {'all' if inside.any() else 'none'} of the image: nothing to tell")
    return values.flatten(1), inside


def _check_maps(maps: Tensor, size: tuple[int, int], what: str) -> Tensor:
    """Maps [maps, h, w] of that size in their own floating-point dtype, at least float32."""
    if not isinstance(maps, Tensor) or maps.is_complex() or maps.dim() not in (2, 3) or not maps.numel():
        got = f"{maps.dtype} {list(maps.shape)}" if isinstance(maps, Tensor) else type(maps).__name__
        raise InvalidInputError(f"maps must be a tensor of real numbers [maps, h, w] or [h, w], got {got}")
    maps = maps.detach()[None] if maps.dim() == 2 else maps.detach()
    if tuple(maps.shape[1:]) != size:
        raise InvalidInputError(f"maps are {maps.shape[1]} x {maps.shape[2]}, but {what} is {size[0]} x {size[1]}")
    maps = maps if maps.dtype == torch.float64 else maps.float()
    bad = (~maps.isfinite().flatten(1).all(dim=1)).nonzero()[:, 0].tolist()
    if bad:
        raise InvalidInputError(f"map {bad[0]} of {len(maps)} holds NaN or infinite values: leave it out")
    return maps


def _like_model(model: nn.Module | LoadedModel, inputs: Tensor) -> tuple[Tensor, nn.Module]:
    module = bare_module(model)
    return like_weights(check_inputs(inputs), module).detach(), module


def _baseline(baseline: Baseline, image: Tensor, name: str) -> Tensor:
    """Model inputs [1, c, h, w] that show nothing of the image."""
    if isinstance(baseline, Tensor):
        if baseline.shape[-3:] != image.shape[1:] or baseline.numel() != image.numel():
            raise InvalidInputError(
                f"{name} must be model inputs {list(image.shape[1:])}, got a tensor {list(baseline.shape)}"
            )
        return check_inputs(baseline.detach().reshape(image.shape)).to(image)
    if not isinstance(baseline, str) or baseline not in ("zero", "blur"):
        got = repr(baseline) if isinstance(baseline, str) else type(baseline).__name__
        raise InvalidInputError(f"{name} must be 'blur', 'zero' or a tensor of model inputs [c, h, w], got {got}")
    return torch.zeros_like(image) if baseline == "zero" else blurred(image)


def blurred(image: Tensor) -> Tensor:
    """Model inputs [1, c, h, w] under a Gaussian of 5 pixels at 224, at least of 1, and cut off there."""
    deviation = max(1.0, _BLUR * min(image.shape[2:]) / _REFERENCE_SIDE)
    reach = round(deviation)
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=torch.float64) / deviation) ** 2)
    weights = (weights / weights.sum()).to(image)
    channels = image.shape[1]
    column = weights.view(1, 1, -1, 1).expand(channels, 1, -1, 1)
    # Beyond its edge the image goes on as it ends: zeros would darken it.
    padded = F.pad(image, (reach, reach, reach, reach), mode="replicate")
    return F.conv2d(F.conv2d(padded, column, groups=channels), column.mT, groups=channels)


@without_autocast
def _curves(
    module: nn.Module,
    before: Tensor,
    after: Tensor,
    maps: Tensor,
    target: int,
    steps: int,
    batch_size: int | None,
    seed: int,
    progress: bool,
    title: str,
) -> Curves:
    """The class's probability as `before` becomes `after`, pixel by pixel."""
    height, width = before.shape[2], before.shape[3]
    values = _check_maps(maps, (height, width), "the model's input").to(before.device)
    check_whole("steps", steps, 1)
    check_whole("batch_size", 1 if batch_size is None else batch_size, 1)
    check_whole("seed", seed, 0)
    if batch_size is None:
        batch_size = _CPU_BATCH if before.device.type == "cpu" else _BATCH
    ranks = _ranks(values.flatten(1), seed).view(-1, 1, height, width)
    steps = min(steps, height * width)
    counts = [round(height * width * step / steps) for step in range(steps + 1)]
    # Between the ends, which are the same for all maps: a place is a map and a step.
    places = [(index, counts[step]) for index in range(len(values)) for step in range(1, steps)]

    def batches() -> Iterator[Tensor]:
        yield torch.cat([before, after])
        for first in range(0, len(places), batch_size):
            chosen = places[first : first + batch_size]
            indices, limits = (torch.tensor(each, device=before.device) for each in zip(*chosen, strict=True))
            yield torch.where(ranks[indices] < limits.view(-1, 1, 1, 1), after, before)

    found = []
    run = Runner(module, fold=True)
    with (
        kept_heap(),
        evaluation_mode(module),
        torch.no_grad(),
        tqdm(total=len(places) + 2, desc=title, disable=not progress, leave=False) as bar,
    ):
        for batch in batches():
            outputs = check_outputs(run(batch), len(batch))
            if outputs.shape[1] == 1:
                raise InvalidInputError("the network gives one score only, whose probability is always 1: give it two")
            target = check_target(target, outputs.shape[1])
            found.append(outputs.double().softmax(dim=1)[:, target].cpu())
            bar.update(len(batch))
    probabilities = torch.cat(found)
    if not probabilities.isfinite().all():
        raise InvalidInputError(f"{type(module).__name__} gives NaN or infinite class scores for a partly shown image")
    ends = probabilities[:2].expand(len(values), 2)
    whole = torch.cat([ends[:, :1], probabilities[2:].view(len(values), steps - 1), ends[:, 1:]], dim=1)
    shares = torch.tensor(counts, dtype=torch.float64) / (height * width)
    return Curves(shares, whole, torch.trapezoid(whole, shares, dim=1))


def _ranks(values: Tensor, seed: int) -> Tensor:
    """The place of each value [maps, pixels] in descending order, ties in one random order for all maps."""
    order = torch.randperm(values.shape[1], generator=torch.Generator().manual_seed(seed)).to(values.device)
    descending = order[values[:, order].argsort(dim=1, descending=True, stable=True)]
    places = torch.arange(values.shape[1], device=values.device).expand_as(descending)
    return torch.empty_like(descending).scatter_(1, descending, places)
