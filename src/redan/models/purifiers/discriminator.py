"""SN-PatchGAN: the critic that DeepFill v2 trains against (Yu et al., ICCV 2019)."""

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm


class PatchDiscriminator(nn.Module):
    """Convolutions of 5x5 and stride 2, spectrally normalised (Miyato et al., ICLR 2018), until the side is at most 4.

    Each entry of the last map scores the part of the image that it sees: high for real, low for generated.

    Args:
        channels: of the images.
        size: side of the images, in pixels; 256 has six layers, 32 three, 8 one, and a smaller one has one, too.
        width: features of the first layer; twice as many in the second, four times as many from the third on.

    Shape: images ``(n, channels, size, size)`` in [0, 1] and holes ``(n, 1, size, size)`` to ``(n, k)``.
    """

    def __init__(self, *, channels: int, size: int, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        features, side = channels + 1, size
        while side > 4 or not layers:
            wider = width * min(2 ** (len(layers) // 2), 4)
            layers += [spectral_norm(nn.Conv2d(features, wider, 5, stride=2, padding=2)), nn.LeakyReLU(0.2)]
            features, side = wider, (side + 1) // 2
        self.layers = nn.Sequential(*layers, nn.Flatten())

    def forward(self, images: Tensor, holes: Tensor) -> Tensor:
        scores: Tensor = self.layers(torch.cat([2 * images - 1, holes], 1))
        return scores
