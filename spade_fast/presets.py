"""Ready plans and the default error budget, as ``spade_fast.presets``."""

from __future__ import annotations

from torch import nn

from spade_fast.layers import is_depthwise, prunable_layers
from spade_fast.plans import ErrorBudget, SparsityPlan

#: Targets that the authors tuned for LRP on the backdoored ResNet-50 with FastSPADE at 1024 augmentations, one per
#: residual block (their demonstration notebook). The first convolution stays dense.
resnet50_lrp = SparsityPlan.from_mapping(
    {
        "layer1.0": 0.2, "layer1.1": 0.8, "layer1.2": 0.0,
        "layer2.0": 0.2, "layer2.1": 0.0, "layer2.2": 0.99, "layer2.3": 0.95,
        "layer3.0": 0.8, "layer3.1": 0.8, "layer3.2": 0.9, "layer3.3": 0.8, "layer3.4": 0.0, "layer3.5": 0.0,
        "layer4.0": 0.95, "layer4.1": 0.95, "layer4.2": 0.95,
        "fc": 0.95,
    }
)  # fmt: skip

#: The last blocks of a ResNet-50 at 0.95, for visualizing its class neurons (SPADE section 4.2). The authors'
#: evaluation files name the blocks as 4.1, 4.2 and fc; the paper's own text was not at hand to confirm it.
resnet50_visualization = SparsityPlan.uniform(0.95, layers=("layer4.1", "layer4.2", "fc"))


#: For any network: each layer as sparse as its outputs bear. It beat plans with fixed targets (docs/experiments.md).
default = ErrorBudget(0.03)


def last_half(model: nn.Module) -> SparsityPlan:
    """The later half of the layers at 0.8, depthwise convolutions dense: less to solve, and so faster.

    "Half" counts the prunable layers that are not depthwise, in the order in which the model lists them.
    """
    layers = [name for name, layer in prunable_layers(model).items() if not is_depthwise(layer)]
    return SparsityPlan.uniform(0.8, layers=layers[len(layers) // 2 :])
