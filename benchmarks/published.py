"""FastSPADE as published, in plain PyTorch, from the photograph to the sparse weights: what traces are timed against.

Views are drawn one by one with torchvision's transforms, forward hooks unfold every layer's inputs into a running
Hessian, and each layer is inverted and pruned column by column (spade_fast.reference). Some things are as in
spade_fast, so that results can be compared: exact counts, the columns that share a threshold, and damping without
dead inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms

from spade_fast import reference
from spade_fast.layers import mask_block_size
from spade_fast.ops import Geometry


def draw_views(image: Image.Image, size: int, count: int) -> Tensor:
    """Views [count, 3, size, size] of the published distribution, in 0..1."""
    augment = transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=(0.2, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(brightness=0.5, hue=0.3),
            transforms.ToTensor(),
        ]
    )
    return torch.stack([augment(image) for _ in range(count)])


def hessians(model: nn.Module, names: Sequence[str], inputs: Tensor, batch_size: int = 64) -> dict[str, Tensor]:
    """H = (2 / n) X X^T of each named layer, [groups, d, d], from unfolded inputs."""
    layers = {name: model.get_submodule(name) for name in names}
    sums: dict[str, tuple[Tensor, int]] = {}

    def record(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if isinstance(module, nn.Linear):
                images, geometry = args[0].reshape(-1, args[0].shape[-1])[:, :, None, None], Geometry()
                samples = images.shape[0]
            else:
                images = args[0]
                geometry = Geometry(module.kernel_size, module.stride, module.padding, module.dilation, module.groups)
                samples = output.shape[0] * output.shape[2] * output.shape[3]
            hessian, seen = sums.get(name, (images.new_zeros(1), 0))
            total = seen + samples
            sums[name] = (
                hessian * (seen / total) + reference.conv2d_gram(images, geometry) * (2 / total),
                total,
            )

        return hook

    handles = [layer.register_forward_hook(record(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            for batch in inputs.split(batch_size):
                model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: hessian for name, (hessian, _) in sums.items()}


def trace(
    model: nn.Module,
    targets: dict[str, float],
    preprocess: Callable[[Tensor], Tensor],
    views: Callable[[], Tensor],
    batch_size: int = 64,
) -> dict[str, tuple[Tensor, float]]:
    """Sparse weight and loss of each layer in `targets`."""
    found = hessians(model, list(targets), preprocess(views()), batch_size)
    pruned = {}
    for name, target in targets.items():
        weight, hessian = model.get_submodule(name).weight.detach(), found[name]
        diagonal = hessian.diagonal(dim1=1, dim2=2)
        dead = diagonal == 0
        live_mean = diagonal.sum(1, keepdim=True) / (~dead).sum(1, keepdim=True).clamp(min=1)
        diagonal.copy_(torch.where(dead, torch.where(live_mean > 0, live_mean, 1), diagonal))
        diagonal.add_(0.01 * diagonal.mean(1, keepdim=True))
        grouped = weight.reshape(hessian.shape[0], -1, hessian.shape[1]).masked_fill(dead[:, None], 0)
        sparse, _, loss = reference.prune_columns(
            grouped, reference.factor(hessian), target, mask_block_size(weight, target), published_count=False
        )
        pruned[name] = (sparse.view(weight.shape), loss.item())
    return pruned
