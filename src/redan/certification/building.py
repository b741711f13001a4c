"""Builds the graph of a network out of the operations that readers meet, in the few kinds of layers there are.

Folding is done in float64, so that a float32 copy rounds each weight once.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from redan.certification.network import (
    Add,
    Affine,
    Concatenate,
    Convolution,
    Input,
    Layer,
    Linear,
    Network,
    Pad,
    Permute,
    Relu,
    Reshape,
    Scale,
    Sigmoid,
    Slice,
)
from redan.errors import UserError


class Builder:
    """Layers so far; each operation adds some and gives the position of its output.

    Args:
        input_shape: of an image, without the batch.

    Raises:
        UserError: in any operation, where redan cannot express it; the message names the layer, which is ``name``.
    """

    def __init__(self, input_shape: Sequence[int]) -> None:
        self.layers: list[Layer] = [Input("input", (), tuple(input_shape))]
        self.name = ""

    def shape(self, x: int) -> tuple[int, ...]:
        """Of that layer's output, without the batch."""
        return self.layers[x].shape

    def refuse(self, why: str) -> UserError:
        """The error for what cannot be expressed."""
        return UserError(f"layer {self.name!r} cannot be certified: {why}")

    def _append(self, layer: Layer) -> int:
        self.layers.append(layer)
        return len(self.layers) - 1

    def linear(self, x: int, weight: Tensor, bias: Tensor | None) -> int:
        """Weight ``(out, in)``, bias ``(out,)``."""
        if len(self.shape(x)) != 1:
            raise self.refuse(f"a linear layer on an input of {len(self.shape(x))} axes")
        weight = weight.double()
        bias = weight.new_zeros(len(weight)) if bias is None else bias.double()
        return self._append(Linear(self.name, (x,), (len(weight),), weight, bias, bias.abs()))

    def convolution(
        self,
        x: int,
        weight: Tensor,
        bias: Tensor | None,
        stride: Sequence[int] = (1, 1),
        padding: Sequence[int] = (0, 0),
        dilation: Sequence[int] = (1, 1),
        groups: int = 1,
    ) -> int:
        """Weight ``(out, in / groups, kh, kw)``, bias ``(out,)``; zeros of ``padding`` on all sides."""
        shape = self.shape(x)
        if len(shape) != 3 or weight.dim() != 4:
            raise self.refuse("only convolutions in two dimensions are known")
        weight = weight.double()
        bias = (weight.new_zeros(len(weight)) if bias is None else bias.double()).view(-1, 1, 1)
        (sy, sx), (py, px), (dy, dx) = (tuple(it) * (2 // len(it)) for it in (stride, padding, dilation))
        high = (shape[1] + 2 * py - dy * (weight.shape[2] - 1) - 1) // sy + 1
        wide = (shape[2] + 2 * px - dx * (weight.shape[3] - 1) - 1) // sx + 1
        out = (len(weight), high, wide)
        return self._append(
            Convolution(
                self.name, (x,), out, weight, bias, bias.abs(), (sy, sx), (py, px), (dy, dx), groups, input_shape=shape
            )
        )

    def scale(self, x: int, scale: Tensor | float, shift: Tensor | float = 0.0, size: Tensor | None = None) -> int:
        """``scale * x + shift``; tensors broadcast against ``(*shape)``. ``size`` bounds what the shift was made of."""
        shape = self.shape(x)
        s, t = (torch.as_tensor(it, dtype=torch.float64) for it in (scale, shift))
        s, t = (it.reshape(it.shape[1:]) if it.dim() > len(shape) and it.shape[0] == 1 else it for it in (s, t))
        if torch.broadcast_shapes(s.shape, t.shape, shape) != shape:
            raise self.refuse("a constant of more axes than its input")
        s, t = (it.reshape((1,) * (len(shape) - it.dim()) + it.shape) for it in (s, t))
        size = t.abs() if size is None else size.double().reshape(t.shape)
        before = self.layers[x]
        by_channel = len(shape) == 1 or max(s.shape[1:] + t.shape[1:]) == 1
        if isinstance(before, Scale) or (isinstance(before, Linear | Convolution) and by_channel):
            bias = s * before.bias + t
            bias_size = s.abs() * before.bias_size + size
            if isinstance(before, Scale):
                return self._append(replace(before, scale=s * before.scale, bias=bias, bias_size=bias_size))
            weight = before.weight * s.reshape(-1, *(1,) * (before.weight.dim() - 1))
            name = f"{before.name}, {self.name}"
            return self._append(replace(before, name=name, weight=weight, bias=bias, bias_size=bias_size))
        return self._append(Scale(self.name, (x,), shape, s, t, size))

    def batch_norm(
        self, x: int, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, epsilon: float
    ) -> int:
        """BatchNorm in evaluation mode, per channel."""
        axes = (-1,) + (1,) * (len(self.shape(x)) - 1)
        scale = (variance.double() + epsilon).rsqrt()
        if weight is not None:
            scale = scale * weight.double()
        shift = -mean.double() * scale
        size = shift.abs()
        if bias is not None:
            shift, size = shift + bias.double(), size + bias.double().abs()
        return self.scale(x, scale.view(axes), shift.view(axes), size.view(axes))

    def relu(self, x: int) -> int:
        """max(x, 0)."""
        if isinstance(self.layers[x], Relu):
            return x
        for i, layer in enumerate(self.layers):  # one a layer, so that what is known of it is known once
            if isinstance(layer, Relu) and layer.inputs == (x,):
                return i
        return self._append(Relu(self.name, (x,), self.shape(x)))

    def sigmoid(self, x: int) -> int:
        """The logistic function of each number."""
        before = self.layers[x]
        if not isinstance(before, Affine) or not before.roundings:
            x = self.scale(x, 1.0)
        return self._append(Sigmoid(self.name, (x,), self.shape(x)))

    def tanh(self, x: int) -> int:
        """Twice the sigmoid of ``2 x``, less 1."""
        return self.scale(self.sigmoid(self.scale(x, 2.0)), 2.0, -1.0)

    def leaky_relu(self, x: int, slope: Tensor | float) -> int:
        """A ReLU that is ``slope * x`` below 0: ``slope * x + (1 - slope) ReLU(x)``."""
        slope = torch.as_tensor(slope, dtype=torch.float64)
        return self.add(self.scale(x, slope), self.scale(self.relu(x), 1 - slope))

    def clamp(self, x: int, low: float | None, high: float | None) -> int:
        """min(max(x, low), high): ``low + ReLU(x - low) - ReLU(x - high)``; None leaves that side open."""
        if low is None and high is None:
            return x
        if low is None:
            assert high is not None
            return self.scale(self.relu(self.scale(x, -1.0, high)), -1.0, high)  # high - ReLU(high - x)
        above = self.relu(self.scale(x, 1.0, -low))
        if high is not None:
            above = self.add(above, self.scale(self.relu(self.scale(x, 1.0, -high)), -1.0))
        return self.scale(above, 1.0, low)

    def add(self, *xs: int) -> int:
        """The sum; all of one shape."""
        if len({self.shape(x) for x in xs}) != 1:
            raise self.refuse("a sum of different shapes")
        return self._append(Add(self.name, xs, self.shape(xs[0])))

    def subtract(self, x: int, y: int) -> int:
        """``x - y``."""
        return self.add(x, self.scale(y, -1.0))

    def maximum(self, x: int, y: int) -> int:
        """max(x, y) = x + ReLU(y - x)."""
        return self.add(x, self.relu(self.subtract(y, x)))

    def max_pool(self, x: int, kernel: Sequence[int], stride: Sequence[int], margins: Sequence[int]) -> int:
        """The maximum of each window, as ReLUs: along one axis, then the other.

        Margins, left, right, top, bottom, hold nothing that could be a maximum; no window lies in them.
        """
        left, right, top, bottom = margins
        if isinstance(self.layers[x], Relu):
            x = self.pad(x, margins)
        else:  # with what the edge has: a window that reaches over it has that anyway
            for axis, before, after in ((1, top, bottom), (2, left, right)):
                size = self.shape(x)[axis]
                ends = self.slice(x, axis, 0, 1), self.slice(x, axis, size - 1, size)
                parts = [ends[0]] * before + [x] + [ends[1]] * after
                x = self.concatenate(parts, axis) if len(parts) > 1 else x
        for axis in (1, 2):
            size, k, s = self.shape(x)[axis], kernel[axis - 1], stride[axis - 1]
            windows = (size - k) // s + 1
            parts = [self.slice(x, axis, j, j + (windows - 1) * s + 1, s) for j in range(k)]
            while len(parts) > 1:
                paired = [self.maximum(*parts[i : i + 2]) for i in range(0, len(parts) - 1, 2)]
                parts = paired + parts[len(paired) * 2 :]
            x = parts[0]
        return x

    def average_pool(
        self, x: int, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int] = (0, 0)
    ) -> int:
        """The mean of each window, zeros of the padding included."""
        channels = self.shape(x)[0]
        weight = torch.full((channels, 1, *kernel), 1 / (kernel[0] * kernel[1]), dtype=torch.float64)
        return self.convolution(x, weight, None, stride, padding, groups=channels)

    def adaptive_average_pool(self, x: int, size: Sequence[int]) -> int:
        """Means over a grid of ``size`` windows, where they divide the image evenly."""
        high, wide = self.shape(x)[1:]
        if high % size[0] or wide % size[1]:
            raise self.refuse(f"adaptive pooling of {high}x{wide} to {size[0]}x{size[1]} is uneven")
        kernel = (high // size[0], wide // size[1])
        return self.average_pool(x, kernel, kernel)

    def reshape(self, x: int, shape: Sequence[int]) -> int:
        """The same numbers in another shape, the batch not counted."""
        if tuple(shape) == self.shape(x):
            return x
        return self._append(Reshape(self.name, (x,), tuple(shape), input_shape=self.shape(x)))

    def permute(self, x: int, order: Sequence[int]) -> int:
        """The axes in another order, the batch not counted."""
        shape = self.shape(x)
        return self._append(Permute(self.name, (x,), tuple(shape[axis] for axis in order), order=tuple(order)))

    def slice(self, x: int, axis: int, start: int, stop: int, step: int = 1) -> int:
        """Every ``step``-th entry of an axis, the batch not counted."""
        shape = self.shape(x)
        start, stop, _ = slice(start, stop, step).indices(shape[axis])
        if (start, stop, step) == (0, shape[axis], 1):
            return x
        kept = len(range(start, stop, step))
        out = (*shape[:axis], kept, *shape[axis + 1 :])
        return self._append(
            Slice(self.name, (x,), out, axis=axis, start=start, stop=stop, step=step, input_shape=shape)
        )

    def concatenate(self, xs: Sequence[int], axis: int) -> int:
        """Side by side along an axis, the batch not counted."""
        sizes = tuple(self.shape(x)[axis] for x in xs)
        first = self.shape(xs[0])
        out = (*first[:axis], sum(sizes), *first[axis + 1 :])
        return self._append(Concatenate(self.name, tuple(xs), out, axis=axis, sizes=sizes))

    def pad(self, x: int, margins: Sequence[int]) -> int:
        """Zeros around: left, right, top, bottom."""
        if not any(margins):
            return x
        left, right, top, bottom = margins
        if min(margins) < 0 or len(self.shape(x)) != 3:
            raise self.refuse("only images can be padded, by 0 or more")
        channels, high, wide = self.shape(x)
        out = (channels, high + top + bottom, wide + left + right)
        return self._append(Pad(self.name, (x,), out, margins=(left, right, top, bottom)))

    def network(self, output: int) -> Network:
        """The network that ends in that layer, without those that do not lead there.

        Raises:
            UserError: where that layer is not one row of logits.
        """
        if len(self.shape(output)) != 1:
            raise UserError(f"the network's output has the shape {self.shape(output)}; one row of logits is needed")
        used = {0, output}
        for i in range(output, 0, -1):
            if i in used:
                used.update(self.layers[i].inputs)
        place = {old: new for new, old in enumerate(sorted(used))}
        kept = [self.layers[i] for i in sorted(used)]
        return Network([replace(layer, inputs=tuple(place[i] for i in layer.inputs)) for layer in kept])
