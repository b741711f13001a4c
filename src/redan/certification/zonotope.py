"""Zonotopes (DeepZ: Singh et al., NeurIPS 2018): a centre, and error terms that layers share.

What can reach a layer's output is enclosed in ``centre + sum_i e_i generator_i``, all ``e_i`` in [-1, 1]. An affine
layer maps centre and generators; a ReLU that is open, with its input in ``[l, u]``, becomes

    y = slope * x + mu + mu * e_new,     mu = max(-slope * l, (1 - slope) * u) / 2,

of any slope in [0, 1]; ``u / (u - l)`` gives the least area. A sigmoid becomes the like with the least slope that it
has in ``[l, u]``. The slopes of ReLUs can be learned for the margins, as COLT's certificate does (Balunović & Vechev,
ICLR 2020).

Generators are kept in groups by the layer that they come from, the image or a ReLU, so that branches of a residual
network can be added up group by group, and so that the radius of each group can be estimated by random projections
(``cauchy``) instead of computed.
"""

import time
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from redan.certification import sigmoid
from redan.certification.interval import Box, Interval, step
from redan.certification.network import Affine, Network, Relu, Sigmoid
from redan.certification.regions import Bounds, Region, Specification, parts
from redan.certification.rounding import SoundFloat, full_products, known, relative_error, smallest

# Numbers that the generators of one layer may have before a batch is cut into parts; of all layers where slopes are
# learned, as gradients go back through all.
CHUNK = 2**26

# Learning of an image's slopes ends after so many steps in which its margin gained less than that share of itself.
PATIENCE, LEAST_GAIN = 20, 1e-3


@dataclass(frozen=True, eq=False)
class Element:
    """The zonotopes of a layer's output, one an image.

    Attributes:
        centre: ``(n, *shape)``.
        groups: generators ``(g, *shape)`` by the position of the layer that they come from.
        slack: a box around each zonotope for what rounding may have moved, ``(n, *shape)``.
    """

    centre: Tensor
    groups: dict[int, Tensor]
    slack: Tensor


class _Propagation:
    """One pass through a network: elements by layer, and which image each generator of a group is of."""

    def __init__(
        self, network: Network, region: Region, sound: SoundFloat, slopes: dict[int, Tensor], given: dict[int, Box]
    ) -> None:
        self.network, self.sound, self.slopes = network, sound, slopes
        self.given = {i: Region(*box).to(network.dtype, network.device) for i, box in given.items()}
        self.region = region.to(network.dtype, network.device)
        self.images: dict[int, Tensor] = {}
        self.bounds: list[tuple[Tensor, Tensor]] = []
        self.elements: dict[int, Element] = {}
        uses = [layer.inputs for layer in network.layers]
        for position, layer in enumerate(network.layers):
            if not layer.inputs:
                element = self._image()
            elif isinstance(layer, Relu):
                element = self._relu(position, self.elements[layer.inputs[0]], self.bounds[layer.inputs[0]])
            elif isinstance(layer, Sigmoid):
                element = self._sigmoid(position, self.elements[layer.inputs[0]], self.bounds[layer.inputs[0]])
            else:
                assert isinstance(layer, Affine)
                element = self._affine(layer, [self.elements[i] for i in layer.inputs])
            self.elements[position] = element
            self.bounds.append(self._enclose(position, element))
            for done in [i for i in self.elements if i < position and not any(i in it for it in uses[position + 1 :])]:
                del self.elements[done]

    def _image(self) -> Element:
        lower, upper = self.region.lower, self.region.upper
        centre, radius = (lower + upper) / 2, (upper - lower) / 2
        image, pixel = (radius > 0).flatten(1).nonzero(as_tuple=True)
        self.images[0] = image
        slack = 2 * torch.finfo(centre.dtype).eps * torch.maximum(lower.abs(), upper.abs())
        return Element(centre, {0: _spikes(image, pixel, radius)}, slack if self.sound != "off" else slack * 0)

    def _affine(self, layer: Affine, inputs: list[Element]) -> Element:
        centre = layer(*(it.centre for it in inputs))
        origins = sorted({origin for it in inputs for origin in it.groups})
        groups = {}
        for origin in origins:
            found = [it.groups.get(origin) for it in inputs]
            count = len(self.images[origin])
            parts = [
                centre.new_zeros(count, *it.centre.shape[1:]) if g is None else g
                for g, it in zip(found, inputs, strict=True)
            ]
            groups[origin] = layer.linear(*parts)
        error = relative_error(layer, centre.dtype, self.sound) if layer.roundings else 0.0
        sizes = [it.slack + error * (it.centre.abs() + self._radius(it)) if error else it.slack for it in inputs]
        slack = layer.absolute(*sizes)
        if layer.roundings:
            slack = slack + smallest(layer, centre.dtype, self.sound)
            if layer.bias_size is not None:
                slack = slack + error * layer.bias_size
        return Element(centre, groups, slack)

    def _relu(self, position: int, element: Element, bounds: tuple[Tensor, Tensor]) -> Element:
        lower, upper = bounds
        is_open = (lower < 0) & (upper > 0)
        if position not in self.slopes:
            self.slopes[position] = torch.where(is_open, (upper / (upper - lower)).nan_to_num(1.0), 0.0).detach()
        slope = torch.where(is_open, self.slopes[position], (lower >= 0).to(lower))
        mu = torch.where(is_open, torch.maximum(-slope * lower, (1 - slope) * upper) / 2, 0.0)
        return self._band(position, element, bounds, slope, mu, mu)

    def _sigmoid(self, position: int, element: Element, bounds: tuple[Tensor, Tensor]) -> Element:
        band = sigmoid.band(*bounds, self.sound)
        slope, middle, height = (it.to(element.centre.dtype) for it in band)
        return self._band(position, element, bounds, slope, middle, height)

    def _band(
        self,
        position: int,
        element: Element,
        bounds: tuple[Tensor, Tensor],
        slope: Tensor,
        middle: Tensor,
        height: Tensor,
    ) -> Element:
        """What lies between ``slope * x + middle - height`` and ``slope * x + middle + height``."""
        groups = {origin: generators * slope[self.images[origin]] for origin, generators in element.groups.items()}
        image, neuron = (height > 0).flatten(1).nonzero(as_tuple=True)
        self.images[position] = image
        groups[position] = _spikes(image, neuron, height)
        slack = element.slack * slope
        if self.sound != "off":
            size = slope * torch.maximum(*(it.abs() for it in bounds)) + middle.abs() + height
            slack = slack + 4 * torch.finfo(slope.dtype).eps * size
        return Element(element.centre * slope + middle, groups, slack)

    def _radius(self, element: Element) -> Tensor:
        radius = torch.zeros_like(element.centre)
        for origin, generators in element.groups.items():
            radius = radius.index_add(0, self.images[origin], generators.abs())
        return radius

    def _enclose(self, position: int, element: Element) -> tuple[Tensor, Tensor]:
        """The tightest of the zonotope's bounds, those by intervals, and those given."""
        layer = self.network.layers[position]
        if not layer.inputs:
            return self.region.lower, self.region.upper
        lower, upper = step(layer, [self.bounds[i] for i in layer.inputs], self.sound)
        if position in self.given:
            box = self.given[position]
            lower, upper = torch.maximum(lower, box.lower), torch.minimum(upper, box.upper)
        radius = self._radius(element)
        if self.sound != "off":
            terms = sum(int(self.images[it].bincount().max()) for it, g in element.groups.items() if len(g)) + 4
            radius = radius * (1 + 2 * terms * torch.finfo(radius.dtype).eps) + element.slack * 1.01
        low, high = known(element.centre - radius, element.centre + radius)
        if self.sound != "off":
            rounding = 2 * torch.finfo(radius.dtype).eps * (element.centre.abs() + radius)
            low, high = low - rounding, high + rounding
        return torch.maximum(lower, low), torch.minimum(upper, high)

    def margins(self, specification: Specification) -> Tensor:
        """Lower bounds ``(n, m)``, on the error terms themselves: what functions share cancels."""
        element = self.elements[len(self.network.layers) - 1]
        weights = specification.weights
        found = torch.einsum("nmk,nk->nm", weights, element.centre.double()) + specification.offsets
        for origin, generators in element.groups.items():
            image = self.images[origin]
            terms = torch.einsum("gmk,gk->gm", weights[image], generators.double()).abs()
            found = found.index_add(0, image, -terms)
        slack = element.slack.double()
        if self.sound != "off":
            slack = slack + 1e-12 * (element.centre.abs() + self._radius(element)).double()
        found = found - torch.einsum("nmk,nk->nm", weights.abs(), slack)
        return found.nan_to_num(-torch.inf, torch.inf, -torch.inf)


def _spikes(image: Tensor, neuron: Tensor, size: Tensor) -> Tensor:
    """One generator a neuron, of its size there and zero elsewhere: ``(g, *shape)``."""
    shape = size.shape[1:]
    spikes = size.new_zeros(len(image), shape.numel())
    spikes = spikes.scatter(1, neuron[:, None], size.flatten(1)[image, neuron][:, None])
    return spikes.view(-1, *shape)


@dataclass(frozen=True, eq=False)
class Learned:
    """Bounds by zonotopes whose slopes were learned.

    Attributes:
        bounds: the best of all passes.
        urgency: by position of each layer that a ReLU takes, how much the margins would gain by the slope of each of
            its ReLUs, ``(n, *shape)``: the absolute value of the last gradient; None where no step was taken.
    """

    bounds: Bounds
    urgency: dict[int, Tensor] | None


@full_products()
def learn(
    network: Network,
    region: Region,
    specification: Specification,
    *,
    iterations: int,
    rate: float = 0.1,
    sound: SoundFloat = "exact",
    given: dict[int, Box] | None = None,
    deadline: float = float("inf"),
) -> Learned:
    """Bound by zonotopes, and learn their slopes for the margins until these are shown or gain nothing any more.

    On the way all is float32 and nothing rounded outwards; the best slopes then make a sound pass in float64. That is
    on the weights as given: those of a float32 copy may be rounded, which float64's own roundings do not cover.

    Args:
        network: the network; in float64 where its weights are not all float32 numbers, as of what was folded.
        region: the regions, one an image.
        specification: what is to be shown.
        iterations: steps of Adam at most; 0 keeps the slopes of least area.
        rate: their size, a tenth of it after every hundred (as COLT has it).
        sound: which rounding errors the bounds cover.
        given: by position of a layer that a ReLU takes, bounds already known, ``(n, *shape)``.
        deadline: by ``time.monotonic``; the first pass is made whole, and no step is begun that leaves the last less
            time than the first one took.
    """
    given = {} if given is None else given
    slopes: dict[int, Tensor] = {}
    started = time.monotonic()
    with torch.no_grad():
        first = _Propagation(network, region, sound, slopes, given)
        margins = first.margins(specification)
    latest = deadline - (time.monotonic() - started)
    bounds = Bounds({i: first.bounds[i] for i in network.bent}, margins)
    before = {i: network.layers[i].inputs[0] for i in slopes}
    fast, slopes = network.to(torch.float32), {i: slope.float() for i, slope in slopes.items()}
    worst = specification.worst(margins)
    best = {i: slope.clone() for i, slope in slopes.items()}
    since = torch.zeros_like(worst, dtype=torch.int64)  # steps since an image's margin last gained
    optimiser = torch.optim.Adam([it.requires_grad_() for it in slopes.values()], rate) if slopes else None
    steps = 0
    while optimiser is not None and steps < iterations and time.monotonic() < latest:
        left = ((worst <= 0) & (since < PATIENCE)).nonzero().squeeze(1)
        if not len(left):
            break
        optimiser.param_groups[0]["lr"] = rate * 0.1 ** (steps // 100)
        with torch.enable_grad():
            some = {position: slope[left] for position, slope in slopes.items()}
            some_given = {position: (low[left], high[left]) for position, (low, high) in given.items()}
            asked = specification.part(left)
            found = _Propagation(fast, region.part(left), "off", some, some_given).margins(asked)
            loss = torch.cat([-found, torch.zeros_like(found[:, :1])], 1).logsumexp(1).sum()
        now = asked.worst(found.detach())
        better = now > worst[left] + LEAST_GAIN * worst[left].abs()
        since[left] += 1
        gained = left[better]
        worst[gained], since[gained] = now[better], 0
        for position, slope in slopes.items():
            best[position][gained] = slope.detach()[gained]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            for slope in slopes.values():
                slope.clamp_(0, 1)
        steps += 1
    if not steps:
        return Learned(bounds, None)
    urgency = {
        before[i]: torch.zeros_like(slope) if slope.grad is None else slope.grad.abs() for i, slope in slopes.items()
    }
    with torch.no_grad():
        double = {i: slope.double() for i, slope in best.items()}
        last = _Propagation(network.to(torch.float64), region, sound, double, given)
        layers = {
            i: (torch.maximum(low, last.bounds[i][0]), torch.minimum(high, last.bounds[i][1]))
            for i, (low, high) in bounds.layers.items()
        }
        return Learned(Bounds(layers, torch.maximum(margins, last.margins(specification))), urgency)


@dataclass(frozen=True)
class Zonotope:
    """Bounds by zonotopes; exact about what error terms share.

    A batch is cut into parts whose generators have no more than ``CHUNK`` numbers, but an image is not cut: one with
    7,000 open ReLUs of ConvMed 2,2,100 on MNIST took 1.0 GB, 1.2 GB with its slopes learned (five times the numbers of
    its largest layer, in float64).

    Args:
        iterations: steps of Adam on the slopes, for the margins; 0 keeps those of least area.
        rate: their size, see ``learn``.
        sound: which rounding errors the bounds cover.
        deadline: of the steps, see ``learn``.
    """

    iterations: int = 0
    rate: float = 0.1
    sound: SoundFloat = "exact"
    deadline: float = float("inf")

    def __call__(self, network: Network, region: Region, specification: Specification) -> Bounds:
        numbers = self._numbers(network, Interval(self.sound)(network, region, specification).layers)
        found = [
            learn(
                network,
                *some,
                iterations=self.iterations,
                rate=self.rate,
                sound=self.sound,
                deadline=self.deadline,
            ).bounds
            for some in parts(region, specification, CHUNK // numbers)
        ]
        return Bounds.join(found)

    def _numbers(self, network: Network, boxes: dict[int, Box]) -> int:
        """That an image's generators have at the most; intervals leave no fewer ReLUs open than zonotopes do."""
        generators, largest, whole = prod(network.input_shape), 0, 0
        for layer in network.layers:
            if isinstance(layer, Relu | Sigmoid):
                lower, upper = boxes[layer.inputs[0]]
                bends = (lower < 0) & (upper > 0) if isinstance(layer, Relu) else lower < upper
                generators += int(bends.flatten(1).sum(1).max())
            numbers = generators * prod(layer.shape)
            largest, whole = max(largest, numbers), whole + numbers
        return whole if self.iterations else largest
