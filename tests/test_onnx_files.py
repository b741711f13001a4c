"""ONNX files against onnxruntime: every operator in its old and new forms, networks written and read back."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime  # type: ignore[import-untyped]  # it ships no types
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from redan.certification.network import Convolution, Linear, Network, Scale
from redan.certification.onnx_files import read_onnx, write_onnx
from redan.certification.onnx_operators import OPERATORS
from redan.certification.reading import read_network
from redan.data.registry import load_dataset, locate
from redan.errors import UserError
from redan.models.norms import Normalise
from redan.models.registry import build_model

NEWEST = 25
IMAGE = (4, 6, 7)
LONG = np.iinfo(np.int64).max


def node(operator: str, inputs: str = "x", outputs: str = "y", name: str = "", **attributes: Any) -> Any:
    """A node; ``-`` stands for an input that is left out."""
    names = [it.replace("-", "") for it in inputs.split()]
    return helper.make_node(operator, names, outputs.split(), name, **attributes)


def save(
    path: Path,
    nodes: Sequence[Any],
    constants: dict[str, Any] | None = None,
    shape: Sequence[int] = IMAGE,
    *,
    batch: int | str | None = 1,
    opset: int = 13,
    listed: bool = False,
    output: str = "logits",
) -> Path:
    """A model of an input ``x``; ``listed`` names the constants among the inputs, as files of old did."""
    arrays = {name: np.asarray(it) for name, it in (constants or {}).items()}
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, *shape])]
    if listed:
        kinds = {name: helper.np_dtype_to_tensor_dtype(it.dtype) for name, it in arrays.items()}
        inputs += [helper.make_tensor_value_info(name, kinds[name], it.shape) for name, it in arrays.items()]
    outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)]
    initial = [numpy_helper.from_array(it, name) for name, it in arrays.items()]
    graph = helper.make_graph(nodes, "test", inputs, outputs, initial)
    opsets = [helper.make_opsetid("", opset)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=3 if listed else 10), str(path))
    return path


def runtime(path: Path, images: Tensor) -> Tensor:
    """What onnxruntime computes, one image at a time."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return torch.cat([torch.from_numpy(session.run(None, {name: it[None].numpy()})[0]) for it in images])


def reads(path: Path) -> Network:
    """The network of a file, having seen that it computes what onnxruntime does, of negative inputs, too."""
    network = read_onnx(path)
    images = torch.randn(3, *network.input_shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(network(images.double()).float(), runtime(path, images), rtol=1e-4, atol=1e-4)
    return network


def draw(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def ints(*values: int) -> Any:
    return np.array(values, np.int64)


FLAT = [node("Flatten", "y", "logits")]
WEIGHT = {"w": draw(6, 4, 3, 2), "b": draw(6, seed=1)}
NORM = {"s": draw(4), "t": draw(4, seed=1), "m": draw(4, seed=2), "v": np.exp(draw(4, seed=3))}
POOL: dict[str, Any] = {"kernel_shape": [3, 2], "strides": [2, 1]}

# One model a line: name, opset, nodes up to "y", constants.
CASES: list[tuple[str, int, list[Any], dict[str, Any]]] = [
    ("conv", 7, [node("Conv", "x w b", pads=[1, 2, 1, 2], strides=[2, 1], kernel_shape=[3, 2])], WEIGHT),
    ("conv uneven", 11, [node("Conv", "x w", pads=[1, 0, 2, 1], dilations=[1, 2])], WEIGHT),
    ("conv groups", 22, [node("Conv", "x w b", group=2)], {**WEIGHT, "w": draw(6, 2, 1, 1)}),
    ("conv valid", 11, [node("Conv", "x w b", auto_pad="VALID", strides=[1, 2])], WEIGHT),
    ("conv same upper", 11, [node("Conv", "x w b", auto_pad="SAME_UPPER", strides=[2, 3])], WEIGHT),
    ("conv same lower", 11, [node("Conv", "x w b", auto_pad="SAME_LOWER", strides=[1, 2])], WEIGHT),
    ("conv then batchnorm", 9, [node("Conv", "x w b", "z"), node("BatchNormalization", "z s t m v")],
     {**WEIGHT, **{name: np.concatenate([it, it[:2]]) for name, it in NORM.items()}}),
    ("batchnorm", 7, [node("BatchNormalization", "x s t m v", epsilon=0.1)], NORM),
    ("batchnorm new", 15, [node("BatchNormalization", "x s t m v")], NORM),
    ("relu", 7, [node("Relu")], {}),
    ("leaky relu", 7, [node("LeakyRelu", alpha=0.3)], {}),
    ("leaky relu by default", 16, [node("LeakyRelu")], {}),
    ("prelu", 9, [node("PRelu", "x w")], {"w": draw(4, 1, 1)}),
    ("sigmoid", 7, [node("Sigmoid")], {}),
    ("tanh", 13, [node("Tanh")], {}),
    ("clip attributes", 7, [node("Clip", min=-0.5, max=0.25)], {}),
    ("clip without limits", 7, [node("Clip", min=0.0, max=float(np.finfo(np.float32).max))], {}),
    ("clip inputs", 11, [node("Clip", "x l h")], {"l": np.float32(0.2), "h": np.float32(0.7)}),
    ("clip above only", 13, [node("Clip", "x - h")], {"h": np.float32(0.5)}),
    ("add constant", 7, [node("Add", "c x")], {"c": draw(1, 4, 1, 1)}),
    ("add two", 14, [node("Relu", "x", "z"), node("Add", "x z")], {}),
    ("sum", 8, [node("Relu", "x", "z"), node("Sum", "x c z z")], {"c": draw(7)}),
    ("sub constant", 7, [node("Sub", "x c")], {"c": draw(*IMAGE)}),
    ("sub from constant", 7, [node("Sub", "c x")], {"c": draw(4, 1, 1)}),
    ("sub two", 7, [node("Relu", "x", "z"), node("Sub", "z x")], {}),
    ("mul", 13, [node("Mul", "c x")], {"c": draw(6, 7)}),
    ("div", 7, [node("Div", "x c")], {"c": np.exp(draw(4, 1, 1))}),
    ("neg", 6 + 1, [node("Neg")], {}),
    ("max pool", 7, [node("MaxPool", **POOL)], {}),
    ("max pool padded", 12, [node("Relu", "x", "z"), node("MaxPool", "z", pads=[1, 1, 1, 1], **POOL)], {}),
    ("max pool over the edge", 12, [node("Sub", "x c", "z"), node("MaxPool", "z", pads=[1, 0, 0, 1], **POOL)],
     {"c": np.float32(9.0)}),
    ("max pool uneven", 12, [node("Relu", "x", "z"), node("MaxPool", "z", pads=[0, 1, 2, 0], **POOL)], {}),
    ("max pool up, evenly", 10, [node("MaxPool", kernel_shape=[2, 3], strides=[2, 2], ceil_mode=1)], {}),
    ("average pool", 7, [node("AveragePool", **POOL)], {}),
    ("average pool padded", 11, [node("AveragePool", pads=[1, 0, 1, 1], count_include_pad=1, **POOL)], {}),
    ("global average pool", 7, [node("GlobalAveragePool")], {}),
    ("mean attribute", 11, [node("ReduceMean", axes=[2, 3], keepdims=0)], {}),
    ("mean input", 18, [node("ReduceMean", "x a")], {"a": ints(-1, -2)}),
    ("flatten", 7, [node("Flatten", axis=1)], {}),
    ("flatten all", 13, [node("Flatten", axis=0)], {}),
    ("reshape", 7, [node("Reshape", "x a")], {"a": ints(0, 2, -1, 7)}),
    ("reshape batch open", 14, [node("Reshape", "x a")], {"a": ints(-1, 24, 7)}),
    ("squeeze attribute", 11, [node("GlobalAveragePool", "x", "z"), node("Squeeze", "z", axes=[2, 3])], {}),
    ("squeeze input", 13, [node("GlobalAveragePool", "x", "z"), node("Squeeze", "z a")], {"a": ints(-1)}),
    ("unsqueeze attribute", 11, [node("Unsqueeze", axes=[1, 5])], {}),
    ("unsqueeze input", 13, [node("Unsqueeze", "x a")], {"a": ints(-1, 2)}),
    ("transpose", 7, [node("Transpose", perm=[0, 3, 1, 2])], {}),
    ("concat", 7, [node("Relu", "x", "z"), node("Concat", "x z x", axis=-2)], {}),
    ("split attribute", 11, [node("Split", "x", "p q", axis=1, split=[1, 3]), node("Concat", "q p", axis=1)], {}),
    ("split evenly", 7, [node("Split", "x", "p q", axis=2), node("Sub", "p q")], {}),
    ("split input", 13, [node("Split", "x a", "p q", axis=-1), node("Concat", "q p", axis=-1)], {"a": ints(5, 2)}),
    ("split in number", 18, [node("Split", "x", "p q r", axis=3, num_outputs=3), node("Concat", "r q p", axis=3)], {}),
    ("slice attributes", 7, [node("Slice", axes=[1, 3], starts=[1, -3], ends=[LONG, -1])], {}),
    ("slice inputs", 10, [node("Slice", "x a b c d")],
     {"a": ints(0, 1), "b": ints(LONG, 6), "c": ints(0, -1), "d": ints(1, 2)}),
    ("slice without axes", 13, [node("Slice", "x a b")], {"a": ints(0, 1), "b": ints(1, 3)}),
    ("pad attribute", 7, [node("Pad", pads=[0, 0, 1, 2, 0, 0, 3, 0])], {}),
    ("pad input", 11, [node("Pad", "x a")], {"a": ints(0, 0, 1, 0, 0, 0, 0, 2)}),
    ("pad axes", 18, [node("Pad", "x a - c")], {"a": ints(1, 2, 3, 0), "c": ints(-1, 2)}),
    ("identity", 7, [node("Identity")], {}),
    ("dropout", 7, [node("Dropout", ratio=0.5)], {}),
    ("dropout new", 13, [node("Dropout", "x r")], {"r": np.float32(0.5)}),
    ("cast", 13, [node("Cast", "x", "z", to=TensorProto.DOUBLE), node("Cast", "z", to=TensorProto.FLOAT)], {}),
]  # fmt: skip


@pytest.mark.parametrize(("opset", "nodes", "constants"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_operators(tmp_path: Path, opset: int, nodes: list[Any], constants: dict[str, Any]) -> None:
    reads(save(tmp_path / "model.onnx", [*nodes, *FLAT], constants, opset=opset))


@pytest.mark.parametrize("opset", [7, 13, NEWEST])
@pytest.mark.parametrize(
    ("nodes", "constants"),
    [
        ([node("Gemm", "x w b", "logits", transB=1, alpha=0.5, beta=3.0)], {"w": draw(3, 5), "b": draw(3)}),
        ([node("Gemm", "x w b", "logits")], {"w": draw(5, 3), "b": draw(1, 3)}),
        ([node("MatMul", "x w", "z"), node("Add", "z b", "logits")], {"w": draw(5, 3), "b": draw(3)}),
    ],
)
def test_products_are_linear_layers(tmp_path: Path, opset: int, nodes: list[Any], constants: dict[str, Any]) -> None:
    network = reads(save(tmp_path / "model.onnx", nodes, constants, (5,), batch="n", opset=opset))
    assert [type(it) for it in network.layers[1:]] == [Linear] and network.dtype == torch.float64


def test_all_operators_are_tested() -> None:
    tested = {it.op_type for _, _, nodes, _ in CASES for it in nodes}
    assert tested == set(OPERATORS) - {"Gemm", "MatMul"}


def test_batchnorm_goes_into_the_convolution(tmp_path: Path) -> None:
    nodes, constants = next(case[2:] for case in CASES if case[0] == "conv then batchnorm")
    network = reads(save(tmp_path / "model.onnx", [*nodes, *FLAT], constants))
    assert isinstance(network.layers[1], Convolution) and len(network.layers) == 3


sides = st.tuples(*[st.integers(1, 3)] * 2)


@settings(max_examples=40, deadline=None)
@given(
    kernel=sides,
    stride=sides,
    dilation=st.tuples(*[st.integers(1, 2)] * 2),
    pads=st.tuples(*[st.integers(0, 2)] * 4),
    mode=st.sampled_from(["NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"]),
    size=st.tuples(*[st.integers(5, 8)] * 2),
)
def test_convolutions(
    tmp_path_factory: pytest.TempPathFactory,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    pads: tuple[int, ...],
    mode: str,
    size: tuple[int, int],
) -> None:
    # onnxruntime has no SAME with dilation.
    assume(dilation == (1, 1) or not mode.startswith("SAME"))
    placed = {"pads": pads} if mode == "NOTSET" else {"auto_pad": mode}
    nodes = [node("Conv", "x w", strides=stride, dilations=dilation, **placed), *FLAT]
    reads(save(tmp_path_factory.mktemp("conv") / "model.onnx", nodes, {"w": draw(2, 3, *kernel)}, (3, *size)))


@settings(max_examples=40, deadline=None)
@given(
    operator=st.sampled_from(["MaxPool", "AveragePool"]),
    kernel=st.tuples(*[st.integers(2, 4)] * 2),
    stride=sides,
    pads=st.tuples(*[st.integers(0, 1)] * 4),
    up=st.booleans(),
)
def test_pooling_is_right_or_refused(
    tmp_path_factory: pytest.TempPathFactory,
    operator: str,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    pads: tuple[int, ...],
    up: bool,
) -> None:
    counted: dict[str, Any] = {"count_include_pad": 1} if operator == "AveragePool" else {}
    pool = node(operator, "z", kernel_shape=kernel, strides=stride, pads=pads, ceil_mode=int(up), **counted)
    path = save(tmp_path_factory.mktemp("pool") / "model.onnx", [node("Relu", "x", "z"), pool, *FLAT], opset=19)
    rests = [(IMAGE[1 + k] + pads[k] + pads[2 + k] - kernel[k]) % stride[k] for k in (0, 1)]
    if up and any(rests):
        with pytest.raises(UserError, match="reach over the edge"):
            read_onnx(path)
    else:
        reads(path)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_slices(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    axis = data.draw(st.integers(1, 3))
    start, stop = (data.draw(st.integers(-9, 9)) for _ in "ab")
    step = data.draw(st.integers(1, 3))
    assume(range(IMAGE[axis - 1])[start:stop:step])
    constants = {
        "a": ints(start),
        "b": ints(stop),
        "c": ints(axis - data.draw(st.sampled_from([0, 4]))),
        "d": ints(step),
    }
    reads(save(tmp_path_factory.mktemp("slice") / "model.onnx", [node("Slice", "x a b c d"), *FLAT], constants))


# What stands around the operators


@pytest.mark.parametrize("batch", [1, "n", None])
@pytest.mark.parametrize("listed", [False, True])
def test_batches_and_weights_among_the_inputs(tmp_path: Path, batch: int | str | None, listed: bool) -> None:
    nodes = [node("Conv", "x w b"), *FLAT]
    assert reads(save(tmp_path / "m.onnx", nodes, WEIGHT, batch=batch, listed=listed, opset=9)).input_shape == IMAGE


@pytest.mark.parametrize("shape", [(784,), (1, 1, 784), (784, 1)])
def test_flat_images(tmp_path: Path, shape: tuple[int, ...]) -> None:
    nodes = [node("Sub", "x c", "z"), node("Flatten", "z", "f"), node("MatMul", "f w", "logits")]
    constants = {"c": draw(1, *shape), "w": draw(784, 3)}
    assert reads(save(tmp_path / "m.onnx", nodes, constants, shape)).input_shape == shape


@pytest.mark.parametrize("batch", [1, "n"])
def test_shapes_that_the_file_computes(tmp_path: Path, batch: int | str) -> None:
    """As torch wrote ``x.view(x.size(0), -1)`` and ``x.view(len(x), x.size(1), x.size(2) * x.size(3))``."""
    nodes = [
        node("Relu", "x", "z"),
        node("Shape", "z", "sizes"),
        node("Constant", "", "first", value=numpy_helper.from_array(ints(0)[0])),
        node("Gather", "sizes first", "n", axis=0),
        node("Unsqueeze", "n", "n1", axes=[0]),
        node("Slice", "sizes", "tail", axes=[0], starts=[2], ends=[4]),
        node("ReduceProd", "tail", "area", axes=[0]),
        node("Slice", "sizes", "channels", axes=[0], starts=[1], ends=[2]),
        node("Concat", "n1 channels area", "wanted", axis=0),
        node("Reshape", "z wanted", "y"),
        node("Constant", "", "rest", value=numpy_helper.from_array(ints(-1))),
        node("Concat", "n1 rest", "flat", axis=0),
        node("Reshape", "y flat", "logits"),
    ]
    reads(save(tmp_path / "m.onnx", nodes, batch=batch, opset=9))


def test_part_of_a_shape(tmp_path: Path) -> None:
    nodes = [
        node("Shape", "x", "c", start=1, end=2),
        node("Concat", "one c rest", "to", axis=0),
        node("Reshape", "x to"),
    ]
    reads(save(tmp_path / "m.onnx", [*nodes, *FLAT], {"one": ints(1), "rest": ints(-1)}, opset=15))


def test_weights_that_the_file_computes(tmp_path: Path) -> None:
    nodes = [node("Transpose", "w", "v"), node("Mul", "v two", "u"), node("MatMul", "x u", "logits")]
    reads(save(tmp_path / "m.onnx", nodes, {"w": draw(3, 5), "two": np.float32(2)}, (5,)))


# Normalisation that the file lacks


@pytest.mark.parametrize(
    ("mean", "std"), [([0.25], [0.5]), ([0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]), ([0.5], None), (None, [0.3])]
)
def test_normalisation_comes_first(tmp_path: Path, mean: list[float] | None, std: list[float] | None) -> None:
    path = save(tmp_path / "m.onnx", [node("Relu"), *FLAT])
    network = read_onnx(path, mean, std)
    assert isinstance(network.layers[1], Scale) and network.layers[1].name == "normalisation"
    images = torch.rand(3, *IMAGE, generator=torch.Generator().manual_seed(1))
    centre, spread = (torch.tensor(it).view(-1, 1, 1) for it in (mean or [0.0], std or [1.0]))
    torch.testing.assert_close(network(images.double()).float(), runtime(path, (images - centre) / spread))


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ([0.1, 0.2], [1.0], "the input's mean must be one number or 4, one a channel; it is [0.1, 0.2]"),
        ([0.1], [], "the input's std must be one number or 4"),
        ([0.1], [float("nan")], "the input's std must be one number or 4"),
        ([0.1], [0.0], "the input's std must be above 0; it is [0.0]"),
    ],
)
def test_normalisation_that_does_not_fit(tmp_path: Path, mean: list[float], std: list[float], message: str) -> None:
    with pytest.raises(UserError) as caught:
        read_onnx(save(tmp_path / "m.onnx", [node("Relu"), *FLAT]), mean, std)
    assert str(caught.value).startswith(message)


def test_colt_network() -> None:
    """The facts that come with the network that COLT's authors released."""
    folder = os.environ.get("REDAN_ORACLES")
    if not folder or not (Path(folder) / "colt_mnist_0.1.onnx").exists():
        pytest.skip("REDAN_ORACLES names no folder with colt_mnist_0.1.onnx")
    data = os.environ.get("REDAN_DATA")
    if not data or locate("mnist", Path(data)) is None:
        pytest.skip("REDAN_DATA names no folder with mnist")
    network = read_onnx(Path(folder) / "colt_mnist_0.1.onnx", [0.1307], [0.3081])
    test = load_dataset("mnist", Path(data), download=False).test
    logits = network(test.images[:100].double() / 255)
    expected = "-20.66489 -6.57562 -13.46938 -4.54414 -10.01449 -18.80003 -29.69103 14.01918 -14.61571 -7.87934"
    torch.testing.assert_close(
        logits[0], torch.tensor([*map(float, expected.split())], dtype=torch.float64), rtol=0, atol=1e-4
    )
    assert (logits.argmax(1) == test.labels[:100]).all()


# Written and read back


class Branches(nn.Module):
    """What the plain networks lack: pooling, leaky ReLU, tanh, concatenation, split, padding, other orders of axes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.second = nn.Conv2d(3, 4, 2, dilation=2)
        self.last = nn.Linear(7 * 5 * 5, 4)

    def forward(self, x: Tensor) -> Tensor:
        left, right = F.max_pool2d(self.first(x).relu(), 3, stride=2, padding=1).split(3, 1)
        right = F.leaky_relu(self.second(F.pad(right, (1, 1, 0, 2))), 0.2).tanh()
        joined = torch.cat([left, right[:, :, ::1]], 1).permute(0, 2, 3, 1) * torch.linspace(-1, 1, 7)
        padded = F.pad(joined.permute(0, 3, 1, 2), (0, 1, 1, 0))
        return self.last((padded[:, :, 0:5] - 0.5).flatten(1))


def networks() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    facts: dict[str, Any] = {"in_channels": 3, "size": 8, "classes": 4}
    norm = Normalise([0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
    return {
        "convmed": build_model("convmed", norm, w1=1, w2=1, hidden=10, **facts),
        "resnet18": build_model("resnet18", norm, width=4, **facts),
        "wide-resnet": build_model("wide-resnet", norm, depth=10, width=1, **facts),
        "branches": Branches(),
    }


@pytest.mark.parametrize("name", networks())
def test_round_trip(tmp_path: Path, name: str) -> None:
    model = networks()[name].eval()
    for it in model.modules():
        if isinstance(it, nn.BatchNorm2d):  # statistics as of training, rather than none
            it.running_mean = torch.rand(it.num_features) - 0.5
            it.running_var = torch.rand(it.num_features) + 0.5
    graph = read_network(model, (3, 8, 8))
    write_onnx(graph, tmp_path / "model.onnx")
    written = onnx.load(str(tmp_path / "model.onnx"))
    onnx.checker.check_model(written, full_check=True)
    assert written.graph.input[0].name == "images" and written.graph.output[0].name == "logits"
    images = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(images)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    of_batch = torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
    torch.testing.assert_close(of_batch, logits, rtol=1e-4, atol=1e-5)
    again = read_onnx(tmp_path / "model.onnx")
    assert [type(it) for it in again.layers] == [type(it) for it in graph.layers]
    torch.testing.assert_close(again(images.double()), graph(images.double()), rtol=1e-5, atol=1e-6)


def test_float32_weights_come_back_as_they_were(tmp_path: Path) -> None:
    graph = read_network(nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4)), (3, 8, 8))
    write_onnx(graph, tmp_path / "model.onnx")
    images = torch.rand(5, 3, 8, 8, dtype=torch.float64)
    assert torch.equal(read_onnx(tmp_path / "model.onnx")(images), graph(images))


def test_writing_into_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        write_onnx(read_onnx(save(tmp_path / "m.onnx", [node("Relu"), *FLAT])), tmp_path / "file" / "model.onnx")


# What cannot be read


@pytest.mark.parametrize(
    ("nodes", "constants", "message"),
    [
        ([node("Mul", "x x")], {}, "a weight, factor or divisor that depends on the images"),
        ([node("Div", "c x")], {"c": draw(7)}, "a weight, factor or divisor that depends on the images"),
        ([node("MaxPool", kernel_shape=[2, 2], dilations=[2, 2])], {}, "pooling with dilation"),
        ([node("AveragePool", kernel_shape=[2, 2], pads=[1, 1, 0, 0])], {}, "average pooling that leaves the padding"),
        ([node("Pad", "x a v")], {"a": ints(*[1] * 8), "v": np.float32(1)}, "padding with anything but zeros"),
        ([node("Pad", "x a")], {"a": ints(*[0, 1] * 4)}, "only height and width can be padded"),
        ([node("Pad", "x a", mode="reflect")], {"a": ints(0, 0, 1, 1, 0, 0, 1, 1)}, "padding with anything but zeros"),
        ([node("Reshape", "x a")], {"a": ints(2, -1)}, "an image's numbers would go to the shape (2, 84), not"),
        ([node("Transpose", perm=[1, 0, 2, 3])], {}, "a permutation that moves the batch"),
        ([node("Concat", "x x", axis=0)], {}, "it mixes or takes apart the images of a batch"),
        ([node("Concat", "x c", axis=1)], {"c": draw(1, *IMAGE)}, "a concatenation with a constant"),
        ([node("Slice", "x a b c d")], {"a": ints(5), "b": ints(0), "c": ints(2), "d": ints(-1)}, "a slice that runs"),
        ([node("ReduceMean", axes=[1])], {}, "a mean is known over height and width only"),
        ([node("Dropout", "x r t")], {"r": np.float32(0), "t": np.array(True)}, "dropout that drops"),
        ([node("Cast", "x", "z", "y", to=10), node("Cast", "z", to=1)], {}, "a cast to anything but float32 and"),
    ],
)  # fmt: skip
def test_refusals(tmp_path: Path, nodes: list[Any], constants: dict[str, Any], message: str) -> None:
    path = save(tmp_path / "m.onnx", [*nodes, *FLAT], constants)
    with pytest.raises(UserError) as caught:
        read_onnx(path)
    assert str(caught.value).startswith(f"layer 'y' cannot be certified: {message}") and "\n" not in str(caught.value)


def test_refusals_name_the_node(tmp_path: Path) -> None:
    known = r"layer 'gate' cannot be certified: .* operator 'Erf' \(it knows: Add, AveragePool, .*, Unsqueeze\)$"
    with pytest.raises(UserError, match=known):
        read_onnx(save(tmp_path / "m.onnx", [node("Erf", name="gate"), *FLAT]))


def test_what_draws_is_seen(tmp_path: Path) -> None:
    nodes = [node("RandomNormalLike", "c", "r"), node("Add", "x r"), *FLAT]
    with pytest.raises(UserError, match="was not read right"):
        read_onnx(save(tmp_path / "m.onnx", nodes, {"c": draw(*IMAGE)}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 3}, "shape (3, 4, 6, 7)"),
        ({"shape": ()}, "shape (1)"),
        ({"shape": (4, "high", 7)}, "shape (1, 4, high, 7)"),
        ({"output": "c"}, "the network's logits do not depend on the images"),
        ({"output": "y"}, "the network's output has the shape (4, 6, 7)"),
    ],
)
def test_models_that_do_not_fit(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        read_onnx(save(tmp_path / "m.onnx", [node("Relu"), node("Relu", "d", "c"), *FLAT], {"d": draw(3)}, **options))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_two_inputs(tmp_path: Path) -> None:
    model = onnx.load(str(save(tmp_path / "m.onnx", [node("Relu"), *FLAT])))
    model.graph.input.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [1, 2]))
    onnx.save(model, str(tmp_path / "m.onnx"))
    with pytest.raises(UserError, match="has 2 inputs and 1 outputs; a network of one each is needed"):
        read_onnx(tmp_path / "m.onnx")


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no .*none.onnx$"):
        read_onnx(tmp_path / "none.onnx")
    whole = save(tmp_path / "m.onnx", [node("Conv", "x w b"), *FLAT], WEIGHT).read_bytes()
    for content in (b"", b"not a network\n", whole[: len(whole) // 2], whole[:-3], b"\0" * 100):
        (tmp_path / "damaged.onnx").write_bytes(content)
        with pytest.raises(UserError) as caught:
            read_onnx(tmp_path / "damaged.onnx")
        assert "damaged.onnx" in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_contradict_themselves(tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx", [node("Conv", "x w"), *FLAT], {"w": draw(2, 5, 3, 3)})
    with pytest.raises(UserError, match="is damaged, or nothing that onnxruntime can run"):
        read_onnx(path)
