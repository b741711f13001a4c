"""Reads an ``nn.Module`` into a graph of layers, by way of what ``torch.export`` sees of it."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from redan.certification.building import Builder
from redan.certification.network import Network
from redan.errors import UserError

AGREEMENT = 1e-4  # largest difference of logits on random images, relative to the largest logit


def read_network(model: nn.Module, input_shape: tuple[int, ...]) -> Network:
    """The graph of a network in evaluation mode, in float64.

    Args:
        model: images ``(n, *input_shape)`` in [0, 1] to logits ``(n, classes)``; left as it is.
        input_shape: of an image.

    Raises:
        UserError: where a layer is none that can be certified (it is named), or the graph does not compute what the
            network does.
    """
    training = {name for name, module in model.named_modules() if module.training}
    device = next((it.device for it in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    draws = torch.Generator().manual_seed(0)
    images = torch.rand(4, *input_shape, generator=draws).to(device)
    model.eval()
    try:
        with torch.no_grad():
            expected = model(images)
            # Of two images, as export treats a batch of one as a constant.
            program = torch.export.export(model, (images[:2],), strict=False)
    except UserError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise UserError(f"the network cannot be read as a graph: {reason[0] if reason else error!r}") from error
    finally:
        for name, module in model.named_modules():
            module.training = name in training
    network = _Reader(program, input_shape).read().to(device=device)
    check_agreement(network, images, expected)
    return network


def check_agreement(network: Network, images: Tensor, expected: Tensor) -> None:
    """Raise UserError unless the graph gives the logits that the network gave."""
    if expected.shape != (len(images), network.classes):
        raise UserError(f"the network gives {tuple(expected.shape[1:])} outputs an image; one row of logits is needed")
    difference = (network(images.to(network.dtype)) - expected).abs().max()
    if not difference <= AGREEMENT * expected.abs().max().clamp(min=1):
        raise UserError(
            f"the network was not read right: on random images its logits differ by {float(difference):.2g}; "
            "does it draw at random?"
        )


class _Reader:
    """One pass over an exported program."""

    def __init__(self, program: Any, input_shape: tuple[int, ...]) -> None:
        self._program = program
        self._build = Builder(input_shape)
        self._found: dict[Node, Any] = {}  # a position for what depends on the images, a tensor for what does not

    def read(self) -> Network:
        signature = self._program.graph_signature
        state = {**self._program.state_dict, **self._program.constants}
        weights = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        weights |= signature.inputs_to_lifted_tensor_constants
        output = None
        for node in self._program.graph.nodes:
            if node.op == "placeholder":
                self._found[node] = state[weights[node.name]].detach().cpu() if node.name in weights else 0
            elif node.op == "output":
                output = self._value(node.args[0][0])
            else:
                self._build.name = _name(node)
                self._found[node] = self._call(node)
        if type(output) is not int:
            raise UserError("the network's logits do not depend on the images")
        return self._build.network(output)

    def _value(self, argument: Any) -> Any:
        if isinstance(argument, Node):
            return self._found[argument]
        if isinstance(argument, list | tuple):
            return [self._value(it) for it in argument]
        return _Number(argument) if type(argument) is int else argument

    def _call(self, node: Node) -> Any:
        arguments = [self._value(it) for it in node.args]
        options = {k: self._value(v) for k, v in node.kwargs.items()}
        target: Any = node.target
        if target is operator.getitem:
            return arguments[0][arguments[1]]
        if not any(type(it) is int for it in _flat([*arguments, *options.values()])):
            return target(*arguments, **options)  # of weights alone
        name = target.__name__.partition(".")[0] if hasattr(target, "__name__") else str(target)
        if name not in OPERATIONS:
            raise self._build.refuse(f"redan knows no bounds of {name!r} (it knows: {', '.join(sorted(OPERATIONS))})")
        return OPERATIONS[name](self._build, *arguments, **options)


class _Number(int):
    """A whole number in the program, which is no position in the graph."""


def _flat(values: Any) -> list[Any]:
    return [it for v in values for it in (_flat(v) if isinstance(v, list) else [v])]


def _name(node: Node) -> str:
    """What the user calls the module that a node comes from."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]).removeprefix("L['self']").strip(".") if stack else ""
    return path or node.name


def _position(x: Any) -> bool:
    return type(x) is int


def _linear(b: Builder, x: int, weight: Tensor, bias: Tensor | None = None) -> int:
    return b.linear(x, weight, bias)


def _conv2d(
    b: Builder,
    x: int,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = (1, 1),
    padding: Any = (0, 0),
    dilation: Any = (1, 1),
    groups: int = 1,
) -> int:
    if padding == "valid":
        padding = (0, 0)
    elif padding == "same":  # the odd zero, if any, on the right and below
        (wide, high) = (d * (k - 1) for k, d in zip(weight.shape[:1:-1], _pair(dilation)[::-1], strict=True))
        x, padding = b.pad(x, (wide // 2, wide - wide // 2, high // 2, high - high // 2)), (0, 0)
    return b.convolution(x, weight, bias, stride, padding, dilation, int(groups))


def _batch_norm(
    b: Builder,
    x: int,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    training: bool,
    momentum: float,
    epsilon: float,
    *_: Any,
) -> int:
    if training or mean is None or variance is None:
        raise b.refuse("BatchNorm that computes statistics of its batch")
    return b.batch_norm(x, weight, bias, mean, variance, epsilon)


def _add(b: Builder, x: Any, y: Any, alpha: float = 1) -> int:
    if _position(x) and _position(y):
        return b.add(x, y if alpha == 1 else b.scale(y, float(alpha)))
    return b.scale(x, 1.0, _constant(y) * alpha) if _position(x) else b.scale(y, float(alpha), _constant(x))


def _sub(b: Builder, x: Any, y: Any, alpha: float = 1) -> int:
    if _position(x) and _position(y):
        return b.add(x, b.scale(y, -float(alpha)))
    return b.scale(x, 1.0, -_constant(y) * alpha) if _position(x) else b.scale(y, -float(alpha), _constant(x))


def _mul(b: Builder, x: Any, y: Any) -> int:
    if _position(x) and _position(y):
        raise b.refuse("a product of two values that depend on the image")
    return b.scale(x, _constant(y)) if _position(x) else b.scale(y, _constant(x))


def _div(b: Builder, x: Any, y: Any) -> int:
    if _position(y):
        raise b.refuse("a division by a value that depends on the image")
    return b.scale(x, 1 / _constant(y))


def _constant(value: Any) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


def _view(b: Builder, x: int, shape: Any) -> int:
    return _reshape(b, x, [int(it) for it in shape])


def _reshape(b: Builder, x: int, shape: list[int]) -> int:
    """``shape`` begins with the batch: 2 images, or -1."""
    rest = shape[1:]
    if shape[0] not in (2, -1) or (shape[0] == -1 and -1 in rest):
        raise b.refuse("a reshape that mixes images of a batch")
    total = 1
    for it in b.shape(x):
        total *= it
    if -1 in rest:
        known = 1
        for it in rest:
            known *= it if it != -1 else 1
        rest = [total // known if it == -1 else it for it in rest]
    product = 1
    for it in rest:
        product *= it
    if product != total:
        raise b.refuse("a reshape that mixes images of a batch")
    return b.reshape(x, rest)


def _flatten(b: Builder, x: int, start: int = 0, end: int = -1) -> int:
    shape = b.shape(x)
    first = start % (len(shape) + 1)
    last = end % (len(shape) + 1)
    if first == 0:
        raise b.refuse("a flattening that mixes images of a batch")
    middle = 1
    for it in shape[first - 1 : last]:
        middle *= it
    return b.reshape(x, (*shape[: first - 1], middle, *shape[last:]))


def _unflatten(b: Builder, x: int, dim: int, sizes: Any) -> int:
    shape = b.shape(x)
    axis = dim % (len(shape) + 1) - 1
    if axis < 0:
        raise b.refuse("an unflattening that mixes images of a batch")
    return _reshape(b, x, [2, *shape[:axis], *(int(it) for it in sizes), *shape[axis + 1 :]])


def _squeeze(b: Builder, x: int, dims: Any = None) -> int:
    shape = b.shape(x)
    dims = range(1, len(shape) + 1) if dims is None else [dims] if isinstance(dims, int) else dims
    axes = [it % (len(shape) + 1) for it in dims]
    return b.reshape(x, [size for i, size in enumerate(shape, 1) if not (i in axes and size == 1)])


def _unsqueeze(b: Builder, x: int, dim: int) -> int:
    shape = list(b.shape(x))
    shape.insert(dim % (len(shape) + 2) - 1, 1)
    return b.reshape(x, shape)


def _mean(b: Builder, x: int, dims: Any = None, keepdim: bool = False, **_: Any) -> int:
    axes = sorted(it % 4 for it in (dims or ()))
    if axes != [2, 3] or len(b.shape(x)) != 3:
        raise b.refuse("a mean is known over height and width only")
    pooled = b.adaptive_average_pool(x, (1, 1))
    return pooled if keepdim else b.reshape(pooled, b.shape(pooled)[:1])


def _max_pool(
    b: Builder, x: int, kernel: Any, stride: Any = (), padding: Any = (0, 0), dilation: Any = (1, 1), ceil: bool = False
) -> int:
    if ceil or any(it != 1 for it in _pair(dilation)):
        raise b.refuse("max pooling with dilation or rounded up")
    high, wide = _pair(padding)
    return b.max_pool(x, _pair(kernel), _pair(stride or kernel), (wide, wide, high, high))


def _average_pool(
    b: Builder,
    x: int,
    kernel: Any,
    stride: Any = (),
    padding: Any = (0, 0),
    ceil: bool = False,
    count_padding: bool = True,
    divisor: Any = None,
) -> int:
    if ceil or divisor is not None or (any(_pair(padding)) and not count_padding):
        raise b.refuse("average pooling that is rounded up, or divides by another number than its pixels'")
    return b.average_pool(x, _pair(kernel), _pair(stride or kernel), _pair(padding))


def _pair(value: Any) -> tuple[int, int]:
    pair = [int(it) for it in value] if isinstance(value, list | tuple) else [int(value)]
    return (pair[0], pair[-1])


def _slice(b: Builder, x: int, dim: int = 0, start: int | None = None, stop: int | None = None, step: int = 1) -> int:
    axis = dim % (len(b.shape(x)) + 1)
    if axis == 0:
        if start in (None, 0) and (stop is None or stop > 1) and step == 1:
            return x
        raise b.refuse("a choice among the images of a batch")
    size = b.shape(x)[axis - 1]
    first, last, _ = slice(start, stop, step).indices(size)
    return b.slice(x, axis - 1, first, last, int(step))


def _split(b: Builder, x: int, sizes: Any, dim: int = 0) -> list[int]:
    axis = dim % (len(b.shape(x)) + 1)
    if axis == 0:
        raise b.refuse("a split of the batch")
    whole = b.shape(x)[axis - 1]
    if isinstance(sizes, int):
        sizes = [min(sizes, whole - at) for at in range(0, whole, sizes)]
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [b.slice(x, axis - 1, end - int(size), end) for size, end in zip(sizes, ends, strict=True)]


def _chunk(b: Builder, x: int, chunks: int, dim: int = 0) -> list[int]:
    axis = dim % (len(b.shape(x)) + 1)
    return _split(b, x, -(-b.shape(x)[axis - 1] // int(chunks)), dim)


def _cat(b: Builder, xs: list[Any], dim: int = 0) -> int:
    if not all(_position(x) for x in xs):
        raise b.refuse("a concatenation with a constant")
    axis = dim % (len(b.shape(xs[0])) + 1)
    if axis == 0:
        raise b.refuse("a concatenation of batches")
    return b.concatenate(xs, axis - 1)


def _pad(b: Builder, x: int, margins: Any, mode: str = "constant", value: float | None = None) -> int:
    if mode != "constant" or value:
        raise b.refuse("padding with anything but zeros")
    left, right, top, bottom, *more = (*(int(it) for it in margins), 0, 0, 0, 0)[: max(4, len(margins))]
    if any(more):
        raise b.refuse("padding of anything but height and width")
    return b.pad(x, (left, right, top, bottom))


def _dropout(b: Builder, x: int, share: float, train: bool) -> int:
    if train:
        raise b.refuse("dropout that draws in evaluation mode")
    return x


def _permute(b: Builder, x: int, order: Any) -> int:
    axes = [int(it) % len(order) for it in order]
    if axes[0] != 0:
        raise b.refuse("a permutation that moves the batch")
    return b.permute(x, [it - 1 for it in axes[1:]])


def _transpose(b: Builder, x: int, first: int, second: int) -> int:
    order = list(range(len(b.shape(x)) + 1))
    first, second = first % len(order), second % len(order)
    order[first], order[second] = order[second], order[first]
    return _permute(b, x, order)


OPERATIONS: dict[str, Callable[..., Any]] = {
    "_unsafe_view": _view,
    "adaptive_avg_pool2d": lambda b, x, size: b.adaptive_average_pool(x, _pair(size)),
    "add": _add,
    "add_": _add,
    "alias": lambda b, x: x,
    "avg_pool2d": _average_pool,
    "batch_norm": _batch_norm,
    "cat": _cat,
    "chunk": _chunk,
    "clamp": lambda b, x, low=None, high=None, **limits: b.clamp(x, limits.get("min", low), limits.get("max", high)),
    "clone": lambda b, x, **_: x,
    "concat": _cat,
    "contiguous": lambda b, x, **_: x,
    "conv2d": _conv2d,
    "detach": lambda b, x: x,
    "div": _div,
    "clamp_min": lambda b, x, low: b.clamp(x, float(low), None),
    "dropout": _dropout,
    "feature_dropout": _dropout,
    "flatten": _flatten,
    "hardtanh": lambda b, x, low=-1.0, high=1.0: b.clamp(x, float(low), float(high)),
    "hardtanh_": lambda b, x, low=-1.0, high=1.0: b.clamp(x, float(low), float(high)),
    "leaky_relu": lambda b, x, slope=0.01: b.leaky_relu(x, float(slope)),
    "leaky_relu_": lambda b, x, slope=0.01: b.leaky_relu(x, float(slope)),
    "linear": _linear,
    "max_pool2d": _max_pool,
    "mean": _mean,
    "mul": _mul,
    "mul_": _mul,
    "neg": lambda b, x: b.scale(x, -1.0),
    "pad": _pad,
    "permute": _permute,
    "relu": lambda b, x: b.relu(x),
    "relu_": lambda b, x: b.relu(x),
    "relu6": lambda b, x: b.clamp(x, 0.0, 6.0),
    "relu6_": lambda b, x: b.clamp(x, 0.0, 6.0),
    "reshape": _view,
    "rsub": lambda b, x, y, alpha=1: _sub(b, y, x, alpha),
    "sigmoid": lambda b, x: b.sigmoid(x),
    "sigmoid_": lambda b, x: b.sigmoid(x),
    "slice": _slice,
    "split": _split,
    "split_with_sizes": _split,
    "squeeze": _squeeze,
    "sub": _sub,
    "tanh": lambda b, x: b.tanh(x),
    "tanh_": lambda b, x: b.tanh(x),
    "transpose": _transpose,
    "unflatten": _unflatten,
    "unsqueeze": _unsqueeze,
    "view": _view,
}
