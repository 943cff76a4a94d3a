"""What comparing traces costs: python benchmarks/comparing_traces.py [--images N] [RESULTS.json]

Random masks of EfficientNet-Lite0's layers, half of the weights kept. Overlaps by counting bits, as spade_fast does,
and by products of matrices, after checking that they agree. The store that is read is made in a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scaling import machine, peak_bytes

import spade_fast as sf
from spade_fast.imagesets import ListedImage
from spade_fast.layers import prunable_layers
from spade_fast.overlap import Masks, clusters, distinctive, overlaps, read_masks, separation
from spade_fast.store import StoreWriter, image_bytes
from spade_fast.traces import LayerTrace, Trace

READ = 20
ROUNDS = 3


def random_masks(shapes: dict[str, tuple[int, ...]], count: int) -> Masks:
    generator = np.random.default_rng(0)
    bits = {
        name: np.packbits(generator.random((count, int(np.prod(shape)))) < 0.5, axis=1)
        for name, shape in shapes.items()
    }
    return Masks(tuple(f"{i:04}.png" for i in range(count)), shapes, bits, dict.fromkeys(shapes, ()))


def random_store(shapes: dict[str, tuple[int, ...]], folder: Path) -> sf.Store:
    writer = StoreWriter(folder, {"masks": "random"}, {})
    generator = torch.Generator().manual_seed(0)
    for i in range(READ):
        layers = {}
        for name, shape in shapes.items():
            mask = torch.rand(shape, generator=generator) < 0.5
            layers[name] = LayerTrace(torch.randn(shape, generator=generator) * mask, mask, 0.5, 0.0, 0.01)
        listed = ListedImage(f"{i:04}.png", folder)
        trace = Trace(layers)
        told = {"target": 0, "target_name": None, "sparsity": trace.sparsity, "probability": {}, "metrics": {}}
        answers = {network: [{"index": 0, "name": None}] for network in ("dense", "spade")}
        writer.put(listed, image_bytes({**writer.known(listed), **told, "answers": answers}, trace, {}, {}))
    return sf.Store(folder)


def by_products(masks: Masks) -> NDArray[np.float64]:
    """Weights that each two images share, in all layers: float32 products of 65,536 weights at a time."""
    count = len(masks.images)
    found = torch.zeros(count, count, dtype=torch.float64)
    for name, bits in masks.bits.items():
        weights = np.unpackbits(bits, axis=1, count=masks.weights(name))
        for start in range(0, weights.shape[1], 1 << 16):
            part = torch.from_numpy(weights[:, start : start + (1 << 16)]).float()
            found += part @ part.T
    return found.numpy()


def seconds(work: Callable[[], Any], rounds: int = ROUNDS) -> tuple[float, Any]:
    times, result = [], None
    for _ in range(rounds):
        start = time.perf_counter()
        result = work()
        times.append(time.perf_counter() - start)
    return statistics.median(times), result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).parent / "results" / "comparing.json"
    parser.add_argument("results", nargs="?", type=Path, default=default)
    parser.add_argument("--images", type=int, default=300)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    layers = prunable_layers(sf.load_model("efficientnet_lite0").module)
    shapes = {name: tuple(layer.weight.shape) for name, layer in layers.items()}
    times = {}
    with tempfile.TemporaryDirectory() as folder:
        store = random_store(shapes, Path(folder))
        times["reading an image's masks"] = seconds(lambda: read_masks(store))[0] / READ
    masks = random_masks(shapes, arguments.images)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = peak_bytes()
    times["overlaps"], found = seconds(lambda: overlaps(masks))
    taken = peak_bytes() - before
    times["overlaps by products of matrices"], shared = seconds(lambda: by_products(masks), 1)
    sizes = shared.diagonal()
    np.testing.assert_allclose(found.pooled, shared / (sizes[:, None] + sizes - shared), rtol=1e-12)
    inside = [i % 2 == 0 for i in range(arguments.images)]
    times["clusters"] = seconds(lambda: clusters(found.pooled))[0]
    times["separation by a matrix"] = seconds(lambda: separation(found.pooled, inside))[0]
    times["distinctive connections"] = seconds(lambda: distinctive(masks, masks.images[::2]))[0]
    results = {
        "command": f"python benchmarks/comparing_traces.py --images {arguments.images}",
        "machine": f"{machine()}; 1 thread",
        "images": arguments.images,
        "layers": len(shapes),
        "weights": sum(masks.weights(name) for name in shapes),
        "seconds": times,
        "mask_bytes": sum(bits.nbytes for bits in masks.bits.values()),
        "bytes_beside_masks": taken,
    }
    arguments.results.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
