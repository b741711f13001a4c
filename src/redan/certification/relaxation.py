"""Linear functions of a network's layers, pushed back from layer to layer towards the input, and bounded on the way.

A function ``A z`` of a ReLU's output, ``z = ReLU(y)`` with ``y`` in ``[l, u]``, is bounded from below by

    A z >= A' y + d,   A' = A alpha where A > 0,   A' = A u / (u - l) and d = -A' l where A < 0,

any ``alpha`` in [0, 1] (where ``y`` is always positive A' = A, where it never is A' = 0), and goes through an affine
layer as it is. A sigmoid has a line below it for A > 0 and one above for A < 0 (see ``sigmoid``). What is left at the
input is minimised over the region. An upper bound is a lower one of ``-A z``.

Rounding. A coefficient that is computed as ``A W`` with an error costs at most that error times the size of what it is
multiplied with, ``|x|``; summed up, no more than ``gamma_n |A| (|W| |x| + |b|)``, n the outputs that it is summed over,
and as much again for the layer's own n. The second factor is known in advance for each image (``noise``), so that
soundness costs one sum of ``|A|`` a layer.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from redan.certification import sigmoid
from redan.certification.interval import CACHED, Box, magnitude, step
from redan.certification.network import Add, Affine, Convolution, Linear, Network, Relu, Scale, Sigmoid
from redan.certification.regions import Region
from redan.certification.rounding import SoundFloat, gamma, pulled_error, smallest
from redan.certification.rows import Rows, add, side_by_side, total, total_above

# Lower slopes of a ReLU layer for some rows: the rows at the layer, its position, to slopes like the rows' values.
Slopes = Callable[[Rows, int], Tensor]


@dataclass(frozen=True, eq=False)
class Functions:
    """Linear functions, each the sum of its rows on several layers and a constant, known up to a slack.

    Attributes:
        parts: rows by position of the layer.
        constant: ``(r,)`` float64.
        slack: at least 0, likewise.
    """

    parts: dict[int, Rows]
    constant: Tensor
    slack: Tensor


class Relaxation:
    """Bounds of a network's layers on regions, and linear functions pushed back through them.

    Args:
        network: the network.
        region: the regions, one an image; in any type.
        sound: which rounding errors the bounds cover.

    Attributes:
        boxes: bounds of each layer's output so far, in the network's type; ``tighten`` improves them.
    """

    def __init__(self, network: Network, region: Region, sound: SoundFloat) -> None:
        self.network = network
        self.region = region.to(network.dtype, network.device)
        self.sound = sound
        self.boxes: list[Box] = []
        self._noise: dict[int, Tensor] = {}
        self._lines: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._curves: dict[int, tuple[sigmoid.Line, sigmoid.Line]] = {}

    def extend(self) -> int:
        """Bound the next layer by intervals; gives its position."""
        position = len(self.boxes)
        layer = self.network.layers[position]
        if not layer.inputs:
            self.boxes.append((self.region.lower, self.region.upper))
        else:
            self.boxes.append(step(layer, [self.boxes[i] for i in layer.inputs], self.sound))
        return position

    def tighten(self, position: int, lower: Tensor, upper: Tensor) -> None:
        """Take better bounds of the layer that was extended to last; ``(n, *shape)``."""
        old = self.boxes[position]
        self.boxes[position] = (torch.maximum(old[0], lower), torch.minimum(old[1], upper))
        self._lines.pop(position, None)
        self._curves.pop(position, None)

    def noise(self, position: int) -> Tensor:
        """By how much each output of an affine layer may be off: ``(n, channels)`` or ``(n, features)``."""
        if position not in self._noise:
            layer = self.network.layers[position]
            assert isinstance(layer, Affine)
            dtype = self.network.dtype
            size = magnitude(layer, [self.boxes[i] for i in layer.inputs])
            # Products A b are summed over a channel in this type before they are summed in float64.
            spread = gamma(size[0, 0].numel(), dtype) if self.sound != "off" and size.dim() == 4 else 0.0
            error = pulled_error(layer, dtype, self.sound) + spread
            found = error * size + smallest(layer, dtype, self.sound)
            self._noise[position] = 1.01 * (found.amax((2, 3)) if found.dim() == 4 else found)
        return self._noise[position]

    def lines(self, position: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of the ReLU on that layer: slope of the upper line, where it is zero, and the default lower slope."""
        if position not in self._lines:
            lower, upper = map(side_by_side, self.boxes[position])
            # Factors of 0 and 1 instead of torch.where, which costs ten times a product.
            above, below = upper.relu(), (-lower).relu()
            can, always = (upper > 0).to(upper), (lower >= 0).to(upper)
            # u / (u - l), a hair steeper than the chord: above the ReLU at both ends however the quotient was rounded.
            half = above * 0.5  # many times faster than a quotient
            slope = half.div(half + below * 0.5).nan_to_num_(1.0).mul_(1 + 4 * torch.finfo(upper.dtype).eps)
            slope = slope.clamp_(max=1).maximum(always).mul_(can)
            zero = (below * can).neg_()
            default = (upper > -lower).to(upper)
            self._lines[position] = (slope, zero, default)
        return self._lines[position]

    def neurons(self, position: int, image: Tensor, neuron: Tensor, sign: Tensor) -> Functions:
        """The functions ``sign * neuron`` of a layer, already pushed to what the layer takes.

        Args:
            position: of the layer.
            image: which image each function is about, ``(r,)``.
            neuron: which neuron, its flat index, ``(r,)``.
            sign: 1 or -1, ``(r,)``.
        """
        layer = self.network.layers[position]
        parts: dict[int, Rows] = {}
        constant = torch.zeros(len(image), dtype=torch.float64, device=image.device)
        slack = torch.zeros_like(constant)
        if isinstance(layer, Add):
            slack += self._uncertain(position, image, neuron)
            for before in layer.inputs:
                found = self.neurons(before, image, neuron, sign)
                constant, slack = constant + found.constant, slack + found.slack
                for i, rows in found.parts.items():
                    self._merge(parts, i, rows)
        elif isinstance(layer, Linear):
            constant += sign * layer.bias.double()[neuron]
            slack += self._uncertain(position, image, neuron)
            parts[layer.inputs[0]] = Rows(layer.weight[neuron] * sign[:, None], image)
        elif len(layer.shape) != 3:
            values = torch.zeros(len(image), *layer.shape, dtype=self.network.dtype, device=image.device)
            values.flatten(1).scatter_(1, neuron[:, None], sign[:, None].to(values))
            parts[position] = Rows(values, image)
        else:
            high, wide = layer.shape[1:]
            channel, place = neuron // (high * wide), neuron % (high * wide)
            corner = torch.stack([place // wide, place % wide], 1)
            if isinstance(layer, Convolution) and layer.groups == 1 and layer.dilation == (1, 1):
                constant += sign * layer.bias.double().flatten()[channel]
                slack += self._uncertain(position, image, neuron)
                values = side_by_side(layer.weight[channel] * sign[:, None, None, None])
                corner = corner * torch.tensor(layer.stride).to(corner) - torch.tensor(layer.padding).to(corner)
                parts[layer.inputs[0]] = Rows(values, image, corner).bounded(layer.input_shape)
            else:
                values = torch.zeros(len(image), layer.shape[0], 1, 1, dtype=self.network.dtype, device=image.device)
                values[torch.arange(len(image), device=image.device), channel, 0, 0] = sign.to(values)
                parts[position] = Rows(values, image, corner)
        return Functions(parts, constant, slack)

    def _uncertain(self, position: int, image: Tensor, neuron: Tensor) -> Tensor:
        shape = self.network.layers[position].shape
        if len(shape) == 3:
            neuron = neuron // (shape[1] * shape[2])
        return self.noise(position).flatten(1)[image, neuron].double()

    def _merge(self, parts: dict[int, Rows], position: int, rows: Rows) -> None:
        if position in parts:
            rows = add(parts[position], rows, self.network.layers[position].shape)
        parts[position] = rows

    def least(self, functions: Functions, slopes: Slopes | None = None) -> Tensor:
        """Lower bounds on the regions: ``(r,)`` float64; differentiable by the slopes.

        Args:
            functions: of whatever layers.
            slopes: lower slopes, where they are not the default ones.
        """
        constant = functions.constant

        def through(position: int, rows: Rows) -> Rows:
            nonlocal constant
            rows, more = self._relu(position, rows, slopes)
            constant = constant + more
            return rows

        images, offset, slack = self._push(functions, through)
        least = constant + offset - slack + self.region.least(images)
        return least.nan_to_num(-torch.inf, torch.inf, -torch.inf)

    def linearise(self, functions: Functions) -> tuple[Tensor, dict[int, Tensor], Tensor, Tensor]:
        """The functions in terms of the image and of the ReLUs that are open: all others are linear. Of one image only.

        A network with sigmoids has no such form.

        Returns:
            Coefficients of the pixels ``(r, pixels)``; by position of the layer that a ReLU takes, those of its open
            neurons' outputs ``(r, open)``; the constants ``(r,)``; and up to what they hold, ``(r,)``.
        """
        bent: dict[int, Tensor] = {}

        def through(position: int, rows: Rows) -> Rows:
            lower, upper = self.boxes[position]
            values = rows.whole(self.network.layers[position].shape).values
            found = values[:, ((lower < 0) & (upper > 0))[0]]
            bent[position] = bent[position] + found if position in bent else found  # of each ReLU that takes the layer
            return Rows(values * (lower >= 0), rows.image)

        images, offset, slack = self._push(functions, through)
        pixels = images.whole(self.network.input_shape).values.flatten(1)
        return pixels, bent, functions.constant + offset, slack

    def _push(self, functions: Functions, through: Callable[[int, Rows], Rows]) -> tuple[Rows, Tensor, Tensor]:
        """Rows on the image, constants and slacks; ``through`` takes rows from behind a ReLU to before it."""
        parts, slack = dict(functions.parts), functions.slack
        offset = torch.zeros_like(slack)
        while position := max(parts):
            rows, layer = parts.pop(position), self.network.layers[position]
            if isinstance(layer, Relu):
                (before,) = layer.inputs
                self._merge(parts, before, through(before, rows))
                continue
            if isinstance(layer, Sigmoid):
                (before,) = layer.inputs
                rows, more = self._sigmoid(before, rows)
                offset = offset + more
                self._merge(parts, before, rows)
                continue
            assert isinstance(layer, Affine)
            rows = rows.inside(layer.shape)
            more, uncertain = self._affine(position, layer, rows)
            offset, slack = offset + more, slack + uncertain
            for before, part in zip(layer.inputs, layer.pull(rows), strict=True):
                self._merge(parts, before, part)
        return parts[0], offset, slack

    def _relu(self, position: int, rows: Rows, slopes: Slopes | None) -> tuple[Rows, Tensor]:
        slope, zero, default = self.lines(position)
        below = rows.look(default) if slopes is None else slopes(rows, position)
        # Positive and negative parts: torch.where costs ten times a product, and one of the two terms is always 0.
        positive = rows.values.relu()
        negative = (rows.values - positive) * rows.look(slope)
        constant = total_above(negative * rows.look(zero))
        return rows.with_values(torch.addcmul(negative, positive, below)), -constant

    def _sigmoid(self, position: int, rows: Rows) -> tuple[Rows, Tensor]:
        if position not in self._curves:
            self._curves[position] = sigmoid.lines(*self.boxes[position], self.sound)
        above, below = self._curves[position]
        positive = rows.values.relu()
        negative = rows.values - positive
        constant = total(positive * rows.look(below.offset)) + total(negative * rows.look(above.offset))
        return rows.with_values(positive * rows.look(below.slope) + negative * rows.look(above.slope)), constant

    def _affine(self, position: int, layer: Affine, rows: Rows) -> tuple[Tensor, Tensor]:
        """``A b``, and what the layer's rounding may make of ``A``: ``(r,)`` each, float64."""
        values, noise = rows.values, self.noise(position)[rows.image].flatten(1)
        sizes = values.abs().sum((2, 3)) if values.dim() == 4 else values.abs().flatten(1)
        slack = (sizes * noise).sum(1, dtype=torch.float64)
        if layer.bias is None:
            return torch.zeros_like(slack), slack
        if layer.bias.dim() == 3 and layer.bias.shape[1:] == (1, 1):
            products = values.sum((2, 3)) * layer.bias.flatten()
        else:
            products = (rows.whole(layer.shape).values * layer.bias).flatten(1)
        return products.sum(1, dtype=torch.float64), slack

    def chunks(self, position: int, rows: int) -> Iterator[slice]:
        """Cut rows that start at a layer into parts that are worked on at once."""
        width = max(1, CACHED // self._widest(position))
        for first in range(0, rows, width):
            yield slice(first, first + width)

    def _widest(self, position: int) -> int:
        """The most coefficients that one row from that layer has on its way back."""
        windows: dict[int, tuple[int, int] | None] = {position: (1, 1)}
        widest = 1
        for i in range(position, -1, -1):
            if i not in windows:
                continue
            layer, window = self.network.layers[i], windows[i]
            flat = len(layer.shape) != 3
            if flat or (window is not None and window[0] * window[1] >= layer.shape[1] * layer.shape[2]):
                window = None
            size = torch.Size(layer.shape).numel() if window is None else layer.shape[0] * window[0] * window[1]
            widest = max(widest, size)
            for before in layer.inputs:
                next_: tuple[int, int] | None = None
                if isinstance(layer, Convolution) and window is not None:
                    kernel = layer.weight.shape[2:]
                    next_ = (
                        (window[0] - 1) * layer.stride[0] + layer.dilation[0] * (kernel[0] - 1) + 1,
                        (window[1] - 1) * layer.stride[1] + layer.dilation[1] * (kernel[1] - 1) + 1,
                    )
                elif isinstance(layer, Relu | Sigmoid | Add | Scale):
                    next_ = window
                known_window = windows.get(before, (0, 0))
                if next_ is None or known_window is None:
                    windows[before] = None
                else:
                    windows[before] = (max(next_[0], known_window[0]), max(next_[1], known_window[1]))
        return widest

    def interval_is_exact(self, position: int) -> bool:
        """Whether a layer's box is the best there is."""
        return self.region.ball is None and self.network.box_is_exact(position)
