"""Is a trace specific to its image? Own answer kept, accuracy on other images lost (CIFAR-10 ResNet-56).

python benchmarks/trace_specificity.py --refit
"""

from __future__ import annotations

import argparse
import json

import cifar
import torch
from torch import Tensor
from tqdm.auto import tqdm

import spade_fast as sf

_NEARBY = sf.Augmentation(size=32, scale=(0.95, 1.0), flip_probability=0.0, brightness=0.05, hue=0.01)


def nearby_views(image: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Views [count, 3, 32, 32] that hardly differ from the image; every second one is the image itself."""
    views = _NEARBY(image, count, generator)
    views[::2] = image
    return views


VIEWS = {
    "published": sf.Augmentation(size=32),
    "gentle": sf.Augmentation(size=32, scale=(0.9, 1.0), brightness=0.1, hue=0.02),
    "nearby": nearby_views,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=100, help="images to trace, spread over all classes")
    parser.add_argument("--others", type=int, default=200, help="other images to test each trace on")
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--views", choices=VIEWS, default="nearby")
    parser.add_argument("--block-size", type=int, help="columns that share a threshold; default: the taps of a channel")
    parser.add_argument("--damping", type=float, default=0.01)
    parser.add_argument("--refit", action="store_true", help="refit the kept weights")
    parser.add_argument("--num-augmentations", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    model = cifar.load_resnet(56)
    pixels, labels = cifar.load_images()
    inputs = cifar.PREPROCESS(pixels)
    traced = torch.arange(0, len(pixels), len(pixels) // arguments.images)[: arguments.images]
    rest = torch.ones(len(pixels), dtype=torch.bool)
    rest[traced] = False
    others = rest.nonzero()[:, 0]
    others = others[:: max(1, len(others) // arguments.others)][: arguments.others]
    with torch.inference_mode():
        answers = model(inputs).argmax(1)

    kept, accuracies, same_views = 0, [], []
    for index in tqdm(traced.tolist()):
        trace = sf.trace(
            model,
            pixels[index],
            arguments.sparsity,
            num_augmentations=arguments.num_augmentations,
            augment=VIEWS[arguments.views],
            block_size=arguments.block_size,
            damping=arguments.damping,
            refit=arguments.refit,
            preprocess=cifar.PREPROCESS,
            seed=arguments.seed,
        )
        views = VIEWS[arguments.views](pixels[index], 128, torch.Generator().manual_seed(arguments.seed))
        with torch.inference_mode():
            same_views.append((model(cifar.PREPROCESS(views)).argmax(1) == answers[index]).double().mean().item())
        with trace.applied(model), torch.inference_mode():
            kept += int(model(inputs[index, None]).argmax(1).item() == answers[index].item())
            accuracies.append((model(inputs[others]).argmax(1) == labels[others]).double().mean().item())
    result = {
        "images": len(traced),
        "own answer kept": kept,
        "views that the dense model answers like their image": sum(same_views) / len(same_views),
        "accuracy on other images": sum(accuracies) / len(accuracies),
        "dense accuracy on them": (answers[others] == labels[others]).double().mean().item(),
        "other images": len(others),
        **vars(arguments),
        "torch": torch.__version__,
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
