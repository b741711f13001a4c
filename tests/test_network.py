"""Networks read as graphs of layers: they compute what the modules do; layers are the linear maps they say they are."""

import copy
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from redan.certification.building import Builder
from redan.certification.network import Affine, Convolution, Linear, Network, Relu, Scale
from redan.certification.reading import read_network
from redan.certification.rows import Rows, add, total_above
from redan.errors import UserError
from tests.certification_cases import NETWORKS, draws


class Function(nn.Module):
    """A function of the image and a convolution of it, as a module; flattened."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.convolution = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x - 0.5, self.convolution(x)).flatten(1)


class Residual(nn.Module):
    """BatchNorm before and behind convolutions, in-place sums, a shortcut that is cut and padded."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.behind = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.first, self.second = nn.Conv2d(4, 4, 3, 2, 1, bias=False), nn.Conv2d(4, 4, 3, 1, 1)
        self.last = nn.Linear(36, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.behind(self.first(F.relu(self.before(x))))
        y += x[:, :, ::2, ::2]
        y = F.relu(y) + self.second(F.relu(y, inplace=True))
        return self.last(F.adaptive_avg_pool2d(y, 3).flatten(1))


def warm(model: nn.Module) -> nn.Module:
    """Statistics and weights of BatchNorm that are no identity."""
    normal = draws(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for parameter in module.parameters():
                parameter.data = normal(*parameter.shape).float()
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.copy_(normal(*module.running_mean.shape))
            module.running_var.copy_(normal(*module.running_var.shape).square() + 0.1)
    return model


MODULES: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(144, 7), nn.ReLU(), nn.Linear(7, 5, bias=False), nn.ReLU()),
    "mlp with norm": lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(144), nn.Linear(144, 5), nn.BatchNorm1d(5)),
    "strides": lambda: nn.Sequential(nn.Conv2d(4, 3, (3, 2), (2, 3), (1, 2)), nn.ReLU(), nn.Flatten()),
    "dilation": lambda: nn.Sequential(nn.Conv2d(4, 6, 3, padding=2, dilation=(1, 2), groups=2), nn.Flatten()),
    "norms": lambda: nn.Sequential(
        nn.BatchNorm2d(4), nn.Conv2d(4, 3, 2, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3), nn.Flatten()
    ),
    "norm without weights": lambda: nn.Sequential(nn.BatchNorm2d(4, affine=False), nn.Dropout(0.5), nn.Flatten()),
    "residual": Residual,
    "max pooling": lambda: Function(lambda x, y: F.max_pool2d(y, (3, 2), (2, 1))),
    "max pooling over the edge": lambda: Function(lambda x, y: F.max_pool2d(y - 9, (3, 4), 2, (1, 2))),
    "same padding": lambda: nn.Sequential(
        nn.Conv2d(4, 3, (2, 3), padding="same", dilation=(1, 2)), nn.Conv2d(3, 2, 2, padding="valid"), nn.Flatten()
    ),
    "unflatten": lambda: nn.Sequential(
        nn.Flatten(), nn.Unflatten(1, (4, -1)), nn.Unflatten(-1, (9, 4)), nn.Flatten(), nn.Linear(144, 3)
    ),
    "padded max pooling": lambda: Function(lambda x, y: F.max_pool2d(F.relu(y), 3, 2, 1)),
    "average pooling": lambda: Function(lambda x, y: F.avg_pool2d(y, 3, (2, 1), 1)),
    "adaptive pooling": lambda: Function(lambda x, y: F.adaptive_avg_pool2d(y, (3, 2))),
    "means": lambda: Function(lambda x, y: y.mean((-1, -2)) + x.mean((2, 3), keepdim=True).flatten(1)),
    "leaky": lambda: Function(lambda x, y: F.leaky_relu(y, 0.2) + F.leaky_relu(x)),
    "curves": lambda: Function(lambda x, y: torch.sigmoid(y) + F.relu(x).sigmoid() - torch.tanh(4 * y - 1) * 0.5),
    "clamps": lambda: Function(
        lambda x, y: F.relu6(12 * y) + F.hardtanh(x, -0.25, 0.25) + y.clamp(min=0) + x.clamp(max=0.125) + x.clamp(0, 1)
    ),
    "cat": lambda: Function(lambda x, y: torch.cat([x, F.relu(y[:, :2]), -y], 1)),
    "split": lambda: Function(lambda x, y: torch.cat([*x.split([1, 3], 1)[::-1], *y.split(3, 1), *x.chunk(3, 1)], 1)),
    "slices": lambda: Function(lambda x, y: x[:, 1:3, ::2, -3:]),
    "pad": lambda: Function(lambda x, y: F.pad(y, (1, 0, 2, 3)) * 2 - F.pad(x, (0, 1, 4, 1))),
    "shuffle": lambda: Function(lambda x, y: y.view(len(y), 2, 2, 6, 6).transpose(1, 2).reshape(len(y), -1, 6, 6)),
    "permute": lambda: Function(lambda x, y: y.permute(0, 2, 3, 1).contiguous()),
    "axes": lambda: Function(lambda x, y: y[:, :, :1].squeeze(2).unsqueeze(-1).transpose(1, -2)),
    "arithmetic": lambda: Function(
        lambda x, y: 2 * x - y / 4 + torch.add(x, y, alpha=3) - 1 + torch.sub(y, x, alpha=0.5) + (-x + 0.25)
    ),
    "constants": lambda: Function(
        lambda x, y: x * torch.arange(4.0).view(4, 1, 1) + torch.arange(36.0).view(6, 6) / 36
    ),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", MODULES)
def test_graph_computes_what_the_module_does(name: str) -> None:
    torch.manual_seed(0)
    model = warm(MODULES[name]())
    network = read_network(model, (4, 6, 6))
    x = torch.rand(5, 4, 6, 6, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        expected = copy.deepcopy(model).eval().double()(x)
    assert network.dtype == torch.float64 and network.input_shape == (4, 6, 6)
    torch.testing.assert_close(network(x), expected, atol=1e-12, rtol=1e-12)
    for layer, output in zip(network.layers, network.outputs(x), strict=True):
        assert output.shape == (5, *layer.shape)
    single = network.to(torch.float32)
    assert single.dtype == torch.float32 and network.dtype == torch.float64
    torch.testing.assert_close(single(x.float()), expected.float(), atol=1e-4, rtol=1e-4)


def test_network_is_left_as_it_is() -> None:
    model = warm(Residual())
    model.train()
    model.behind.eval()  # type: ignore[union-attr]
    before = copy.deepcopy(model.state_dict())
    generator = torch.get_rng_state()
    read_network(model, (4, 6, 6))
    assert {name for name, module in model.named_modules() if not module.training} == {"behind"}
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(it.grad is None and it.requires_grad for it in model.parameters())
    assert torch.equal(torch.get_rng_state(), generator)


def test_norms_are_folded() -> None:
    model = warm(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten()))
    kinds = [type(it).__name__ for it in read_network(model, (4, 3, 3)).layers]
    assert kinds == ["Input", "Scale", "Convolution", "Relu", "Reshape"]


def test_size_of_a_folded_bias_is_that_of_its_parts() -> None:
    b = Builder((1, 2, 2))
    x = b.convolution(0, torch.ones(1, 1, 2, 2), torch.tensor([3.0]))
    x = b.batch_norm(x, torch.tensor([2.0]), torch.tensor([-5.0]), torch.tensor([0.5]), torch.tensor([0.25]), 0.0)
    layer = b.layers[x]
    assert isinstance(layer, Convolution)
    # 4 (y + 3 - 0.5) - 5
    assert layer.weight.flatten().tolist() == [4.0] * 4
    assert layer.bias.item() == 12.0 - 2.0 - 5.0
    assert layer.bias_size.item() == 12.0 + 2.0 + 5.0


REFUSED: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "erf": (lambda x, y: y.erf(), r"'erf' cannot be certified: redan knows no bounds of 'erf'"),
    "square": (lambda x, y: y * y, "'mul' cannot be certified: a product of two values that depend on the image"),
    "quotient": (lambda x, y: 1 / y, "cannot be certified"),
    "batch": (lambda x, y: y.flip(0), "'flip' cannot be certified"),
    "one image": (lambda x, y: y[:1], "cannot be certified: a choice among the images of a batch"),
    "mixed images": (lambda x, y: y.reshape(-1, 72), "'reshape' cannot be certified: a reshape that mixes images"),
    "moved batch": (
        lambda x, y: y.transpose(0, 1),
        "'transpose' cannot be certified: a permutation that moves the batch",
    ),
    "batch flattened": (lambda x, y: y.flatten()[None], "'flatten' cannot be certified"),
    "mean of all": (
        lambda x, y: y - y.mean(),
        "'mean' cannot be certified: a mean is known over height and width only",
    ),
    "rounded up": (lambda x, y: F.max_pool2d(y, 4, 4, ceil_mode=True), "max pooling with dilation or rounded up"),
    "partial": (lambda x, y: F.avg_pool2d(y, 3, 2, 1, count_include_pad=False), "divides by another number"),
    "uneven": (lambda x, y: F.adaptive_avg_pool2d(y, 4), "adaptive pooling of 6x6 to 4x4 is uneven"),
    "mirror": (lambda x, y: F.pad(y, (1, 1, 1, 1), mode="reflect"), "cannot be certified"),
    "cropped": (lambda x, y: F.pad(y, (-1, 0, 0, 0)), "only images can be padded, by 0 or more"),
    "constant": (lambda x, y: torch.ones(len(x), 3), "logits do not depend on the images"),
    "noise": (lambda x, y: y + torch.rand_like(y), "'rand_like' cannot be certified"),
    "drop": (lambda x, y: F.dropout(y, 0.5, True), "dropout that draws in evaluation mode"),
    "control flow": (lambda x, y: y if y.sum() > 0 else -y, "cannot be read as a graph"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_known_is_refused(name: str) -> None:
    function, message = REFUSED[name]
    with pytest.raises(UserError, match=message) as caught:
        read_network(Function(function), (4, 6, 6))
    assert "\n" not in str(caught.value)


def test_refusal_names_the_module() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(4, 3), nn.Softplus()))
    with pytest.raises(UserError, match=r"layer '1\.1' cannot be certified: redan knows no bounds of 'softplus'"):
        read_network(model, (1, 2, 2))


@pytest.mark.parametrize("shape", [(4, 6, 6), (2, 4)])
def test_logits_are_one_row(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="one row of logits is needed"):
        read_network(nn.ReLU(), shape)


def test_statistics_of_the_batch_are_refused() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten())
    with pytest.raises(
        UserError, match="layer '0' cannot be certified: BatchNorm that computes statistics of its batch"
    ):
        read_network(model, (4, 2, 2))


def test_squeezing_all_axes() -> None:
    network = read_network(Function(lambda x, y: F.adaptive_avg_pool2d(y, 1).squeeze()), (4, 6, 6))
    assert network.classes == 4


def layers_of_all_kinds() -> dict[str, Network]:
    """Each layer last in a network; its inputs have the input's shape or are parts of it."""
    normal = draws(0)
    networks = {}

    def keep(name: str, shape: tuple[int, ...], make: Callable[[Builder], int]) -> None:
        b = Builder(shape)
        make(b)
        networks[name] = Network(b.layers)

    image = (2, 5, 6)
    keep("linear", (6,), lambda b: b.linear(0, normal(4, 6), normal(4)))
    for name, options in {
        "plain": ((1, 1), (0, 0), (1, 1), 1),
        "strided": ((2, 3), (1, 2), (1, 1), 1),
        "dilated": ((1, 2), (2, 0), (2, 1), 1),
        "grouped": ((2, 1), (0, 1), (1, 2), 2),
        "wide": ((3, 3), (3, 3), (1, 1), 1),
    }.items():
        weight = normal(4, 2 // options[3], 2, 3)
        keep(f"{name} convolution", image, lambda b, w=weight, o=options: b.convolution(0, w, normal(4), *o))  # type: ignore[misc]
    keep("pooling", image, lambda b: b.average_pool(0, (2, 3), (2, 2), (1, 0)))
    keep("scale by channel", image, lambda b: b.scale(0, normal(2, 1, 1), normal(2, 1, 1)))
    keep("scale by pixel", image, lambda b: b.scale(0, normal(2, 5, 6), 1.0))
    keep("scale of features", (6,), lambda b: b.scale(0, normal(6), normal(6)))
    keep("sum", image, lambda b: b.add(0, 0, 0))
    keep("reshape", image, lambda b: b.reshape(0, (3, 4, 5)))
    keep("flat", image, lambda b: b.reshape(0, (60,)))
    keep("permutation", image, lambda b: b.permute(0, (2, 0, 1)))
    keep("slice", image, lambda b: b.slice(0, 1, 1, 5, 2))
    keep("cut channels", image, lambda b: b.slice(0, 0, 1, 2))
    keep("concatenation", image, lambda b: b.concatenate([0, 0], 2))
    keep("padding", image, lambda b: b.pad(0, (1, 0, 2, 3)))
    return networks


LAYERS = layers_of_all_kinds()


@given(
    st.integers(0, 2**32),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from([(300, 2, 2), (7, 9, 9), (500,)]),
)
def test_no_sum_of_nonnegative_numbers_is_rounded_down(seed: int, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    draws = torch.Generator().manual_seed(seed)
    values = torch.rand(2, *shape, generator=draws).to(dtype) * 10.0 ** torch.randint(
        -6, 7, (2, *shape), generator=draws
    )
    for value, row in zip(total_above(values).tolist(), values.flatten(1).tolist(), strict=True):
        exact = sum(map(Fraction, row))
        assert exact <= Fraction(value) <= exact * (1 + Fraction(3000 * torch.finfo(dtype).eps))


def dense_rows(rows: Rows, shape: tuple[int, ...]) -> Tensor:
    """Coefficients on the whole layer, pixel by pixel."""
    if rows.corner is None:
        return rows.values
    out = rows.values.new_zeros(len(rows), *shape)
    for r, (top, left) in enumerate(rows.corner.tolist()):
        for i in range(rows.values.shape[2]):
            for j in range(rows.values.shape[3]):
                if 0 <= top + i < shape[1] and 0 <= left + j < shape[2]:
                    out[r, :, top + i, left + j] = rows.values[r, :, i, j]
    return out


@st.composite
def rows_on(draw: st.DrawFn, shape: tuple[int, ...], images: int) -> Rows:
    """Whole rows, or windows at corners that may lie over the edge, wholly so, too."""
    count = draw(st.integers(1, 5))
    normal = draws(draw(st.integers(0, 2**30)))
    image = torch.randint(images, (count,), generator=torch.Generator().manual_seed(count))
    if len(shape) != 3 or draw(st.booleans()):
        return Rows(normal(count, *shape), image)
    high, wide = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    corners = st.tuples(st.integers(-high - 1, shape[1] + 1), st.integers(-wide - 1, shape[2] + 1))
    corner = torch.tensor(draw(st.lists(corners, min_size=count, max_size=count)))
    return Rows(normal(count, shape[0], high, wide), image, corner)


@pytest.mark.parametrize("name", LAYERS)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=st.data())
def test_pull_is_the_transpose(name: str, data: st.DataObject) -> None:
    layer = LAYERS[name].layers[-1]
    assert isinstance(layer, Affine)
    rows = data.draw(rows_on(layer.shape, 3))
    normal = draws(1)
    shapes = [LAYERS[name].layers[i].shape for i in layer.inputs]
    x = [normal(3, *shape) for shape in shapes]
    expected = (dense_rows(rows, layer.shape) * layer.linear(*x)[rows.image]).flatten(1).sum(1)
    parts = layer.pull(rows.inside(layer.shape))
    assert len(parts) == len(x)
    seen = sum((part.values * part.look(it)).flatten(1).sum(1) for part, it in zip(parts, x, strict=True))
    torch.testing.assert_close(seen, expected, atol=1e-11, rtol=1e-11)
    placed = sum(
        (dense_rows(part, shape) * it[part.image]).flatten(1).sum(1)
        for part, shape, it in zip(parts, shapes, x, strict=True)
    )
    torch.testing.assert_close(placed, expected, atol=1e-11, rtol=1e-11)
    assert all(torch.equal(part.image, rows.image) for part in parts)


@pytest.mark.parametrize("name", LAYERS)
def test_linear_and_absolute_parts(name: str) -> None:
    layer = LAYERS[name].layers[-1]
    assert isinstance(layer, Affine)
    shapes = [LAYERS[name].layers[i].shape for i in layer.inputs]
    normal = draws(2)
    zeros, x = [torch.zeros(4, *s).double() for s in shapes], [normal(4, *s) for s in shapes]
    bias = torch.zeros(1) if layer.bias is None else layer.bias
    torch.testing.assert_close(layer(*zeros), bias.double().expand(4, *layer.shape))
    torch.testing.assert_close(layer(*x), layer.linear(*x) + bias)
    expected = torch.zeros(4, torch.Size(layer.shape).numel()).double()
    for k, shape in enumerate(shapes):
        size = torch.Size(shape).numel()
        units = [torch.eye(size).double().view(size, *shape) if i == k else z[:1] for i, z in enumerate(zeros)]
        units = [it.expand(size, *it.shape[1:]) for it in units]
        expected += x[k].abs().flatten(1) @ layer.linear(*units).flatten(1).abs()
    torch.testing.assert_close(layer.absolute(*(it.abs() for it in x)).flatten(1), expected)
    assert (layer.bias_size is None) == (layer.bias is None)
    if isinstance(layer, Linear | Convolution | Scale):
        assert (layer.bias_size >= layer.bias.abs()).all()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_rows_look_where_they_are(data: st.DataObject) -> None:
    shape = (2, 4, 3)
    rows = data.draw(rows_on(shape, 3))
    layer = draws(5)(3, *shape)
    expected = dense_rows(rows, shape)
    assert torch.equal(rows.whole(shape).values, expected)
    assert torch.equal(dense_rows(rows.inside(shape), shape), expected)
    assert torch.equal(rows.bounded(shape).whole(shape).values, expected)
    seen = (rows.values * rows.look(layer)).flatten(1).sum(1)
    torch.testing.assert_close(seen, (expected * layer[rows.image]).flatten(1).sum(1))
    which = torch.arange(len(rows)).flip(0)
    assert torch.equal(dense_rows(rows.part(which), shape), expected[which])
    inside = rows.inside(shape).values
    torch.testing.assert_close(inside.abs().flatten(1).sum(1), expected.abs().flatten(1).sum(1))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data(), down=st.integers(-3, 3), across=st.integers(-3, 3))
def test_sums_of_rows(data: st.DataObject, down: int, across: int) -> None:
    shape = (2, 4, 5)
    first, second = data.draw(rows_on(shape, 3)), data.draw(rows_on(shape, 3))
    count = min(len(first), len(second))
    first, second = first.part(slice(count)), second.part(slice(count))
    second = Rows(second.values, first.image, second.corner)
    if first.corner is not None and second.corner is not None:
        second = Rows(second.values, first.image, first.corner + torch.tensor([down, across]))
    found = add(first, second, shape)
    torch.testing.assert_close(dense_rows(found, shape), dense_rows(first, shape) + dense_rows(second, shape))


def test_sum_of_rows_whose_strides_differ() -> None:
    image, values = torch.zeros(2, dtype=torch.int64), torch.ones(2, 1, 1, 1).double()
    first, second = (Rows(values, image, torch.tensor([[0, 0], [0, step]])) for step in (1, 2))
    found = add(first, second, (1, 4, 4))
    assert torch.equal(dense_rows(found, (1, 4, 4)), dense_rows(first, (1, 4, 4)) + dense_rows(second, (1, 4, 4)))


@pytest.mark.parametrize("name", NETWORKS)
def test_layers_come_after_what_they_take(name: str) -> None:
    network = NETWORKS[name](0)
    assert network.layers[0].inputs == ()
    assert all(max(layer.inputs) < i for i, layer in enumerate(network.layers) if i)
    assert [isinstance(network.layers[i], Relu) for i in network.relus] == [True] * len(network.relus)
    assert network.classes == 3


def test_what_leads_nowhere_is_left_out() -> None:
    b = Builder((3,))
    x = b.linear(0, torch.eye(3), None)
    b.relu(b.linear(x, torch.ones(5, 3), None))
    network = b.network(b.relu(x))
    assert [type(it).__name__ for it in network.layers] == ["Input", "Linear", "Relu"]
    assert network.layers[2].inputs == (1,)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    low=st.one_of(st.none(), st.floats(-2, 1, width=16)),
    width=st.one_of(st.none(), st.floats(0, 2, width=16)),
    slope=st.floats(-1, 2, width=16),
)
def test_bent_functions_are_their_relus(low: float | None, width: float | None, slope: float) -> None:
    x = torch.linspace(-3, 3, 97).double()[:, None]
    high = width if width is None or low is None else low + width
    b = Builder((1,))
    clamp, leaky = b.clamp(0, low, high), b.leaky_relu(0, slope)
    outputs = Network(b.layers).outputs(x)
    expected = x if low is None and high is None else x.clamp(low, high)
    torch.testing.assert_close(outputs[clamp], expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(outputs[leaky], F.leaky_relu(x, slope), atol=1e-12, rtol=0)
