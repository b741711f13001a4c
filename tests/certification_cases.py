"""Small networks, all bounders, points of regions, what bounds say wrongly of them, exact minima: for many tests."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor

from redan.certification.alpha_crown import AlphaCrown
from redan.certification.building import Builder
from redan.certification.crown import Crown
from redan.certification.interval import Interval
from redan.certification.network import Affine, Network, Relu
from redan.certification.regions import Bounds, Region, Specification
from redan.certification.rounding import SoundFloat
from redan.certification.zonotope import Zonotope
from redan.threats import L1, LpBall

Bounder = Callable[[Network, Region, Specification], Bounds]

BOUNDERS: dict[str, Callable[[SoundFloat], Bounder]] = {
    "interval": lambda sound: Interval(sound),
    "zonotope": lambda sound: Zonotope(sound=sound),
    "learned zonotope": lambda sound: Zonotope(iterations=3, sound=sound),
    "crown-ibp": lambda sound: Crown("interval", sound),
    "crown": lambda sound: Crown("crown", sound),
    "alpha-crown": lambda sound: AlphaCrown(iterations=4, sound=sound),
    "alpha-crown of the margins": lambda sound: AlphaCrown(iterations=4, intermediate="crown", sound=sound),
}
TYPES = [torch.float32, torch.float64]


def draws(seed: int) -> Callable[..., Tensor]:
    """Standard normal numbers that float32 has, in float64."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator).double()


def dense(seed: int, hidden: tuple[int, ...] = (6, 5), inputs: int = 4, scale: float = 1.0) -> Network:
    """A normalisation, fully connected layers and ReLUs, 3 classes; weights of each layer times ``scale``."""
    normal = draws(seed)
    b = Builder((inputs, 1, 1))
    x = b.reshape(b.scale(0, 2.0, -0.5), (inputs,))
    for size in hidden:
        x = b.relu(b.linear(x, scale * normal(size, b.shape(x)[0]), 0.3 * scale * normal(size)))
    return b.network(b.linear(x, scale * normal(3, b.shape(x)[0]), scale * normal(3)))


def convolutional(seed: int) -> Network:
    """2 x 5 x 4 images; strides, padding, dilation, groups."""
    normal = draws(seed)
    b = Builder((2, 5, 4))
    x = b.relu(b.convolution(0, normal(4, 2, 3, 3), 0.3 * normal(4), (2, 1), (1, 1)))
    x = b.relu(b.convolution(x, normal(4, 2, 2, 2), 0.3 * normal(4), (1, 1), (0, 1), (2, 2), groups=2))
    x = b.relu(b.convolution(x, normal(2, 4, 1, 3), None, padding=(0, 1)))
    return b.network(b.linear(_flat(b, x), normal(3, 8), normal(3)))


def residual(seed: int) -> Network:
    """A block with a shortcut, and one whose shortcut is a convolution with the block's stride."""
    normal = draws(seed)
    b = Builder((1, 4, 4))
    x = b.relu(b.convolution(0, normal(2, 1, 3, 3), normal(2), padding=(1, 1)))
    y = b.relu(b.convolution(x, normal(2, 2, 3, 3), normal(2), padding=(1, 1)))
    x = b.relu(b.add(x, b.convolution(y, 0.3 * normal(2, 2, 3, 3), None, padding=(1, 1))))
    y = b.convolution(x, normal(3, 2, 3, 3), None, (2, 2), (1, 1))
    x = b.relu(b.add(b.convolution(x, normal(3, 2, 1, 1), normal(3), (2, 2)), y))
    return b.network(b.linear(_flat(b, b.average_pool(x, (2, 2), (2, 2))), normal(3, 3), normal(3)))


def normalised(seed: int) -> Network:
    """BatchNorm before and behind a convolution."""
    normal = draws(seed)
    b = Builder((2, 4, 3))
    statistics = [(normal(c), normal(c), normal(c), normal(c).square() + 0.1, 1e-5) for c in (2, 3)]
    x = b.convolution(b.batch_norm(0, *statistics[0]), normal(3, 2, 2, 2), normal(3), padding=(1, 0))
    x = b.relu(b.batch_norm(x, *statistics[1]))
    return b.network(b.linear(_flat(b, x), normal(3, 30), None))


def pooled(seed: int) -> Network:
    """Max pooling whose windows overlap and reach over an edge, channels last."""
    normal = draws(seed)
    b = Builder((1, 5, 5))
    x = b.max_pool(b.convolution(0, normal(2, 1, 2, 2), normal(2)), (3, 2), (1, 2), (0, 0, 0, 0))
    x = b.permute(x, (1, 2, 0))
    return b.network(b.linear(_flat(b, x), normal(3, 8), normal(3)))


def leaky(seed: int) -> Network:
    """Leaky ReLU, ReLU6, a clamp that is open above; branches of cut channels, joined."""
    normal = draws(seed)
    b = Builder((3, 3, 2))
    x = b.leaky_relu(b.convolution(0, normal(4, 3, 2, 1), normal(4)), 0.1)
    parts = [b.clamp(b.slice(x, 0, 0, 2), -0.5, 1.0), b.pad(b.slice(x, 0, 1, 4, 2), (0, 0, 0, 0))]
    x = b.clamp(b.convolution(b.concatenate(parts, 0), normal(3, 4, 2, 2), normal(3)), 0.25, None)
    return b.network(b.linear(_flat(b, x), normal(3, 3), normal(3)))


def curved(seed: int) -> Network:
    """Sigmoid of a convolution and of the pixels themselves, tanh beside a shortcut, a ReLU between."""
    normal = draws(seed)
    b = Builder((2, 3, 3))
    x = b.sigmoid(b.convolution(0, 2 * normal(3, 2, 2, 2), normal(3), padding=(1, 1)))
    x = b.relu(b.convolution(b.concatenate([x, b.pad(b.sigmoid(0), (0, 1, 1, 0))], 0), normal(3, 5, 3, 3), normal(3)))
    x = b.add(x, b.tanh(b.convolution(x, normal(3, 3, 1, 1), normal(3))))
    return b.network(b.linear(b.tanh(_flat(b, x)), normal(3, 12), normal(3)))


RELU_NETWORKS: dict[str, Callable[[int], Network]] = {
    "dense": dense,
    "convolutional": convolutional,
    "residual": residual,
    "normalised": normalised,
    "pooled": pooled,
    "leaky": leaky,
}
NETWORKS = RELU_NETWORKS | {"curved": curved}


def _flat(b: Builder, x: int) -> int:
    return b.reshape(x, (torch.Size(b.shape(x)).numel(),))


def images_of(network: Network, count: int, seed: int) -> Tensor:
    """Random images in [0, 1], float32."""
    return torch.rand(count, *network.input_shape, generator=torch.Generator().manual_seed(seed))


def problem(network: Network, threat: LpBall, seed: int = 0, images: int = 2) -> tuple[Region, Specification]:
    """Random images with the labels that the network gives them."""
    x = images_of(network, images, seed)
    return Region.around(x, threat), Specification.robust(network(x.to(network.dtype)).argmax(1), network.classes)


def points(network: Network, region: Region, specification: Specification, seed: int, count: int = 40) -> Tensor:
    """Points of each region, ``(k, n, *shape)`` float64: its ends, random ones, corners, and ends of ascents."""
    exact = network.to(torch.float64)
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(count, *region.lower.shape, generator=generator).double()
    share[count // 3 :] = share[count // 3 :].round()  # corners
    found = torch.cat([torch.stack([region.lower, region.upper]), region.lower.lerp(region.upper, share)])
    # Corners that a margin's gradient points to, from random points, a few times.
    x = found[2:12].clone()
    for _ in range(6):
        x = inside(region, x).requires_grad_()
        margins = specification_values(specification, exact, x)
        row = torch.arange(len(x)) % margins.shape[2]
        (gradient,) = torch.autograd.grad(margins[torch.arange(len(x)), :, row].sum(), [x])
        x = torch.where(gradient > 0, region.lower, torch.where(gradient < 0, region.upper, x)).detach()
        found = torch.cat([found, x])
    return inside(region, found)


def inside(region: Region, x: Tensor) -> Tensor:
    """Points of boxes ``(k, n, *shape)``, drawn to the centre until the ball has them (a hair inside, for rounding)."""
    if region.ball is None or region.centre is None:
        return x
    off = x - region.centre
    size = off.flatten(2).norm(p=1 if isinstance(region.ball, L1) else 2, dim=2)
    shrink = ((1 - 1e-12) * region.ball.radius / size.clamp(min=1e-300)).clamp(max=1)
    return region.centre + off * shrink.view(*size.shape, *(1,) * (off.dim() - 2))


def outputs(network: Network, x: Tensor) -> list[Tensor]:
    """Of every layer, at points ``(k, n, *shape)``."""
    return [it.view(*x.shape[:2], *it.shape[1:]) for it in network.outputs(x.flatten(0, 1))]


def exactly(network: Network, x: Tensor) -> list[Tensor]:
    """Outputs in float64 of the weights that a network has."""
    return outputs(network.to(torch.float64), x)


def specification_values(specification: Specification, network: Network, x: Tensor) -> Tensor:
    """``(k, n, m)`` at points ``(k, n, *shape)``."""
    logits = outputs(network, x)[-1]
    return torch.stack([specification.values(it) for it in logits])


def violations(bounds: Bounds, found: list[Tensor], specification: Specification) -> int:
    """How many numbers lie outside of the bounds, or are bounded by NaN.

    Args:
        bounds: of a network.
        found: outputs of its layers, ``(k, n, ...)``.
        specification: of the margins.
    """
    count = 0
    for position, (lower, upper) in bounds.layers.items():
        values = found[position].double()
        count += int((~((values >= lower.double()) & (values <= upper.double()))).sum())
    margins = torch.stack([specification.values(it) for it in found[-1]])
    return count + int((~(margins >= bounds.margins)).sum())


def outputs_in_order(network: Network, x: Tensor, seed: int) -> list[Tensor]:
    """Of every layer in float32, products added one by one in a random order; points ``(k, n, *shape)``."""
    generator = torch.Generator().manual_seed(seed)
    found: list[Tensor] = []
    for layer in network.to(torch.float32).layers:
        inputs = [found[i] for i in layer.inputs] or [x.flatten(0, 1).float()]
        if not isinstance(layer, Affine) or not layer.roundings or len(inputs) > 1:
            found.append(layer(*inputs))
            continue
        n, size = len(inputs[0]), inputs[0][0].numel()
        matrix = layer.linear(torch.eye(size).view(-1, *inputs[0].shape[1:])).flatten(1)
        bias = torch.zeros(layer.shape) if layer.bias is None else layer.bias.expand(layer.shape)
        total = torch.zeros(n, matrix.shape[1])
        for i in torch.randperm(size + 1, generator=generator).tolist():
            total = total + (bias.flatten() if i == size else inputs[0].flatten(1)[:, i : i + 1] * matrix[i])
        found.append(total.view(n, *layer.shape))
    return [it.view(*x.shape[:2], *it.shape[1:]) for it in found]


def exact_minima(network: Network, region: Region, specification: Specification, image: int) -> list[float]:
    """Of each group, the least over the box of its largest function: a linear program for each pattern of ReLUs."""
    lower, upper = region.lower[image].flatten(), region.upper[image].flatten()
    groups = [(specification.groups == g).nonzero().flatten() for g in range(int(specification.groups.max()) + 1)]
    minima = [np.inf] * len(groups)
    box = list(zip(lower.tolist(), upper.tolist(), strict=True))
    # The origin and unit vectors, so that every layer is a matrix and a shift.
    basis = torch.cat([torch.zeros(1, len(lower)), torch.eye(len(lower))]).double().view(-1, *network.input_shape)

    def visit(first: int, found: list[Tensor], slopes: list[Tensor], sides: list[Tensor]) -> None:
        found = list(found)
        for layer in network.layers[first:]:
            inputs = [found[i] for i in layer.inputs]
            if not isinstance(layer, Relu):
                found.append(layer(*inputs) if inputs else basis)
                continue
            flat = inputs[0].flatten(1)
            slope, shift = (flat[1:] - flat[0]).T, flat[0]
            room = (slope * (upper - lower) / 2).abs().sum(1)
            middle = slope @ ((lower + upper) / 2) + shift
            choices = [
                (True,) if m >= r else (False,) if m <= -r else (False, True) for m, r in zip(middle, room, strict=True)
            ]
            for signs in itertools.product(*choices):
                mask = torch.tensor(signs)
                out = [*found, (flat * mask).view(-1, *layer.shape)]
                half = torch.where(mask, -1.0, 1.0)
                a, c = [*slopes, half[:, None] * slope], [*sides, -half * shift]
                free = np.zeros(len(lower))
                if linprog(free, torch.cat(a).numpy(), torch.cat(c).numpy() + 1e-12, bounds=box).status == 0:
                    visit(len(out), out, a, c)
            return
        logits = found[-1]
        values = logits @ specification.weights[image].T + specification.offsets[image]
        for g, rows in enumerate(groups):
            # The least t that all functions of the group stay below.
            part = values[:, rows]
            steep = torch.cat([(part[1:] - part[0]).T, -torch.ones(len(rows), 1)], 1)
            rest = [torch.cat([it, torch.zeros(len(it), 1)], 1) for it in slopes]
            answer = linprog(
                np.eye(len(lower) + 1)[-1],
                torch.cat([steep, *rest]).numpy(),
                torch.cat([-part[0], *sides]).numpy() + 1e-12,
                bounds=[*box, (None, None)],
            )
            if answer.fun is not None:
                minima[g] = min(minima[g], float(answer.fun))

    visit(0, [], [], [])
    return minima


def shifted(specification: Specification, by: Tensor) -> Specification:
    """The same functions, moved by so much."""
    return replace(specification, offsets=specification.offsets + by)


class Asked:
    """The question of images that one corner attacks, and any image refutes that is inside."""

    def __init__(self, network: Network, region: Region, specification: Specification) -> None:
        self.region, self.specification = region, specification
        self._network = network

    def attack(self, name: str, who: Tensor) -> Tensor:
        return self.region.part(who).inner()[0]

    def refutes(self, candidates: Tensor, who: Tensor) -> Tensor:
        region, asked = self.region.part(who), self.specification.part(who)
        inside = ((candidates >= region.lower) & (candidates <= region.upper)).flatten(1).all(1)
        if region.ball is not None and region.centre is not None:
            inside &= region.ball.contains(candidates, region.centre)
        return inside & (asked.worst(asked.values(self._network(candidates.double()))) <= 0)
