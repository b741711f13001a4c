"""Plain convolutional networks: COLT's two (Balunović & Vechev, ICLR 2020) and a small one for tiny images.

They are chains of layers and nothing else, which is what a verifier reads best.
"""

from torch import nn

from redan.models.norms import Normalise


def conv_med(
    normalise: Normalise, *, in_channels: int, size: int, classes: int, w1: int = 2, w2: int = 4, hidden: int = 250
) -> nn.Sequential:
    """COLT's ConvMed: two convolutions of ``16 w1`` and ``32 w2`` filters, both of stride 2, and two linear layers.

    Shape: images ``(n, in_channels, size, size)`` in [0, 1] to logits ``(n, classes)``.
    """
    side = (size + 4 - 5) // 2 + 1  # kernel 5, stride 2, padding 2
    side = (side + 2 - 4) // 2 + 1  # kernel 4, stride 2, padding 1
    return nn.Sequential(
        normalise,
        nn.Conv2d(in_channels, 16 * w1, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(16 * w1, 32 * w2, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * w2 * side * side, hidden),
        nn.ReLU(),
        nn.Linear(hidden, classes),
    )


def conv_med_big(
    normalise: Normalise,
    *,
    in_channels: int,
    size: int,
    classes: int,
    w1: int = 2,
    w2: int = 2,
    w3: int = 4,
    hidden: int = 250,
) -> nn.Sequential:
    """COLT's ConvMedBig: three convolutions of ``16 w1``, ``16 w2`` and ``32 w3`` filters and two linear layers.

    Shape: images ``(n, in_channels, size, size)`` in [0, 1] to logits ``(n, classes)``.
    """
    side = size  # kernel 3, stride 1, padding 1
    for _ in range(2):
        side = (side + 2 - 4) // 2 + 1  # kernel 4, stride 2, padding 1
    return nn.Sequential(
        normalise,
        nn.Conv2d(in_channels, 16 * w1, 3, stride=1, padding=1),
        nn.ReLU(),
        nn.Conv2d(16 * w1, 16 * w2, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16 * w2, 32 * w3, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * w3 * side * side, hidden),
        nn.ReLU(),
        nn.Linear(hidden, classes),
    )


def small_cnn(normalise: Normalise, *, in_channels: int, size: int, classes: int, width: int = 16) -> nn.Sequential:
    """Three 3x3 convolutions of ``width`` to ``2 width`` filters, two of them of stride 2, for images of 8x8 to 32x32.

    Shape: images ``(n, in_channels, size, size)`` in [0, 1] to logits ``(n, classes)``.
    """
    return nn.Sequential(
        normalise,
        nn.Conv2d(in_channels, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * width * ((size + 3) // 4) ** 2, 8 * width),
        nn.ReLU(),
        nn.Linear(8 * width, classes),
    )
