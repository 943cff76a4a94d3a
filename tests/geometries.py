"""Convolutions of any shape, for tests of the Hessian's sums."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from spade_fast import ops


@st.composite
def images_and_geometry(
    draw: st.DrawFn, *, longest_kernel: int, longest_stride: int, longest_dilation: int, most_images: int
) -> tuple[Tensor, ops.Geometry]:
    """Maps [n, channels, h, w] in float64, some as small as the kernel, and how to convolve them."""

    def pair(low: int, high: int) -> tuple[int, int]:
        return draw(st.integers(low, high)), draw(st.integers(low, high))

    kernel, stride = pair(1, longest_kernel), pair(1, longest_stride)
    padding, dilation = pair(0, 3), pair(1, longest_dilation)
    groups = draw(st.integers(1, 3))
    least = [max(1, dilation[i] * (kernel[i] - 1) + 1 - 2 * padding[i]) for i in range(2)]
    sides = [draw(st.integers(low, low + 11)) for low in least]
    channels = groups * draw(st.sampled_from([1, 2, 3, 17, 24]))  # few are summed as patches, more as shifted maps
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    count = draw(st.integers(1, most_images))
    images = torch.randn(count, channels, *sides, dtype=torch.float64, generator=generator)
    return images, ops.Geometry(kernel, stride, padding, dilation, groups)
