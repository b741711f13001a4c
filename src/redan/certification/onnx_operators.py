"""The operators of ONNX that can be certified, each in the few kinds of layers there are.

Source: the ONNX operator specifications, versions 7 to 26 of the default domain. A batch is of one image.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from redan.certification.building import Builder

_LARGEST = float(np.finfo(np.float32).max)  # by which old exporters say that a side is not clipped


@dataclass(frozen=True)
class Node:
    """An operator with what it is applied to.

    Attributes:
        inputs: a position for what depends on the images, an array for what does not, None for what is left out.
        attributes: by name.
        outputs: how many it has.
    """

    inputs: list[Any]
    attributes: dict[str, Any]
    outputs: int

    def given(self, i: int, name: str, default: Any = None) -> Any:
        """What an operator takes as an attribute up to some version, as its ``i``-th input from there on."""
        if len(self.inputs) > i and self.inputs[i] is not None:
            return self.inputs[i]
        return self.attributes.get(name, default)


def is_position(value: Any) -> bool:
    """Whether a value is a place in the graph, which depends on the images."""
    return type(value) is int


def _constant(b: Builder, value: Any) -> Tensor:
    if is_position(value):
        raise b.refuse("a weight, factor or divisor that depends on the images")
    return torch.as_tensor(np.array(value, np.float64))


def _numbers(b: Builder, value: Any) -> list[int]:
    if is_position(value):
        raise b.refuse("a shape or place that depends on the images")
    return [int(it) for it in np.ravel(value)]


def _sizes(b: Builder, x: int) -> tuple[int, ...]:
    """The shape of a batch of one image."""
    return (1, *b.shape(x))


def _axis(b: Builder, x: int, axis: int) -> int:
    """The axis of an image that is this one of a batch."""
    axis %= len(_sizes(b, x))
    if axis == 0:
        raise b.refuse("it mixes or takes apart the images of a batch")
    return axis - 1


def _resize(b: Builder, x: int, sizes: Sequence[int]) -> int:
    """The numbers of a batch of one image in another shape, whose first axis must be the batch still."""
    if not sizes or sizes[0] != 1:
        raise b.refuse(f"an image's numbers would go to the shape ({', '.join(map(str, sizes))}), not to (1, ...)")
    return b.reshape(x, sizes[1:])


def _add(b: Builder, node: Node) -> int:
    positions = [it for it in node.inputs if is_position(it)]
    x = positions[0] if len(positions) == 1 else b.add(*positions)
    for it in node.inputs:
        if not is_position(it):
            x = b.scale(x, 1.0, _constant(b, it))
    return x


def _subtract(b: Builder, node: Node) -> int:
    x, y = node.inputs
    if is_position(x) and is_position(y):
        return b.subtract(x, y)
    return b.scale(x, 1.0, -_constant(b, y)) if is_position(x) else b.scale(y, -1.0, _constant(b, x))


def _multiply(b: Builder, node: Node) -> int:
    x, y = node.inputs if is_position(node.inputs[0]) else reversed(node.inputs)
    return b.scale(x, _constant(b, y))


def _divide(b: Builder, node: Node) -> int:
    return b.scale(node.inputs[0], 1 / _constant(b, node.inputs[1]))


def _gemm(b: Builder, node: Node) -> int:
    if node.attributes.get("transA"):
        raise b.refuse("a transposed batch")
    x, bias = node.inputs[0], node.given(2, "C")
    weight = _constant(b, node.inputs[1]) * node.attributes.get("alpha", 1.0)
    weight = weight if node.attributes.get("transB") else weight.T
    if bias is None:
        return b.linear(x, weight, None)
    shift = _constant(b, bias) * node.attributes.get("beta", 1.0)
    return b.linear(x, weight, shift.flatten().expand(len(weight)))


def _matmul(b: Builder, node: Node) -> int:
    x, weight = node.inputs[0], _constant(b, node.inputs[1])
    *rows, size = b.shape(x)
    if weight.dim() != 2 or math.prod(rows) != 1:
        raise b.refuse("only products of a vector with a matrix are known")
    return b.reshape(b.linear(b.reshape(x, (size,)), weight.T, None), (*rows, weight.shape[1]))


def _batch_norm(b: Builder, node: Node) -> int:
    if node.attributes.get("training_mode") or not node.attributes.get("spatial", 1):
        raise b.refuse("BatchNorm that computes statistics of its batch, or of each pixel")
    x, *statistics = node.inputs
    weight, bias, mean, variance = (_constant(b, it) for it in statistics)
    return b.batch_norm(x, weight, bias, mean, variance, node.attributes.get("epsilon", 1e-5))


def _clip(b: Builder, node: Node) -> int:
    limits = [node.given(i, name) for i, name in ((1, "min"), (2, "max"))]
    low, high = (None if it is None else float(_constant(b, it)) for it in limits)
    return b.clamp(
        node.inputs[0],
        None if low is None or low <= -_LARGEST else low,
        None if high is None or high >= _LARGEST else high,
    )


def _dropout(b: Builder, node: Node) -> int:
    if bool(node.given(2, "training_mode", False)):
        raise b.refuse("dropout that drops")
    return node.inputs[0]


def _cast(b: Builder, node: Node) -> int:
    if node.attributes["to"] not in (1, 11):
        raise b.refuse("a cast to anything but float32 and float64")
    return node.inputs[0]


@dataclass(frozen=True)
class _Windows:
    """How a convolution or a pooling goes over an image.

    Attributes:
        margins: zeros around, as ``Builder.pad`` takes them: left, right, top, bottom.
    """

    stride: tuple[int, int]
    dilation: tuple[int, int]
    margins: tuple[int, int, int, int]

    def padded(self, b: Builder, x: int) -> tuple[int, tuple[int, int]]:
        """What to go over, and the same number of zeros on both sides that is still to come."""
        left, right, top, bottom = self.margins
        if left == right and top == bottom:
            return x, (top, left)
        return b.pad(x, self.margins), (0, 0)


def _windows(b: Builder, node: Node, kernel: Sequence[int]) -> _Windows:
    x, given = node.inputs[0], node.attributes
    if len(b.shape(x)) != 3 or len(kernel) != 2:
        raise b.refuse("only convolutions and pooling in two dimensions are known")
    stride, dilation = (tuple(given.get(name, (1, 1))) for name in ("strides", "dilations"))
    sizes, mode = b.shape(x)[1:], given.get("auto_pad", "NOTSET")
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    if mode in ("SAME_UPPER", "SAME_LOWER"):  # as many windows as strides fit in
        before, after = [], []
        for size, s, r in zip(sizes, stride, reach, strict=True):
            total = max((-(-size // s) - 1) * s + r - size, 0)
            halves = (total // 2, total - total // 2)
            before.append(halves[mode == "SAME_LOWER"])
            after.append(halves[mode == "SAME_UPPER"])
    else:
        top, left, bottom, right = given.get("pads", (0, 0, 0, 0)) if mode == "NOTSET" else (0, 0, 0, 0)
        before, after = [top, left], [bottom, right]
    if given.get("ceil_mode"):
        whole = [size + m + n - r for size, m, n, r in zip(sizes, before, after, reach, strict=True)]
        if any(rest % s for rest, s in zip(whole, stride, strict=True)):
            raise b.refuse("pooling of windows that reach over the edge (ceil_mode)")
    return _Windows(stride, dilation, (before[1], after[1], before[0], after[0]))


def _convolution(b: Builder, node: Node) -> int:
    weight, bias = _constant(b, node.inputs[1]), node.given(2, "B")
    windows = _windows(b, node, weight.shape[2:])
    x, padding = windows.padded(b, node.inputs[0])
    groups = node.attributes.get("group", 1)
    shift = None if bias is None else _constant(b, bias)
    return b.convolution(x, weight, shift, windows.stride, padding, windows.dilation, groups)


def _pool(b: Builder, node: Node) -> tuple[Sequence[int], _Windows]:
    kernel = node.attributes["kernel_shape"]
    windows = _windows(b, node, kernel)
    if windows.dilation != (1, 1):
        raise b.refuse("pooling with dilation")
    return kernel, windows


def _max_pool(b: Builder, node: Node) -> int:
    kernel, windows = _pool(b, node)
    return b.max_pool(node.inputs[0], kernel, windows.stride, windows.margins)


def _average_pool(b: Builder, node: Node) -> int:
    kernel, windows = _pool(b, node)
    if any(windows.margins) and not node.attributes.get("count_include_pad"):
        raise b.refuse("average pooling that leaves the padding out")
    x, padding = windows.padded(b, node.inputs[0])
    return b.average_pool(x, kernel, windows.stride, padding)


def _global_average_pool(b: Builder, node: Node) -> int:
    if len(b.shape(node.inputs[0])) != 3:
        raise b.refuse("only pooling in two dimensions is known")
    return b.adaptive_average_pool(node.inputs[0], (1, 1))


def _mean(b: Builder, node: Node) -> int:
    x, axes = node.inputs[0], node.given(1, "axes")
    rank = len(_sizes(b, x))
    if rank != 4 or axes is None or sorted(it % rank for it in _numbers(b, axes)) != [2, 3]:
        raise b.refuse("a mean is known over height and width only")
    pooled = b.adaptive_average_pool(x, (1, 1))
    return pooled if node.attributes.get("keepdims", 1) else b.reshape(pooled, b.shape(pooled)[:1])


def _flatten(b: Builder, node: Node) -> int:
    sizes = _sizes(b, node.inputs[0])
    axis = node.attributes.get("axis", 1)
    return _resize(b, node.inputs[0], (math.prod(sizes[:axis]), math.prod(sizes[axis:])))


def _reshape(b: Builder, node: Node) -> int:
    sizes, shape = _sizes(b, node.inputs[0]), _numbers(b, node.inputs[1])
    if not node.attributes.get("allowzero"):
        shape = [sizes[i] if it == 0 else it for i, it in enumerate(shape)]
    known = math.prod(it for it in shape if it != -1)
    return _resize(b, node.inputs[0], [math.prod(sizes) // known if it == -1 else it for it in shape])


def _squeeze(b: Builder, node: Node) -> int:
    sizes, axes = _sizes(b, node.inputs[0]), node.given(1, "axes")
    dropped = [i for i, it in enumerate(sizes) if it == 1]
    if axes is not None:
        dropped = [it % len(sizes) for it in _numbers(b, axes)]
    return _resize(b, node.inputs[0], [it for i, it in enumerate(sizes) if i not in dropped])


def _unsqueeze(b: Builder, node: Node) -> int:
    sizes, axes = list(_sizes(b, node.inputs[0])), _numbers(b, node.given(1, "axes"))
    for axis in sorted(it % (len(sizes) + len(axes)) for it in axes):
        sizes.insert(axis, 1)
    return _resize(b, node.inputs[0], sizes)


def _transpose(b: Builder, node: Node) -> int:
    rank = len(_sizes(b, node.inputs[0]))
    first, *order = node.attributes.get("perm", range(rank - 1, -1, -1))
    if first != 0:
        raise b.refuse("a permutation that moves the batch")
    return b.permute(node.inputs[0], [it - 1 for it in order])


def _concatenate(b: Builder, node: Node) -> int:
    if not all(is_position(it) for it in node.inputs):
        raise b.refuse("a concatenation with a constant")
    return b.concatenate(node.inputs, _axis(b, node.inputs[0], node.attributes["axis"]))


def _split(b: Builder, node: Node) -> list[int]:
    axis = _axis(b, node.inputs[0], node.attributes.get("axis", 0))
    size, parts = b.shape(node.inputs[0])[axis], node.given(1, "split")
    each = -(-size // node.outputs)  # all but the last, which may be smaller
    sizes = [each] * node.outputs if parts is None else _numbers(b, parts)
    ends = np.cumsum(sizes).tolist()
    return [b.slice(node.inputs[0], axis, end - it, end) for it, end in zip(sizes, ends, strict=True)]


def _slice(b: Builder, node: Node) -> int:
    x = node.inputs[0]
    starts, stops = (_numbers(b, node.given(i, name)) for i, name in ((1, "starts"), (2, "ends")))
    axes = _numbers(b, node.given(3, "axes", range(len(starts))))
    steps = _numbers(b, node.given(4, "steps", [1] * len(starts)))
    for axis, start, stop, step in zip(axes, starts, stops, steps, strict=True):
        if step < 1:
            raise b.refuse("a slice that runs backwards")
        if axis % len(_sizes(b, x)) or not range(1)[start:stop]:  # else all of the batch
            x = b.slice(x, _axis(b, x, axis), start, stop, step)
    return x


def _pad(b: Builder, node: Node) -> int:
    x, value = node.inputs[0], node.given(2, "value", 0.0)
    if node.attributes.get("mode", "constant") != "constant" or _constant(b, value).any():
        raise b.refuse("padding with anything but zeros")
    rank, margins = len(_sizes(b, x)), _numbers(b, node.given(1, "pads"))
    axes = [it % rank for it in _numbers(b, node.given(3, "axes", range(rank)))]
    around = {axis: (margins[i], margins[i + len(axes)]) for i, axis in enumerate(axes)}
    if rank != 4 or any(any(it) for axis, it in around.items() if axis < 2):
        raise b.refuse("only height and width can be padded")
    return b.pad(x, (*around.get(3, (0, 0)), *around.get(2, (0, 0))))


OPERATORS: dict[str, Callable[[Builder, Node], int | list[int]]] = {
    "Add": _add,
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": _concatenate,
    "Conv": _convolution,
    "Div": _divide,
    "Dropout": _dropout,
    "Flatten": _flatten,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_average_pool,
    "Identity": lambda b, node: node.inputs[0],
    "LeakyRelu": lambda b, node: b.leaky_relu(node.inputs[0], node.attributes.get("alpha", 0.01)),
    "MatMul": _matmul,
    "MaxPool": _max_pool,
    "Mul": _multiply,
    "Neg": lambda b, node: b.scale(node.inputs[0], -1.0),
    "PRelu": lambda b, node: b.leaky_relu(node.inputs[0], _constant(b, node.inputs[1])),
    "Pad": _pad,
    "ReduceMean": _mean,
    "Relu": lambda b, node: b.relu(node.inputs[0]),
    "Reshape": _reshape,
    "Sigmoid": lambda b, node: b.sigmoid(node.inputs[0]),
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Sub": _subtract,
    "Sum": _add,
    "Tanh": lambda b, node: b.tanh(node.inputs[0]),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
