"""A network as a verifier sees it: a list of layers, each of which names the earlier ones that it takes.

Everything is affine but ``Relu`` and ``Sigmoid``: readers write leaky ReLUs and max pooling as ReLUs, tanh as a
sigmoid, pooled means and BatchNorm as convolutions and scales (see ``building``). Layer 0 is the input; the last layer
gives the logits. Shapes are without the batch.

Rounding. Weights are float32 numbers and taken as exact. An output of an affine layer is a sum of products; however it
is ordered, with or without fused multiply-add, float arithmetic of unit roundoff u errs by no more than
``gamma_n (|W| |x| + |b|)``, gamma_n = n u / (1 - n u), n the number of roundings of a product on its way into the sum
(Higham, Accuracy and Stability of Numerical Algorithms, section 3.1). ``roundings`` is that n, ``absolute`` the
product with ``|W|`` and ``bias_size`` the ``|b|``; every bound adds what they say.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from math import prod
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from redan.certification.rows import Rows, side_by_side

# Roundings beside those of the sum: of the weights where they were folded, of slopes above the layer, of l and u.
SPARE_ROUNDINGS = 8

# Channels up to which a transposed convolution is computed without oneDNN.
FEW_CHANNELS = 4


@dataclass(frozen=True, eq=False)
class Layer(ABC):
    """One layer.

    Attributes:
        name: what the user calls it.
        inputs: positions in the network of the layers that it takes.
        shape: of its output, without the batch.
    """

    name: str
    inputs: tuple[int, ...]
    shape: tuple[int, ...]

    @abstractmethod
    def __call__(self, *x: Tensor) -> Tensor:
        """The output, ``(n, *shape)``, of the inputs ``(n, ...)``."""

    def to(self, dtype: torch.dtype, device: torch.device) -> Self:
        """The layer with its tensors in that type, on that device."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {k: v.to(device, dtype) for k, v in tensors.items() if isinstance(v, Tensor)}
        return replace(self, **moved)


@dataclass(frozen=True, eq=False)
class Input(Layer):
    """The images."""

    def __call__(self, *x: Tensor) -> Tensor:
        return x[0]


@dataclass(frozen=True, eq=False)
class Relu(Layer):
    """max(x, 0)."""

    def __call__(self, *x: Tensor) -> Tensor:
        return x[0].relu()


@dataclass(frozen=True, eq=False)
class Sigmoid(Layer):
    """1 / (1 + exp(-x)), of an affine layer that computes something: what may be off about x is known there."""

    def __call__(self, *x: Tensor) -> Tensor:
        return x[0].sigmoid()


class Affine(Layer):
    """``W x + b``, of one input or several.

    Attributes:
        bias: ``b``, broadcastable to the output's shape; None for zero.
        bias_size: ``|b|`` or, where it came out of a folding, the sum of the absolute values it was made of.
    """

    bias: Tensor | None = None
    bias_size: Tensor | None = None

    @property
    def roundings(self) -> int:
        """Roundings of a product on its way into the output, those to spare included; 0 where nothing is computed."""
        return 0

    @property
    def pulled(self) -> int:
        """Products that ``pull`` sums up in one coefficient at the most: it adds over outputs, not inputs."""
        return 0

    def linear(self, *x: Tensor) -> Tensor:
        """``W x``."""
        return self(*x)

    def absolute(self, *x: Tensor) -> Tensor:
        """``|W| x``."""
        return self(*x)

    @abstractmethod
    def pull(self, rows: Rows) -> tuple[Rows, ...]:
        """``A W`` of rows ``A`` on the output: rows on each input."""


@dataclass(frozen=True, eq=False)
class Linear(Affine):
    """A fully connected layer: weight ``(out, in)``, bias ``(out,)``."""

    weight: Tensor
    bias: Tensor
    bias_size: Tensor

    def __call__(self, *x: Tensor) -> Tensor:
        return F.linear(x[0], self.weight, self.bias)

    @property
    def roundings(self) -> int:
        return self.weight.shape[1] + SPARE_ROUNDINGS

    @property
    def pulled(self) -> int:
        return self.weight.shape[0]

    def linear(self, *x: Tensor) -> Tensor:
        return F.linear(x[0], self.weight)

    def absolute(self, *x: Tensor) -> Tensor:
        return F.linear(x[0], self.weight.abs())

    def pull(self, rows: Rows) -> tuple[Rows, ...]:
        return (rows.with_values(rows.values @ self.weight),)


@dataclass(frozen=True, eq=False)
class Convolution(Affine):
    """A convolution: weight ``(out, in / groups, kh, kw)``, bias ``(out, 1, 1)``; padding with zeros on all sides."""

    weight: Tensor
    bias: Tensor
    bias_size: Tensor
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    input_shape: tuple[int, ...] = ()

    def __call__(self, *x: Tensor) -> Tensor:
        return self._convolve(x[0], self.weight, self.bias.flatten())

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    @property
    def roundings(self) -> int:
        return prod(self.weight.shape[1:]) + SPARE_ROUNDINGS

    @property
    def pulled(self) -> int:
        return self.weight.shape[0] // self.groups * prod(self.weight.shape[2:])

    def linear(self, *x: Tensor) -> Tensor:
        return self._convolve(x[0], self.weight, None)

    def absolute(self, *x: Tensor) -> Tensor:
        return self._convolve(x[0], self.weight.abs(), None)

    def pull(self, rows: Rows) -> tuple[Rows, ...]:
        if rows.corner is None:
            return (rows.with_values(self._transposed(rows.values, self.input_shape[1:], self.padding)),)
        reached = self._reached(rows.values, (0, 0))
        values = self._transposed(rows.values, reached, (0, 0))
        scale, shift = torch.tensor(self.stride), torch.tensor(self.padding)
        corner = rows.corner * scale.to(rows.corner) - shift.to(rows.corner)
        return (Rows(values, rows.image, corner).bounded(self.input_shape),)

    def _reached(self, values: Tensor, padding: tuple[int, int]) -> tuple[int, ...]:
        """Height and width of what the windows cover, without the padding."""
        sizes = zip(values.shape[2:], self.stride, padding, self.dilation, self.weight.shape[2:], strict=True)
        return tuple((n - 1) * s - 2 * p + d * (k - 1) + 1 for n, s, p, d, k in sizes)

    def _transposed(self, values: Tensor, size: tuple[int, ...], padding: tuple[int, int]) -> Tensor:
        """The transposed convolution, onto images of that size."""
        if self.groups == 1 and self.weight.shape[1] <= FEW_CHANNELS:
            # oneDNN is slow where it has few channels to fill a vector with: a product and a sum of columns instead.
            columns = self.weight.flatten(1).t() @ values.flatten(2)
            kernel = self.weight.shape[2:]
            return F.fold(columns, size, kernel, self.dilation, padding, self.stride)
        left_over = [a - b for a, b in zip(size, self._reached(values, padding), strict=True)]
        return F.conv_transpose2d(
            side_by_side(values), self.weight, None, self.stride, padding, left_over, self.groups, self.dilation
        )


@dataclass(frozen=True, eq=False)
class Scale(Affine):
    """``scale * x + shift``, elementwise; both broadcastable to the shape. Normalisation, BatchNorm, signs."""

    scale: Tensor
    bias: Tensor
    bias_size: Tensor

    def __call__(self, *x: Tensor) -> Tensor:
        return self.scale * x[0] + self.bias

    @property
    def roundings(self) -> int:
        return 2 + SPARE_ROUNDINGS

    def linear(self, *x: Tensor) -> Tensor:
        return self.scale * x[0]

    def absolute(self, *x: Tensor) -> Tensor:
        return self.scale.abs() * x[0]

    def pull(self, rows: Rows) -> tuple[Rows, ...]:
        if self.scale.dim() == 3 and self.scale.shape[1:] != (1, 1):
            rows = rows.whole(self.shape)
        return (rows.with_values(rows.values * self.scale),)


@dataclass(frozen=True, eq=False)
class Add(Affine):
    """The sum of its inputs, all of one shape."""

    def __call__(self, *x: Tensor) -> Tensor:
        return torch.stack(torch.broadcast_tensors(*x)).sum(0) if len(x) > 2 else x[0] + x[1]

    @property
    def roundings(self) -> int:
        return len(self.inputs) - 1 + SPARE_ROUNDINGS

    def pull(self, rows: Rows) -> tuple[Rows, ...]:
        return (rows,) * len(self.inputs)


@dataclass(frozen=True, eq=False)
class Reshape(Affine):
    """The same numbers, in the same order, in another shape."""

    input_shape: tuple[int, ...] = ()

    def __call__(self, *x: Tensor) -> Tensor:
        return x[0].reshape(len(x[0]), *self.shape)

    def pull(self, rows: Rows) -> tuple[Rows, ...]:
        whole = rows.whole(self.shape)
        return (whole.with_values(side_by_side(whole.values.reshape(len(whole.values), *self.input_shape))),)


@dataclass(frozen=True, eq=False)
class Permute(Affine):
    """The axes in another order: axis ``i`` of the output is axis ``order[i]`` of the input, without the batch."""

    order: tuple[int, ...] = ()

    def __call__(self, *x: Tensor) -> Tensor:
        return x[0].permute(0, *(1 + axis for axis in self.order))

    def pull(self, rows: Rows) -> tuple[Rows, ...]:
        whole = rows.whole(self.shape)
        back = [1 + self.order.index(axis) for axis in range(len(self.order))]
        return (whole.with_values(whole.values.permute(0, *back)),)


@dataclass(frozen=True, eq=False)
class Slice(Affine):
    """Every ``step``-th entry of one axis, from ``start`` to before ``stop``."""

    axis: int = 0
    start: int = 0
    stop: int = 0
    step: int = 1
    input_shape: tuple[int, ...] = ()

    def __call__(self, *x: Tensor) -> Tensor:
        return self._part(x[0])

    def _part(self, x: Tensor) -> Tensor:
        return x[(slice(None),) * (1 + self.axis) + (slice(self.start, self.stop, self.step),)]

    def pull(self, rows: Rows) -> tuple[Rows, ...]:
        whole = rows.whole(self.shape)
        values = whole.values.new_zeros(len(whole.values), *self.input_shape)
        self._part(values).copy_(whole.values)
        return (whole.with_values(values),)


@dataclass(frozen=True, eq=False)
class Concatenate(Affine):
    """The inputs side by side along one axis; ``sizes`` says how much of it each takes."""

    axis: int = 0
    sizes: tuple[int, ...] = ()

    def __call__(self, *x: Tensor) -> Tensor:
        return torch.cat(x, 1 + self.axis)

    def pull(self, rows: Rows) -> tuple[Rows, ...]:
        whole = rows.whole(self.shape)
        return tuple(whole.with_values(part) for part in whole.values.split(self.sizes, 1 + self.axis))


@dataclass(frozen=True, eq=False)
class Pad(Affine):
    """Zeros around the images: ``margins`` are left, right, top, bottom."""

    margins: tuple[int, int, int, int] = (0, 0, 0, 0)

    def __call__(self, *x: Tensor) -> Tensor:
        return F.pad(x[0], self.margins)

    def pull(self, rows: Rows) -> tuple[Rows, ...]:
        whole = rows.whole(self.shape)
        return (whole.with_values(F.pad(whole.values, [-margin for margin in self.margins])),)


class Network:
    """Layers in an order in which each comes after those that it takes; calling it computes logits.

    Args:
        layers: the first is the input, the last gives the logits.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = tuple(layers)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of an image."""
        return self.layers[0].shape

    @property
    def classes(self) -> int:
        """Number of outputs."""
        return self.layers[-1].shape[0]

    @property
    def widest(self) -> int:
        """Numbers in the output of the layer that has the most."""
        return max(prod(layer.shape) for layer in self.layers)

    @property
    def relus(self) -> tuple[int, ...]:
        """Positions of the ReLU layers."""
        return tuple(i for i, layer in enumerate(self.layers) if isinstance(layer, Relu))

    @property
    def bent(self) -> tuple[int, ...]:
        """Positions of the layers that ReLUs or sigmoids take, in order: those whose bounds matter."""
        return tuple(sorted({i for layer in self.layers if isinstance(layer, Relu | Sigmoid) for i in layer.inputs}))

    @property
    def curved(self) -> tuple[int, ...]:
        """Positions of the layers that sigmoids take, in order."""
        return tuple(sorted({i for layer in self.layers if isinstance(layer, Sigmoid) for i in layer.inputs}))

    @property
    def dtype(self) -> torch.dtype:
        """That of the weights."""
        return self._example.dtype

    @property
    def device(self) -> torch.device:
        """That of the weights."""
        return self._example.device

    @property
    def _example(self) -> Tensor:
        found = self.tensors()
        return found[0] if found else torch.zeros(())

    def tensors(self) -> list[Tensor]:
        """The weights, layer by layer."""
        return [v for layer in self.layers for v in vars(layer).values() if isinstance(v, Tensor)]

    def taking(self, shape: tuple[int, ...]) -> "Network":
        """The same network on inputs of another shape, with as many numbers in the same order."""
        if shape == self.input_shape:
            return self
        first = [Input("input", (), shape), Reshape("input", (0,), self.input_shape, input_shape=shape)]
        rest = [replace(layer, inputs=tuple(i + 1 for i in layer.inputs)) for layer in self.layers[1:]]
        return Network([*first, *rest])

    def box_is_exact(self, position: int, origin: int = 0) -> bool:
        """Whether intervals are exact in that layer, of a box at ``origin``, the image unless told otherwise.

        So they are behind elementwise layers and one that mixes at the most.
        """
        mixed = 0
        while position != origin:
            layer = self.layers[position]
            if position < origin or isinstance(layer, Relu | Sigmoid) or len(layer.inputs) != 1:
                return False
            mixed += isinstance(layer, Linear | Convolution)
            (position,) = layer.inputs
        return mixed <= 1

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> "Network":
        """A copy with its weights in that type, on that device."""
        device = self.device if device is None else torch.device(device)
        return Network([layer.to(dtype or self.dtype, device) for layer in self.layers])

    def outputs(self, images: Tensor) -> list[Tensor]:
        """The output of every layer, for images ``(n, *input_shape)``."""
        found: list[Tensor] = []
        for layer in self.layers:
            found.append(layer(*(found[i] for i in layer.inputs)) if layer.inputs else layer(images))
        return found

    def __call__(self, images: Tensor) -> Tensor:
        """Logits ``(n, classes)`` of images ``(n, *input_shape)``."""
        return self.outputs(images)[-1]


class NetworkModule(nn.Module):
    """A network as a module, for attacks and evaluations: images ``(n, ...)`` to logits ``(n, classes)``, in float32.

    Args:
        network: in any type.

    Attributes:
        graph: the network as given.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.graph = network
        self._place: tuple[torch.device, Network] | None = None
        # Tells those who ask where the module lives, and moves with it.
        self.register_buffer("_here", torch.zeros(()), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if self._place is None or self._place[0] != images.device:
            self._place = (images.device, self.graph.to(torch.float32, images.device))
        return self._place[1](images.reshape(len(images), *self.graph.input_shape))
