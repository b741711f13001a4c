"""Plain convolutional networks: COLT's two, CNN7 of the certified trainers after it, and a small one for tiny images.

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


def cnn7(
    normalise: Normalise, *, in_channels: int, size: int, classes: int, width: int = 64, hidden: int = 512
) -> nn.Sequential:
    """CNN7 of Shi et al. (NeurIPS 2021): five 3x3 convolutions, the third of stride 2, and two linear layers.

    ``width`` filters twice, then ``2 width``; a BatchNorm behind each layer but the last. Convolutions and the hidden
    layer have no bias, for BatchNorm would take it out again.

    Shape: images ``(n, in_channels, size, size)`` in [0, 1] to logits ``(n, classes)``.
    """
    layers: list[nn.Module] = [normalise]
    channels = in_channels
    for filters, stride in ((width, 1), (width, 1), (2 * width, 2), (2 * width, 1), (2 * width, 1)):
        layers.append(nn.Conv2d(channels, filters, 3, stride, padding=1, bias=False))
        layers += [nn.BatchNorm2d(filters), nn.ReLU()]
        channels = filters
    return nn.Sequential(
        *layers,
        nn.Flatten(),
        nn.Linear(channels * ((size + 1) // 2) ** 2, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, classes),
    )


def small_cnn(
    normalise: Normalise, *, in_channels: int, size: int, classes: int, width: int = 16, batch_norm: bool = False
) -> nn.Sequential:
    """Three 3x3 convolutions of ``width`` to ``2 width`` filters, two of them of stride 2, for images of 8x8 to 32x32.

    With ``batch_norm`` each is followed by a BatchNorm2d; ``activations`` then names the last one.

    Shape: images ``(n, in_channels, size, size)`` in [0, 1] to logits ``(n, classes)``.
    """
    layers: list[nn.Module] = [normalise]
    for channels, filters, stride in ((in_channels, width, 1), (width, 2 * width, 2), (2 * width, 2 * width, 2)):
        layers.append(nn.Conv2d(channels, filters, 3, stride, padding=1, bias=not batch_norm))
        layers += [nn.BatchNorm2d(filters), nn.ReLU()] if batch_norm else [nn.ReLU()]
    network = nn.Sequential(
        *layers,
        nn.Flatten(),
        nn.Linear(2 * width * ((size + 3) // 4) ** 2, 8 * width),
        nn.ReLU(),
        nn.Linear(8 * width, classes),
    )
    if batch_norm:
        network.activations = (str(len(layers) - 2),)  # type: ignore[assignment]
    return network
