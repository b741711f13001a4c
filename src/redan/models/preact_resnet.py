"""Pre-activation ResNet (He et al., ECCV 2016) with the CIFAR stem."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from redan.models.norms import Normalise
from redan.models.stages import Projection, stages


class PreActBlock(nn.Module):
    """BatchNorm and ReLU before each of two 3x3 convolutions; a projection shortcut starts after the first ReLU."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.projects = stride != 1 or channels_in != channels_out
        if self.projects:
            self.shortcut = Projection(channels_in, channels_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        activated = torch.relu(self.bn1(x))
        shortcut = self.shortcut(activated) if self.projects else x
        out: Tensor = self.conv2(torch.relu(self.bn2(self.conv1(activated)))) + shortcut
        return out


class PreActResNet(nn.Module):
    """Pre-activation ResNet in four stages of ``width`` to ``8 * width`` channels.

    Args:
        normalise: the input normalisation, the first layer.
        depths: blocks a stage; (2, 2, 2, 2) is PreActResNet-18.
        width: channels of the first stage; 64 is the published network.

    Attributes:
        activations: the layers whose ReLU'd outputs are the last stage's activations, the pooled ones included.

    Shape: images ``(n, in_channels, h, w)`` in [0, 1] to logits ``(n, classes)``.
    """

    def __init__(
        self, normalise: Normalise, *, depths: Sequence[int], classes: int, in_channels: int, width: int = 64
    ) -> None:
        super().__init__()
        self.normalise = normalise
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        widths = [width * 2**i for i in range(4)]
        self.layer1, self.layer2, self.layer3, self.layer4 = stages(PreActBlock, width, widths, depths)
        self.bn = nn.BatchNorm2d(widths[-1])
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(widths[-1], classes)
        self.activations = (*(f"layer4.{i}.bn{k}" for i in range(depths[-1]) for k in (1, 2)), "bn")

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv1(self.normalise(images))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.linear(self.pool(torch.relu(self.bn(x))).flatten(1))
        return logits
