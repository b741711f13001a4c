"""Networks in ONNX files: read into a graph of layers, and written out of one."""

import gzip
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from redan.certification.building import Builder
from redan.certification.network import (
    Add,
    Concatenate,
    Convolution,
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
from redan.certification.onnx_operators import OPERATORS, Node, is_position
from redan.certification.reading import check_agreement
from redan.errors import UserError
from redan.files import write_atomically

OPSET, IR_VERSION = 17, 8  # of the files written: of 2022, which older runtimes read, too


def read_onnx(
    path: Path, input_mean: Sequence[float] | None = None, input_std: Sequence[float] | None = None
) -> Network:
    """The graph of a network of one input and one output, in float64.

    Args:
        path: the file, or one compressed as ``.onnx.gz``, whose weights are in it.
        input_mean: where the network was exported without its normalisation, ``(images - mean) / std`` per channel:
            one value, or one a channel (the first axis of an image); None for 0.
        input_std: likewise, each above 0; None for 1.

    Raises:
        UserError: where the file is missing or damaged, an operator is none that can be certified (it is named), or the
            graph does not compute what onnxruntime computes of the file.
    """
    import onnx

    try:
        content: str | bytes = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else str(path)
        model = onnx.load(content) if isinstance(content, str) else onnx.load_from_string(content)
    except FileNotFoundError as error:
        raise UserError(f"there is no {error.filename or path}") from error
    except Exception as error:
        raise UserError(f"{path} is damaged or no ONNX file: {_first_line(error)}") from error
    name, shape = _input(path, model)
    mean, std = _normalisation(shape, input_mean, input_std)
    images = torch.rand(4, *shape, generator=torch.Generator().manual_seed(0))
    # One by one, as many files are made for batches of one.
    expected = _run(path, content, name, ((images - mean) / std).float())
    reader = _Reader(model, name, shape)
    if input_mean is not None or input_std is not None:
        reader.normalise(mean, std)
    network = reader.read()
    check_agreement(network, images, expected)
    return network


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else repr(error)


def _input(path: Path, model: Any) -> tuple[str, tuple[int, ...]]:
    """Name of the input and the shape of an image. Old files list the weights among the inputs, too."""
    from onnx import TensorProto

    weights = {it.name for it in model.graph.initializer}
    inputs = [it for it in model.graph.input if it.name not in weights]
    if len(inputs) != 1 or len(model.graph.output) != 1:
        raise UserError(
            f"{path} has {len(inputs)} inputs and {len(model.graph.output)} outputs; a network of one each is needed"
        )
    of_type = inputs[0].type.tensor_type
    sizes = [it.dim_value for it in of_type.shape.dim]  # 0 where it is symbolic or not said
    if of_type.elem_type != TensorProto.FLOAT or len(sizes) < 2 or sizes[0] > 1 or min(sizes[1:]) < 1:
        named = [it.dim_param or it.dim_value or "?" for it in of_type.shape.dim]
        raise UserError(
            f"{path}: the input must be float32, a batch (of 1 or any size) of images of a fixed shape; "
            f"it is of type {TensorProto.DataType.Name(of_type.elem_type)} and shape ({', '.join(map(str, named))})"
        )
    return inputs[0].name, tuple(sizes[1:])


def _normalisation(
    shape: tuple[int, ...], mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation that broadcast against an image, float64."""
    found = []
    for what, values in (("mean", (0.0,) if mean is None else mean), ("std", (1.0,) if std is None else std)):
        if len(values) not in (1, shape[0]) or not all(math.isfinite(it) for it in values):
            raise UserError(f"the input's {what} must be one number or {shape[0]}, one a channel; it is {list(values)}")
        found.append(torch.tensor(values, dtype=torch.float64).view(-1, *(1,) * (len(shape) - 1)))
    if not (found[1] > 0).all():
        raise UserError(f"the input's std must be above 0; it is {found[1].flatten().tolist()}")
    return found[0], found[1]


def _run(path: Path, content: str | bytes, name: str, images: Tensor) -> Tensor:
    """What onnxruntime computes of images, one by one: ``(n, ...)``; ``content`` is the file's, or its path."""
    import onnxruntime  # type: ignore[import-untyped]  # it ships no types

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what it finds is raised, too
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        return torch.cat([torch.from_numpy(session.run(None, {name: it[None].numpy()})[0]) for it in images])
    except Exception as error:
        raise UserError(f"{path} is damaged, or nothing that onnxruntime can run: {_first_line(error)}") from error


class _Reader:
    """One pass over a file's graph."""

    def __init__(self, model: Any, name: str, shape: tuple[int, ...]) -> None:
        from onnx import numpy_helper

        self._model = model
        self._build = Builder(shape)
        self._found: dict[str, Any] = {it.name: numpy_helper.to_array(it) for it in model.graph.initializer}
        self._found |= {"": None, name: 0}

    def normalise(self, mean: Tensor, std: Tensor) -> None:
        """Put ``(x - mean) / std`` first."""
        self._build.name = "normalisation"
        position = self._build.scale(0, 1 / std, -mean / std)
        self._found = {name: position if is_position(it) else it for name, it in self._found.items()}

    def read(self) -> Network:
        for node in self._model.graph.node:
            self._build.name = node.name or node.output[0]
            inputs = [self._value(name) for name in node.input]
            if node.op_type == "Shape" and is_position(inputs[0]):
                results = self._shape(node, inputs[0])
            elif any(is_position(it) for it in inputs):
                results = self._apply(node, inputs)
            else:
                results = self._evaluate(node, inputs)
            self._found |= zip(node.output, results, strict=False)  # what training wants besides is not computed
        output = self._value(self._model.graph.output[0].name)
        if not is_position(output):
            raise UserError("the network's logits do not depend on the images")
        return self._build.network(output)

    def _value(self, name: str) -> Any:
        if name not in self._found:
            raise self._build.refuse(f"its input {name!r} is nothing that redan computes")
        return self._found[name]

    def _apply(self, node: Any, inputs: list[Any]) -> list[int]:
        operator = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
        if operator not in OPERATORS:
            known = ", ".join(sorted(OPERATORS))
            raise self._build.refuse(f"redan knows no bounds of the operator {operator!r} (it knows: {known})")
        result = OPERATORS[operator](self._build, Node(inputs, _attributes(node), len(node.output)))
        return result if isinstance(result, list) else [result]

    def _shape(self, node: Any, x: int) -> list[Any]:
        """The shape of a batch of one image."""
        part = _attributes(node)
        return [np.array((1, *self._build.shape(x)), np.int64)[part.get("start") : part.get("end")]]

    def _evaluate(self, node: Any, inputs: list[Any]) -> list[Any]:
        """Of weights and shapes alone: by ONNX's own implementation, in the version that the file names."""
        from onnx import helper
        from onnx.reference import ReferenceEvaluator

        values = {name: it for name, it in zip(node.input, inputs, strict=True) if name}
        function = helper.make_function("", "constant", list(values), node.output, [node], self._model.opset_import)
        try:
            return [np.asarray(it) for it in ReferenceEvaluator(function).run(None, values, {})]
        except Exception as error:
            raise self._build.refuse(f"the constant {node.op_type} cannot be computed: {_first_line(error)}") from error


def _attributes(node: Any) -> dict[str, Any]:
    from onnx import helper

    values = {it.name: helper.get_attribute_value(it) for it in node.attribute}
    return {name: it.decode() if isinstance(it, bytes) else it for name, it in values.items()}


def write_onnx(network: Network, path: Path) -> None:
    """Write a graph of layers as ONNX, with float32 weights: ``images`` ``(batch, *input_shape)`` to ``logits``.

    Raises:
        UserError: where the file cannot be written.
    """
    from onnx import TensorProto, helper, numpy_helper

    names = ["images", *(f"layer-{i}" for i in range(1, len(network.layers) - 1)), "logits"]
    nodes, weights = [], []
    for i, layer in enumerate(network.layers[1:], 1):
        taken, given = [names[k] for k in layer.inputs], names[i]
        steps = _operators(layer)
        for j, (operator, constants, attributes) in enumerate(steps):
            result = given if j == len(steps) - 1 else f"{given}-{operator}"
            keys = [f"{given}-{operator}-{k}" for k in range(len(constants))]
            weights += [numpy_helper.from_array(it, key) for it, key in zip(constants, keys, strict=True)]
            nodes.append(
                helper.make_node(operator, [*taken, *keys], [result], f"{layer.name} ({result})", **attributes)
            )
            taken = [result]
    described = partial(helper.make_tensor_value_info, elem_type=TensorProto.FLOAT)
    graph = helper.make_graph(
        nodes,
        "network",
        [described("images", shape=["batch", *network.input_shape])],
        [described("logits", shape=["batch", *network.layers[-1].shape])],
        weights,
    )
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, producer_name="redan", ir_version=IR_VERSION, opset_imports=opsets)
    write_atomically(path, model.SerializeToString())


def _operators(layer: Layer) -> list[tuple[str, list[Any], dict[str, Any]]]:
    """A layer as operators, one after the other, each with its constants and attributes."""
    match layer:
        case Linear():
            return [("Gemm", [_weight(layer.weight), _weight(layer.bias)], {"transB": 1})]
        case Convolution():
            attributes = {
                "kernel_shape": list(layer.weight.shape[2:]),
                "strides": layer.stride,
                "pads": layer.padding * 2,
                "dilations": layer.dilation,
                "group": layer.groups,
            }
            return [("Conv", [_weight(layer.weight), _weight(layer.bias.flatten())], attributes)]
        case Scale():
            return [("Mul", [_weight(layer.scale)], {}), ("Add", [_weight(layer.bias)], {})]
        case Relu():
            return [("Relu", [], {})]
        case Sigmoid():
            return [("Sigmoid", [], {})]
        case Add():
            return [("Sum", [], {})]
        case Reshape():
            return [("Reshape", [np.array([0, *layer.shape])], {})]
        case Permute():
            return [("Transpose", [], {"perm": [0, *(1 + axis for axis in layer.order)]})]
        case Slice():
            places = (layer.start, layer.stop, 1 + layer.axis, layer.step)
            return [("Slice", [np.array([it]) for it in places], {})]
        case Concatenate():
            return [("Concat", [], {"axis": 1 + layer.axis})]
        case Pad():
            left, right, top, bottom = layer.margins
            return [("Pad", [np.array([0, 0, top, left, 0, 0, bottom, right])], {})]
    raise TypeError(f"no operator for {type(layer).__name__}")


def _weight(tensor: Tensor) -> Any:
    return tensor.float().cpu().numpy()
