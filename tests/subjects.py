"""A small network that sees where an image is bright, and images to ask it about; what pruning a layer costs; masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from spade_fast import implanting, models
from spade_fast.imagesets import ListedImage
from spade_fast.models import LoadedModel
from spade_fast.preprocessing import Preprocess
from spade_fast.store import Store, StoreWriter, image_bytes, refusal_bytes
from spade_fast.traces import LayerTrace, Trace

SIDE = 16


class Quarters(nn.Module):
    """Says which quarter of an image is brightest, by two blocks of convolutions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 4, 1)
        self.blocks = nn.ModuleList(nn.ModuleDict({"wide": nn.Conv2d(4, 8, 3, padding=1), "depthwise":
            nn.Conv2d(8, 8, 3, padding=1, groups=8), "narrow": nn.Conv2d(8, 4, 1)}) for _ in range(2))  # fmt: skip
        self.classifier = nn.Linear(16, 4)
        with torch.no_grad():
            self.stem.weight.fill_(0.4)
            # Weak enough for probabilities that differ with what is shown.
            self.classifier.weight.copy_(torch.eye(4).repeat_interleave(4, dim=1) / 4 + self.classifier.weight / 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            y = torch.relu(block["depthwise"](torch.relu(block["wide"](x))))
            x = x + 0.1 * block["narrow"](y)
        # [n, 4, 2, 2] to the four channels of each quarter, one quarter after the other.
        pooled = nn.functional.adaptive_avg_pool2d(x, 2).flatten(2).transpose(1, 2)
        return self.classifier(pooled.flatten(1))


def quarters() -> LoadedModel:
    """The network, ready to be asked about images of any size."""
    preprocess = Preprocess(mean=(0.5,) * 3, std=(0.25,) * 3, input_size=SIDE, resize_size=SIDE)
    return LoadedModel("quarters", Quarters().eval(), preprocess, ("a", "b", "c", "d"), "random")


def replace_networks(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Put the network in the place of every other that is loaded; gives the arguments that those are asked for with."""
    calls = []

    def load(name: str, **arguments: Any) -> LoadedModel:
        calls.append({"name": name, **arguments})
        return quarters()

    monkeypatch.setattr(models, "load_model", load)
    monkeypatch.setattr(implanting, "load_model", load)
    return calls


def photographs(folder: Path, count: int) -> dict[str, Path]:
    """Noisy images with one bright quarter each, by name."""
    generator = np.random.default_rng(0)
    found = {}
    for i in range(count):
        pixels = generator.integers(0, 110, (SIDE, SIDE, 3))
        row, column = divmod(i % 4, 2)
        pixels[row * SIDE // 2 : (row + 1) * SIDE // 2, column * SIDE // 2 : (column + 1) * SIDE // 2] += 120
        path = folder / f"{i:02}.png"
        Image.fromarray(pixels.astype(np.uint8)).save(path)
        found[path.name] = path
    return found


def objective(weight: Tensor, sparse: Tensor, hessian: Tensor) -> float:
    """tr((W - Q) H (W - Q)^T)."""
    change = (weight - sparse).double().reshape(hessian.shape[0], -1, hessian.shape[1])
    return torch.einsum("grd,gde,gre->", change, hessian.double(), change).item()


def trace_with(masks: Mapping[str, Any], dense: Sequence[str] = ()) -> Trace:
    """A trace that keeps what the masks, nested lists of 0 and 1, say; its weights are 1 and 0."""
    layers = {}
    for name, mask in masks.items():
        kept = torch.as_tensor(np.asarray(mask), dtype=torch.bool)
        layers[name] = LayerTrace(kept.float(), kept, 0.5, 0.0, 0.01)
    return Trace(layers, dict.fromkeys(dense, "no sparsity is within the error budget"))


def store_of(
    folder: Path,
    traces: Mapping[str, Trace | str],
    labels: Mapping[str, Mapping[str, str]] | None = None,
    answers: Mapping[str, tuple[int, str | None]] | None = None,
) -> Store:
    """A store of traces by name, or of reasons for refusing an image; the network's answers are what is explained."""
    folder.mkdir()
    writer = StoreWriter(folder, {"made": "by hand"}, {})
    for name, trace in traces.items():
        listed = ListedImage(name, folder / name, labels=(labels or {}).get(name, {}))
        if isinstance(trace, str):
            writer.put(listed, refusal_bytes(writer.known(listed), trace))
            continue
        index, called = (answers or {}).get(name, (0, "a"))
        record = {
            **writer.known(listed),
            "target": index,
            "target_name": called,
            "sparsity": trace.sparsity,
            "probability": {"dense": 1.0, "spade": 1.0},
            "answers": {key: [{"index": index, "name": called, "probability": 1.0}] for key in ("dense", "spade")},
            "metrics": {},
        }
        writer.put(listed, image_bytes(record, trace, {}, {}))
    return Store(folder)
