"""Networks for images: those of the AutoFLIP and FedSparsify papers, and residual networks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from secateur.errors import ModelError


def _channels(input_shape: tuple[int, ...], *, least: int = 1) -> int:
    if len(input_shape) != 3:
        raise ModelError(
            f"an image model needs inputs (channels, height, width), the data has {input_shape}; "
            "choose another model, such as model.name=mlp"
        )
    if min(input_shape[1:]) < least:
        raise ModelError(f"this model needs images of at least {least}x{least}, the data has {input_shape}")
    return input_shape[0]


class SmallCNN(nn.Sequential):
    """Two 3x3 convolutions and two linear layers for small images such as 8x8 digits.

    Reference: none; a small stand-in for demonstrations.
    """

    def __init__(self, input_shape: tuple[int, ...], outputs: int, *, width: int = 16, features: int = 64) -> None:
        """Make convolutions of ``width`` and ``2 width`` channels and a hidden layer of ``features``."""
        channels, height, across = _channels(input_shape, least=4), input_shape[1] // 4, input_shape[2] // 4
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(2 * width * height * across, features)
        self.relu3 = nn.ReLU()
        self.fc2 = nn.Linear(features, outputs)


class TwoCNN(nn.Sequential):
    """The "four-layer CNN" of AutoFLIP: two 5x5 convolutions, average pool to 7x7, two linear layers.

    1,663,370 parameters for one channel and 10 classes at ``hidden`` 32; 1,664,970 for three channels.

    Reference: AutoFLIP, arXiv 2405.10271 (TwoCNN of its published code).
    """

    def __init__(self, input_shape: tuple[int, ...], outputs: int, *, hidden: int = 32, features: int = 512) -> None:
        """Make convolutions of ``hidden`` and ``2 hidden`` channels and a linear layer of ``features``."""
        super().__init__()
        self.conv1 = nn.Conv2d(_channels(input_shape), hidden, 5, padding=1)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2, padding=1)
        self.conv2 = nn.Conv2d(hidden, 2 * hidden, 5, padding=1)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2, padding=1)
        sides = [((side - 2) // 2 + 1 - 2) // 2 + 1 for side in input_shape[1:]]
        self.average = nn.Identity() if sides == [7, 7] else nn.AdaptiveAvgPool2d(7)  # the same, and nothing to compute
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(2 * hidden * 49, features)
        self.relu3 = nn.ReLU()
        self.fc2 = nn.Linear(features, outputs)


class FEMNISTCNN(TwoCNN):
    """AutoFLIP's CNN for FEMNIST: TwoCNN with 64 and 128 channels and 2,048 features.

    13,180,734 parameters for one channel and 62 classes.

    Reference: AutoFLIP, arXiv 2405.10271 (FEMNISTCNN of its published code).
    """

    def __init__(self, input_shape: tuple[int, ...], outputs: int, *, hidden: int = 64, features: int = 2048) -> None:
        """See ``TwoCNN``."""
        super().__init__(input_shape, outputs, hidden=hidden, features=features)


def _blocks(channels: int, plan: Sequence[int | str], *, norm_each: bool) -> list[nn.Module]:
    """Return 3x3 convolutions by width; ``M`` is a pool, ``N`` a batch norm."""
    layers: list[nn.Module] = []
    for item in plan:
        if item == "M":
            layers.append(nn.MaxPool2d(2))
        elif item == "N":
            layers.append(nn.BatchNorm2d(channels))
        else:
            layers.append(nn.Conv2d(channels, int(item), 3, padding=1))
            channels = int(item)
            layers += [nn.BatchNorm2d(channels)] if norm_each else []
            layers.append(nn.ReLU())
    return layers


class SparsifyCNN(nn.Sequential):
    """FedSparsify's CIFAR-10 network: six 3x3 convolutions, batch norm after the first two pools.

    1,609,930 parameters for three channels, 32x32 and 10 classes.

    Reference: FedSparsify, arXiv 2204.12430.
    """

    def __init__(self, input_shape: tuple[int, ...], outputs: int, *, dropout: float = 0.2) -> None:
        """Make the network; height and width are at least 8, and rounded down to multiples of 8 by its pools."""
        plan: list[int | str] = [64, 64, "M", "N", 128, 128, "M", "N", 128, 128, "M"]
        super().__init__()
        self.features = nn.Sequential(*_blocks(_channels(input_shape, least=8), plan, norm_each=False))
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(128 * (input_shape[1] // 8) * (input_shape[2] // 8), 512)
        self.relu = nn.ReLU()
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(512, outputs)


class VGG16(nn.Sequential):
    """VGG-16 with batch norm and one linear layer, FedSparsify's CIFAR-100 network.

    14,774,436 parameters for three channels, 32x32 and 100 classes.

    Reference: Simonyan and Zisserman, arXiv 1409.1556; as used by FedSparsify, arXiv 2204.12430.
    """

    def __init__(self, input_shape: tuple[int, ...], outputs: int) -> None:
        """Make the network; height and width are at least 32, and rounded down to multiples of 32 by its pools."""
        plan: list[int | str] = [64, 64, "M", 128, 128, "M"]
        plan += [256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"]
        super().__init__()
        self.features = nn.Sequential(*_blocks(_channels(input_shape, least=32), plan, norm_each=True))
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(512 * (input_shape[1] // 32) * (input_shape[2] // 32), outputs)


class _Block(nn.Module):
    """Two 3x3 convolutions with group norm and a shortcut."""

    def __init__(self, entering: int, leaving: int, *, stride: int, groups: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(entering, leaving, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(groups, leaving)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(leaving, leaving, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, leaving)
        self.relu2 = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or entering != leaving:
            self.shortcut = nn.Sequential(
                nn.Conv2d(entering, leaving, 1, stride=stride, bias=False), nn.GroupNorm(groups, leaving)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x)))))
        result: torch.Tensor = self.relu2(inner + self.shortcut(x))
        return result


def _resnet(channels: int, widths: Sequence[int], depth: int, outputs: int, groups: int) -> dict[str, nn.Module]:
    blocks: list[nn.Module] = []
    entering = widths[0]
    for stage, width in enumerate(widths):
        for n in range(depth):
            blocks.append(_Block(entering, width, stride=2 if stage and n == 0 else 1, groups=groups))
            entering = width
    return {
        "conv": nn.Conv2d(channels, widths[0], 3, padding=1, bias=False),
        "norm": nn.GroupNorm(groups, widths[0]),
        "relu": nn.ReLU(),
        "blocks": nn.Sequential(*blocks),
        "average": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
        "fc": nn.Linear(widths[-1], outputs),
    }


class ResNet20(nn.Sequential):
    """ResNet-20 for 32x32 images with group norm instead of batch norm.

    Reference: He et al., arXiv 1512.03385; group norm for federated training: Hsieh et al., arXiv 1910.00189.
    """

    def __init__(self, input_shape: tuple[int, ...], outputs: int, *, width: int = 16, groups: int = 2) -> None:
        """Make three stages of three blocks, ``width`` to ``4 width`` channels."""
        super().__init__()
        for name, module in _resnet(_channels(input_shape), [width, 2 * width, 4 * width], 3, outputs, groups).items():
            self.add_module(name, module)


class ResNet18(nn.Sequential):
    """ResNet-18 with a 3x3 stem for small images and group norm instead of batch norm.

    Reference: He et al., arXiv 1512.03385; group norm for federated training: Hsieh et al., arXiv 1910.00189.
    """

    def __init__(self, input_shape: tuple[int, ...], outputs: int, *, width: int = 64, groups: int = 2) -> None:
        """Make four stages of two blocks, ``width`` to ``8 width`` channels."""
        super().__init__()
        widths = [width, 2 * width, 4 * width, 8 * width]
        for name, module in _resnet(_channels(input_shape), widths, 2, outputs, groups).items():
            self.add_module(name, module)
