"""What `positions_per_column` and `hessian_dtype` do to traces of EfficientNet-Lite0.

python benchmarks/cheaper_evidence.py [FOLDER OF PHOTOGRAPHS] [--images N]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import skimage.data
import torch
from bench_trace import native_hessians
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

import spade_fast as sf

VARIANTS: dict[str, dict[str, Any]] = {
    "all positions": {},
    "another seed": {"seed": 1},
    "bfloat16": {"hessian_dtype": torch.bfloat16},
    **{f"{cap} d positions": {"positions_per_column": cap} for cap in (64, 16, 4, 1)},
}
PLANS = {"last half at 0.8": sf.presets.last_half, "all layers at 0.5": 0.5}
FRESH_SEED = 12345


def photographs(folder: Path | None, count: int) -> list[Image.Image]:
    if folder is None:
        found = [
            Image.fromarray(getattr(skimage.data, name)()) for name in ("coffee", "chelsea", "rocket", "astronaut")
        ]
        return found[:count]
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in (".jpg", ".jpeg", ".png"))
    return [Image.open(file) for file in files[:: max(1, len(files) // count)][:count]]


def relative_error(dense: Tensor, layer: sf.LayerTrace, hessian: Tensor) -> float:
    """tr(D H D^T) / tr(W H W^T): which share of the layer's output, squared, the trace gets wrong."""
    groups = hessian.shape[0]
    change, weight = (w.double().reshape(groups, -1, hessian.shape[1]) for w in (dense - layer.weight, dense))
    hessian = hessian.double()
    return (((change @ hessian) * change).sum() / ((weight @ hessian) * weight).sum()).item()


def overlap(first: sf.Trace, second: sf.Trace) -> float:
    """Of the weights that either trace keeps in the pruned layers, the share that both keep."""
    pairs = [(first.layers[name].mask, second.layers[name].mask) for name in first.layers]
    both, either = (sum(int(f(a, b).sum()) for a, b in pairs) for f in (torch.logical_and, torch.logical_or))
    return both / either


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, help="photographs; default: four of scikit-image's")
    parser.add_argument("--images", type=int, default=20)
    arguments = parser.parse_args()
    if arguments.images < 1:
        parser.error(f"--images must be at least 1, got {arguments.images}")
    net = sf.load_model("efficientnet_lite0")
    images = photographs(arguments.folder, arguments.images)
    if not images:
        parser.error(f"no .jpg, .jpeg or .png in {arguments.folder}")
    augmentation = sf.Augmentation(size=net.preprocess.input_size)
    rows = []
    for plan, sparsity in PLANS.items():
        found: dict[str, list[tuple[float, float, float, bool]]] = {name: [] for name in VARIANTS}
        for image in tqdm(images, plan):
            fresh = augmentation(net.preprocess.frame(image), 64, torch.Generator().manual_seed(FRESH_SEED))
            hessians = native_hessians(net, sparsity, fresh)
            inputs = net.preprocess(net.preprocess.view(image)[None])
            with torch.inference_mode():
                answer = net.module(inputs).argmax().item()
            full = None
            for name, settings in VARIANTS.items():
                start = time.perf_counter()
                trace = sf.trace(net, image, sparsity, **settings)
                seconds = time.perf_counter() - start
                full = full or trace
                errors = [
                    relative_error(net.module.get_submodule(layer).weight.detach(), pruned, hessians[layer])
                    for layer, pruned in trace.layers.items()
                ]
                with trace.applied(net) as model, torch.inference_mode():
                    kept = model(inputs).argmax().item() == answer
                found[name].append((overlap(full, trace), statistics.fmean(errors), seconds, kept))
        for name, values in found.items():
            overlaps, errors, times, kept = zip(*values, strict=True)
            rows.append(
                {
                    "plan": plan,
                    "evidence": name,
                    "mask overlap": statistics.fmean(overlaps),
                    "layer error on fresh views": statistics.fmean(errors),
                    "seconds": statistics.median(times),
                    "own answer kept": f"{sum(kept)} of {len(kept)}",
                }
            )
    print(json.dumps({"images": len(images), "torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
