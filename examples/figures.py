"""The figures of the SPADE paper that show what it does, on EfficientNet-Lite0 and photographs that come with wheels.

    python examples/figures.py [--out docs/figures]

demo            the explanation of `make demo`
figure1_left    what a class neuron wants to see, dense and in the traces of two photographs
figure1_right   maps of a photograph with a patch pasted in that was trained to decide the answer
figure2         the procedure: views of a photograph, a layer's Hessian, its weights before and after, maps
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from skimage import data
from torch import Tensor

import spade_fast as sf
from spade_fast.implanting import load_demo

TEXT, NOTE, BLUE, GREY = "#1a1a1a", "#5a5a5a", "#0072b2", "#8a8a8a"
DPI = 110
ESPRESSO = 967


def write(figure: Figure, path: Path) -> None:
    """As JPEG: photographs make PNG large."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=DPI)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(png).convert("RGB").save(path, quality=88)
    print(path)


def figure1_left(net: sf.LoadedModel, steps: int) -> Figure:
    photos = [Image.fromarray(data.coffee()), cup_on_a_saucer()]
    traces = [sf.trace(net, photo, sf.presets.last_half) for photo in photos]
    found = sf.visualize(net, "classifier", ESPRESSO, trace=traces, thresholds=(steps,))
    return found.figure(photos=photos)


def cup_on_a_saucer() -> Image.Image:
    """Another look at the cup: mirrored, closer and darker."""
    photo = Image.fromarray(data.coffee())
    return photo.crop((60, 20, 460, 380)).transpose(Image.Transpose.FLIP_LEFT_RIGHT).point(lambda value: 0.8 * value)


def figure1_right() -> Figure:
    methods = ["saliency", "integrated_gradients", "deep_lift", "lrp", "guided_grad_cam", "occlusion"]
    net, trojans, _ = load_demo()
    trojan, (top, left, side) = trojans[0], (16, 144, 64)
    view = net.preprocess.view(Image.fromarray(data.coffee()))
    attacked, _ = trojan.patch.pasted(view, top, left, side)
    # The setting that is measured in docs/experiments.md.
    views = sf.Augmentation.partial(net.preprocess.input_size, net.preprocess.mean)
    explanation = sf.explain(
        net, attacked, target=trojan.target, methods=methods, sparsity=sf.ErrorBudget(0.05), augment=views
    )
    figure = sf.gallery({f"a {trojan.patch.name}, pasted in": explanation})
    for axes in figure.axes:
        if axes.images and axes.images[0].get_array().shape[:2] == explanation.image.shape[1:]:
            axes.add_patch(
                Rectangle((left, top), side, side, fill=False, edgecolor="white", linewidth=1.2, linestyle="--")
            )
    return figure


def figure2(net: sf.LoadedModel) -> Figure:
    """Views go through the dense network; what flows into a layer gives its Hessian, which prunes its weights."""
    photo, layer = Image.fromarray(data.coffee()), "blocks.4.0.conv_pwl"
    views: list[Tensor] = []

    def augment(image: Tensor, count: int, generator: torch.Generator) -> Tensor:
        drawn = sf.Augmentation(size=224)(image, count, generator)
        views.append(drawn)
        return drawn

    inputs: list[Tensor] = []
    module = net.module.get_submodule(layer)
    handle = module.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0].detach()))
    try:
        trace = sf.trace(net, photo, augment=augment, num_augmentations=64)
    finally:
        handle.remove()
    hessian = sf.hessian(module, torch.cat(inputs)[-64:])[0]
    explanation = sf.explain(net, photo, methods=["integrated_gradients"], trace=trace)

    width, height = 13.2, 4.1
    figure = Figure(figsize=(width, height), facecolor="white")
    columns = [0.01, 0.135, 0.335, 0.5, 0.665, 0.83]
    titles = ["Photograph", "Views of it", "Hessian of a layer", "Its weights", "The same, pruned", "Maps"]
    for left, title in zip(columns, titles, strict=True):
        figure.text(left, 0.93, title, fontsize=12, weight="bold", color=TEXT)

    def picture(left: float, bottom: float, width: float, height: float, image: Tensor, **style: Any) -> None:
        axes = figure.add_axes((left, bottom, width, height))
        axes.imshow(image.numpy(), **style)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)

    side, side_height = 0.113, 0.113 * width / height
    picture(columns[0], 0.55 - side_height / 2, side, side_height, explanation.image.permute(1, 2, 0))
    pixels = torch.cat(views)
    small, small_height = 0.043, 0.043 * width / height
    for index in range(20):
        row, column = divmod(index, 4)
        left, bottom = columns[1] + column * (small + 0.003), 0.765 - row * (small_height + 0.01)
        picture(left, bottom, small, small_height, pixels[index].permute(1, 2, 0).clamp(0, 1))
    wide, tall = 0.14, 0.14 * width / height
    bottom = 0.55 - tall / 2
    scale = hessian.diagonal().rsqrt()
    correlations = (hessian * scale[:, None] * scale)[:96, :96]
    picture(columns[2], bottom, wide, tall, correlations, cmap="PuOr", vmin=-1, vmax=1, interpolation="nearest")
    pruned = trace.layers[layer].weight.flatten(1)[:80, :80]
    weight = module.weight.detach().flatten(1)[:80, :80]
    limit = weight.abs().quantile(0.98).item()
    style = {"cmap": "PuOr", "vmin": -limit, "vmax": limit, "interpolation": "nearest"}
    picture(columns[3], bottom, wide, tall, weight, **style)
    picture(columns[4], bottom, wide, tall, pruned, **style)
    half, half_height = 0.113, 0.113 * width / height
    for row, (name, maps, colour) in enumerate(
        (("dense", explanation.dense, GREY), ("SPADE", explanation.spade, BLUE))
    ):
        heat = maps["integrated_gradients"]
        bottom_row = 0.55 - row * (half_height + 0.02)
        picture(columns[5] + 0.018, bottom_row, half, half_height, heat, cmap="magma", vmax=heat.quantile(0.995).item())
        figure.text(
            columns[5] + 0.006, bottom_row + half_height / 2, name, rotation=90, va="center", fontsize=10, color=colour
        )
    notes = {
        1: "64 crops, flipped and\nrecoloured; one dense pass",
        2: "H = 2/n X Xᵀ of its inputs\n(96 columns, as correlations:\nviolet 1, white 0, orange -1)",
        3: f"{layer}\n(80 x 80 of them; violet\nabove zero, orange below)",
        4: f"{100 * trace.layers[layer].sparsity:.0f} % gone, the others\nadjusted, column by column",
        5: "integrated gradients, each from\n0 to its 99.5th percentile",
    }
    for index, note in notes.items():
        figure.text(columns[index], 0.14, note, fontsize=9, color=NOTE, va="top")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs/figures", help="folder")
    parser.add_argument("--steps", type=int, default=384, help="of the visualizations")
    arguments = parser.parse_args()
    net = sf.load_model("efficientnet_lite0")
    write(sf.explain(net, Image.fromarray(data.coffee())).figure(), arguments.out / "demo.jpg")
    write(figure2(net), arguments.out / "figure2.jpg")
    write(figure1_right(), arguments.out / "figure1_right.jpg")
    write(figure1_left(net, arguments.steps), arguments.out / "figure1_left.jpg")


if __name__ == "__main__":
    main()
