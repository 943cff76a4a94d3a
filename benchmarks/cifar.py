"""The CIFAR-10 residual networks and photographs beside a checkout, for experiments and tests on real weights."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spade_fast as sf

FOLDER = Path(__file__).parents[2] / "shared" / "data" / "cifar10"
PREPROCESS = sf.Preprocess(
    mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), input_size=32, resize_size=32, interpolation="bilinear"
)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (He et al. 2016, option A)."""

    def __init__(self, channels: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.stride, self.extra = stride, outputs - channels

    def forward(self, input: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(input)))))
        shortcut = input[:, :, :: self.stride, :: self.stride]
        shortcut = F.pad(shortcut, (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2))
        return self.relu2(residual + shortcut)


class CifarResNet(nn.Module):
    """ResNet of 6 * blocks + 2 layers for 32 x 32 images and 10 classes."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(16, 32, blocks, 2)
        self.layer3 = self._stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, 10)

    @staticmethod
    def _stage(channels: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(channels, outputs, stride)
        return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)))

    def forward(self, input: Tensor) -> Tensor:
        features = self.layer3(self.layer2(self.layer1(self.relu(self.bn1(self.conv1(input))))))
        return self.linear(features.mean(dim=(2, 3)))


def load_resnet(depth: int) -> CifarResNet:
    """ResNet-20 or ResNet-56 with its trained weights, in evaluation mode."""
    model = CifarResNet((depth - 2) // 6).eval()
    sf.load_checkpoint(FOLDER / f"resnet{depth}.safetensors", model)
    return model


def load_images(every: int = 1, first: int = 0) -> tuple[Tensor, Tensor]:
    """Every so-many-th test image: pixels [n, 3, 32, 32] in 0..1 and labels [n]."""
    paths = sorted((FOLDER / "images").glob("*.jpg"))[first::every]
    pixels = torch.stack([PREPROCESS.view(sf.load_image(path)) for path in paths])
    return pixels, torch.tensor([int(path.name.partition("_")[0]) for path in paths])
