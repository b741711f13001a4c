"""ResNet for small images (He et al., CVPR 2016) with the CIFAR stem: a 3x3 convolution, no pooling."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from redan.models.norms import Normalise
from redan.models.stages import Projection, stages


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, each followed by BatchNorm, and a shortcut added before the last ReLU."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(Projection(channels_in, channels_out, stride), nn.BatchNorm2d(channels_out))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet of basic blocks in four stages of ``width`` to ``8 * width`` channels.

    Args:
        normalise: the input normalisation, the first layer.
        depths: blocks a stage; (2, 2, 2, 2) is ResNet-18, (3, 4, 6, 3) is ResNet-34.
        width: channels of the first stage; 64 is the published network.
        second_stride: of the second stage; 1 keeps the resolution there, as the teacher of LBGAT does.

    Attributes:
        activations: the layers whose ReLU'd outputs are looked at in the last stage: each BatchNorm of its blocks,
            the second ones before the shortcut is added.

    Shape: images ``(n, in_channels, h, w)`` in [0, 1] to logits ``(n, classes)``.

    Raises:
        ValueError: for a second stride other than 1 and 2.
    """

    def __init__(
        self,
        normalise: Normalise,
        *,
        depths: Sequence[int],
        classes: int,
        in_channels: int,
        width: int = 64,
        second_stride: int = 2,
    ) -> None:
        super().__init__()
        if second_stride not in (1, 2):
            raise ValueError(f"second_stride is 1 or 2, got {second_stride}")
        self.normalise = normalise
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        widths = [width * 2**i for i in range(4)]
        self.layer1, self.layer2, self.layer3, self.layer4 = stages(BasicBlock, width, widths, depths, second_stride)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(widths[-1], classes)
        self.activations = tuple(f"layer4.{i}.bn{k}" for i in range(depths[-1]) for k in (1, 2))

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(self.normalise(images))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.linear(self.pool(x).flatten(1))
        return logits
