"""Hessians of single layers from 64 images, in batches of 16: native against unfold and matmul."""

from __future__ import annotations

import pytest
import torch
from shapes import Layer, layers_of

from spade_fast import ops, reference
from spade_fast.heap import kept_heap
from spade_fast.layers import GramSum

IMAGES, BATCH = 64, 16
LAYERS = {network: layers_of(network) for network in ("ResNet-50", "EfficientNet-Lite0")}
CASES = sorted({layer for layers in LAYERS.values() for layer in layers})


@kept_heap()  # as in a trace
def native(images: torch.Tensor, geometry: ops.Geometry) -> torch.Tensor:
    total = GramSum(geometry.groups, geometry.columns(images.shape[1]), images.dtype, images.device, native=True)
    for _ in range(IMAGES // BATCH):
        total.add(images, geometry)
    return total.gram()


def plain(images: torch.Tensor, geometry: ops.Geometry) -> torch.Tensor:
    gram = reference.conv2d_gram(images, geometry)
    for _ in range(IMAGES // BATCH - 1):
        gram += reference.conv2d_gram(images, geometry)
    return gram


def multiply_adds(layer: Layer) -> int:
    """Of one image, with no product computed twice: the floor for this way of summing."""
    channels = layer.channels // layer.groups
    if layer.stride == 1:
        offsets = (2 * layer.kernel - 1) ** 2
        return layer.groups * layer.positions * (offsets * channels**2 + channels) // 2
    return layer.groups * layer.positions * layer.columns * (layer.columns + 1) // 2


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("layer", CASES, ids=str)
def test_hessian(benchmark, report, measure, layer, backend):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, layer.channels, layer.size, layer.size, generator=generator)
    sides = [(layer.kernel,) * 2, (layer.stride,) * 2, (layer.padding,) * 2, (1, 1)]
    geometry = ops.Geometry(*sides, layer.groups)
    channels_last = images.contiguous(memory_format=torch.channels_last)
    expected = plain(images, geometry)
    torch.testing.assert_close(native(channels_last, geometry), expected, rtol=0, atol=1e-4 * expected.max().item())
    report(
        kind="hessian",
        backend=backend,
        layer=str(layer),
        networks={network: layers[layer] for network, layers in LAYERS.items() if layer in layers},
        flops=2 * IMAGES * multiply_adds(layer),
        bytes=4 * (IMAGES * images[0].numel() + layer.groups * layer.columns**2),
    )
    arguments = (images, geometry) if backend == "reference" else (channels_last, geometry)
    benchmark.group = f"hessian {layer}"
    measure(plain if backend == "reference" else native, *arguments)
