"""Layers of published networks at 224 x 224: channels in and out, map size, kernel, stride, groups, and how often."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import timm
import torch
import torchvision
from torch import Tensor, nn


class Layer(NamedTuple):
    """One kind of layer; `size` is the side of its input maps, 1 for a linear layer."""

    channels: int
    outputs: int
    size: int
    kernel: int
    stride: int
    padding: int
    groups: int

    def __str__(self) -> str:
        """Short form for tables."""
        groups = "" if self.groups == 1 else f" g{self.groups}"
        return f"{self.kernel}x{self.kernel}/{self.stride} {self.channels}>{self.outputs}{groups} at {self.size}"

    @property
    def positions(self) -> int:
        """Output positions of one image."""
        return ((self.size + 2 * self.padding - self.kernel) // self.stride + 1) ** 2

    @property
    def columns(self) -> int:
        """Columns of one group's patches."""
        return self.channels // self.groups * self.kernel**2


NETWORKS = {
    "ResNet-50": torchvision.models.resnet50,
    "MobileNetV2": torchvision.models.mobilenet_v2,
    "ConvNeXt-Tiny": torchvision.models.convnext_tiny,
    "EfficientNet-Lite0": lambda: timm.create_model("tf_efficientnet_lite0"),
}


def layers_of(network: str) -> Counter[Layer]:
    """All prunable layers of a network but its first, with their number."""
    model = NETWORKS[network]().eval()
    found: list[Layer] = []

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if isinstance(module, nn.Linear):
            tokens = args[0].shape[1:-1].numel()
            found.append(Layer(module.in_features, module.out_features, round(tokens**0.5), 1, 1, 0, 1))
        else:
            found.append(
                Layer(
                    module.in_channels,
                    module.out_channels,
                    args[0].shape[2],
                    module.kernel_size[0],
                    module.stride[0],
                    module.padding[0],
                    module.groups,
                )
            )

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_pre_hook(hook)
    with torch.no_grad():
        model(torch.zeros(1, 3, 224, 224))
    return Counter(found[1:])
