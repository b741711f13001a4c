"""Margins as mixed-integer programs (Tjeng et al., ICLR 2019, arXiv:1711.07356), and bounds tightened by linear ones.

The columns are the pixels, in their box, and for each ReLU that may be on or off in the region two: its output ``y`` in
[0, u] and what it cuts off ``n`` in [0, -l], so that ``y - n`` is its input, a linear function of columns before it.
Exactly (big-M, with a binary ``a``), or relaxed to the triangle that is left when ``a`` may be any number in [0, 1]:

    y <= u a,  n <= -l (1 - a)                  y / u + n / -l <= 1

ReLUs that are always on are substituted and those that are always off vanish, as does all that the objective does not
depend on. The exact ones may be few (Balunovic and Vechev, COLT, ICLR 2020): most of the bound for little branching.

Rounding. ``y - n`` is left as much room as the layer's arithmetic may err (``SoundFloat``), and what is computed here;
how far a solver's bound can be trusted beyond that is said in ``solvers``.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import block_array, csr_array, diags_array, vstack
from torch import Tensor

from redan.certification.network import Affine, Convolution, Linear, Network, Relu, Scale
from redan.certification.regions import Region, Specification
from redan.certification.rounding import SoundFloat, relative_error, smallest
from redan.certification.solvers import Program, Solver, Vector, solve
from redan.errors import UserError

Mask = NDArray[np.bool_]
Index = NDArray[np.int64]
LayerBounds = dict[int, tuple[Tensor, Tensor]]


def affine_matrices(network: Network, position: int) -> tuple[list[csr_array], Vector]:
    """An affine layer as sparse matrices on its flattened inputs, and its bias, in float64."""
    layer = network.layers[position]
    assert isinstance(layer, Affine)
    size = int(np.prod(layer.shape))
    bias = np.zeros(size)
    if layer.bias is not None:
        bias = layer.bias.double().cpu().expand(layer.shape).numpy().ravel()
    if isinstance(layer, Linear):
        return [csr_array(layer.weight.double().cpu().numpy())], bias
    if isinstance(layer, Convolution):
        return [_convolution(layer)], bias
    if isinstance(layer, Scale):
        return [diags_array(layer.scale.double().cpu().expand(layer.shape).numpy().ravel()).tocsr()], bias
    # The others only move numbers about: entry k of an input is sent as k + 1, and where it comes out it is known.
    matrices = []
    shapes = [network.layers[i].shape for i in layer.inputs]
    for which, shape in enumerate(shapes):
        sent = [torch.zeros(1, *it, dtype=torch.float64) for it in shapes]
        entries = int(np.prod(shape))
        sent[which] = torch.arange(1, entries + 1, dtype=torch.float64).view(1, *shape)
        came = layer(*sent).flatten().numpy().astype(np.int64)
        row = np.flatnonzero(came)
        matrices.append(csr_array((np.ones(len(row)), (row, came[row] - 1)), shape=(size, entries)))
    return matrices, bias


def _convolution(layer: Convolution) -> csr_array:
    outputs, high, wide = layer.shape
    inputs, height, width = layer.input_shape
    weight = layer.weight.double().cpu().numpy()
    o, i, ky, kx = np.nonzero(weight)
    channel = o // (outputs // layer.groups) * weight.shape[1] + i
    down = np.arange(high) * layer.stride[0] - layer.padding[0] + layer.dilation[0] * ky[:, None]
    across = np.arange(wide) * layer.stride[1] - layer.padding[1] + layer.dilation[1] * kx[:, None]
    inside = ((down >= 0) & (down < height))[:, :, None] & ((across >= 0) & (across < width))[:, None, :]
    k, y, x = np.nonzero(inside)
    row = (o[k] * high + y) * wide + x
    column = (channel[k] * height + down[k, y]) * width + across[k, x]
    values = weight[o[k], i[k], ky[k], kx[k]]
    return csr_array((values, (row, column)), shape=(outputs * high * wide, inputs * height * width))


_MATRICES: WeakKeyDictionary[Network, dict[int, tuple[list[csr_array], Vector]]] = WeakKeyDictionary()


def _matrices(network: Network, position: int) -> tuple[list[csr_array], Vector]:
    """``affine_matrices``, kept for as long as the network lives."""
    known = _MATRICES.setdefault(network, {})
    if position not in known:
        known[position] = affine_matrices(network, position)
    return known[position]


@dataclass(frozen=True, eq=False)
class Binaries:
    """Which of the ReLUs that may be on or off are exact: all, or those of the highest priority.

    Attributes:
        last_layers: only those of the last so many ReLU layers; None for all.
        per_layer: at most so many of each layer; None for all.
        in_all: at most so many of these; None for all.
        priorities: by position of the layer that a ReLU takes, ``(n, *shape)``; the solver is asked to branch on high
            ones first, too. None ranks ReLUs by the height of their triangle, -l u / (u - l), and asks nothing.
    """

    last_layers: int | None = None
    per_layer: int | None = None
    in_all: int | None = None
    priorities: dict[int, Tensor] | None = None


@dataclass(frozen=True, eq=False)
class _Lines:
    """Linear functions of the columns, one a neuron: ``matrix x + offset``, each off by no more than ``error``."""

    matrix: csr_array
    offset: Vector
    error: Vector

    def mass(self, reach: Vector) -> Vector:
        """The terms' absolute values added up, where no column is larger than ``reach``."""
        return abs(self.matrix) @ reach + np.abs(self.offset)


@dataclass(frozen=True, eq=False)
class _Crossing:
    """The ReLUs of one layer that may be on or off: their inputs, bounds of these, and the outputs' columns."""

    inputs: _Lines
    lower: Vector
    upper: Vector
    columns: Index
    priority: Vector


class Encoding:
    """One image's region seen through the network up to one layer, from which the programs of its functions are cut.

    Columns are numbered here with all pixels first, then the outputs of ReLUs that may be on or off.

    Args:
        network: the network.
        region: the regions of which one is encoded; its box, that is.
        layers: by position of each layer that a ReLU takes, its bounds ``(n, *shape)``.
        image: which of the regions.
        target: position of the layer whose functions are asked for; None for the logits.
        wanted: which neurons of that layer, flat; None for all.
        sound: which rounding errors of the network are covered.
        priorities: see ``Binaries``.
    """

    def __init__(
        self,
        network: Network,
        region: Region,
        layers: LayerBounds,
        image: int,
        *,
        target: int | None = None,
        wanted: Mask | None = None,
        sound: SoundFloat = "exact",
        priorities: dict[int, Tensor] | None = None,
    ) -> None:
        self._network = network
        self._sound = sound
        self._bounds = {i: (_flat(lower[image]), _flat(upper[image])) for i, (lower, upper) in layers.items()}
        self._priorities = {i: _flat(values[image]) for i, values in (priorities or {}).items()}
        target = len(network.layers) - 1 if target is None else target
        self._needed = self._look_back(target, wanted)
        box = _flat(region.lower[image]), _flat(region.upper[image])
        crossing = {i: np.flatnonzero(self._crosses(i)) for i in network.relus if i in self._needed}
        tops = [self._bounds[network.layers[i].inputs[0]][1][index] for i, index in crossing.items()]
        self.pixels = len(box[0])
        self.upper = np.concatenate([box[1], *tops])
        self.lower = np.concatenate([box[0], np.zeros(len(self.upper) - self.pixels)])
        self.crossing: list[_Crossing] = []
        self.lines = self._look_forward(target, crossing)

    def program(self, weights: Vector, offset: float, binaries: Binaries) -> tuple[Program, Index]:
        """The least value of ``weights z + offset``, ``z`` the target layer's output.

        Returns:
            The program, and which pixels its first columns are.
        """
        lines = self.lines
        cost = weights @ lines.matrix
        offset = offset + float(weights @ lines.offset) - float(np.abs(weights) @ lines.error)
        kept = cost != 0
        parts: list[tuple[_Crossing, Index]] = []  # with which of its ReLUs are needed
        for layer in reversed(self.crossing):
            which = np.flatnonzero(kept[layer.columns])
            if len(which):
                kept |= (abs(layer.inputs.matrix[which]).sum(0)) > 0
                parts.insert(0, (layer, which))
        columns = np.flatnonzero(kept)
        pixels = columns[columns < self.pixels]
        bounds = (self.lower[columns], self.upper[columns])
        if not parts:
            nothing = np.zeros(0)
            none = csr_array((0, len(columns)))
            whole = np.zeros(len(columns), dtype=bool)
            return Program(cost[columns], offset, none, nothing, nothing, *bounds, whole), pixels

        l = np.concatenate([layer.lower[which] for layer, which in parts])  # noqa: E741
        u = np.concatenate([layer.upper[which] for layer, which in parts])
        rank = np.concatenate([layer.priority[which] for layer, which in parts])
        first = 0 if binaries.last_layers is None else max(0, len(self.crossing) - binaries.last_layers)
        late = self.crossing[first:]
        exact = _choose(rank, [(len(which), layer in late) for layer, which in parts], binaries)
        inputs = vstack([layer.inputs.matrix[which] for layer, which in parts]).tocsr()[:, columns]
        shift = np.concatenate([layer.inputs.offset[which] for layer, which in parts])
        error = np.concatenate([layer.inputs.error[which] for layer, which in parts])
        count, binary = len(u), int(exact.sum())
        outputs = csr_array((np.ones(count), (np.arange(count), np.arange(count) + len(pixels))), shape=inputs.shape)
        e, r = np.flatnonzero(exact), np.flatnonzero(~exact)
        unit = diags_array(np.ones(count)).tocsr()
        matrix = block_array(
            [
                [outputs - inputs, -unit, None],  # y - n = W x + b
                [outputs[e], None, diags_array(-u[e])],  # y <= u a
                [None, unit[e], diags_array(-l[e])],  # n <= -l (1 - a)
                [diags_array(1 / u[r]) @ outputs[r], diags_array(-1 / l[r]) @ unit[r], None],  # y / u + n / -l <= 1
            ]
        ).tocsr()
        row_lower = np.concatenate([shift - error, np.full(2 * len(e) + len(r), -np.inf)])
        row_upper = np.concatenate([shift + error, np.zeros(len(e)), -l[e], np.ones(len(r))])
        priorities = None
        if binaries.priorities is not None:
            priorities = np.zeros(matrix.shape[1], dtype=np.int64)
            priorities[len(columns) + count :] = np.argsort(np.argsort(rank[e]))
        return Program(
            np.concatenate([cost[columns], np.zeros(count + binary)]),
            offset,
            matrix,
            row_lower,
            row_upper,
            np.concatenate([bounds[0], np.zeros(count + binary)]),
            np.concatenate([bounds[1], -l, np.ones(binary)]),
            np.arange(matrix.shape[1]) >= len(columns) + count,
            priorities,
        ), pixels

    def _crosses(self, relu: int) -> Mask:
        lower, upper = self._bounds[self._network.layers[relu].inputs[0]]
        return self._needed[relu] & (lower < 0) & (upper > 0)

    def _look_back(self, target: int, wanted: Mask | None) -> dict[int, Mask]:
        """By position, the neurons that the wanted ones of the target layer depend on."""
        layers = self._network.layers
        needed = {target: np.ones(int(np.prod(layers[target].shape)), dtype=bool) if wanted is None else wanted}
        for position in range(target, 0, -1):
            if position not in needed:
                continue
            layer, here = layers[position], needed[position]
            if isinstance(layer, Relu):
                before = [here & (self._bounds[layer.inputs[0]][1] > 0)]
            else:
                before = [(here.astype(float) @ abs(matrix)) > 0 for matrix in _matrices(self._network, position)[0]]
            for i, mask in zip(layer.inputs, before, strict=True):
                needed[i] = needed[i] | mask if i in needed else mask
        return needed

    def _look_forward(self, target: int, crossing: dict[int, Index]) -> _Lines:
        """The target layer as functions of the columns; collects ``crossing`` on the way."""
        width, reach = len(self.upper), np.maximum(np.abs(self.lower), np.abs(self.upper))
        found: dict[int, _Lines] = {}
        sizes: dict[int, Vector] = {}  # the largest absolute value of each neuron
        free = self.pixels
        for position in sorted(self._needed):
            layer, needed = self._network.layers[position], self._needed[position]
            size = len(needed)
            if isinstance(layer, Relu):
                before = found[layer.inputs[0]]
                lower, upper = self._bounds[layer.inputs[0]]
                index = crossing[position]
                columns = np.arange(free, free + len(index))
                free += len(index)
                rank = self._priorities.get(layer.inputs[0], -lower * upper / np.maximum(upper - lower, 1e-300))
                inputs = _Lines(before.matrix[index], before.offset[index], before.error[index])
                self.crossing.append(_Crossing(inputs, lower[index], upper[index], columns, rank[index]))
                on = (needed & (lower >= 0)).astype(float)
                units = csr_array((np.ones(len(index)), (index, columns)), shape=(size, width))
                matrix = csr_array(diags_array(on) @ before.matrix + units)
                found[position] = _Lines(matrix, on * before.offset, on * before.error)
                sizes[position] = np.maximum(upper, 0)
            elif isinstance(layer, Affine):
                matrices, bias = _matrices(self._network, position)
                rows = diags_array(needed.astype(float))
                parts = [(csr_array(rows @ m), i) for m, i in zip(matrices, layer.inputs, strict=True)]
                bias_size = _spread(layer.bias_size, layer.shape)
                sizes[position] = sum((abs(m) @ sizes[i] for m, i in parts), needed * bias_size)
                # Of the layer, relative to the values it takes; of the products here, to the terms of their lines.
                own = relative_error(layer, torch.float64, self._sound) * sizes[position]
                own = own + needed * smallest(layer, torch.float64, self._sound)
                if self._sound != "off":
                    rounding = relative_error(layer, torch.float64, "exact")
                    own = own + rounding * sum(abs(m) @ found[i].mass(reach) for m, i in parts)
                found[position] = _Lines(
                    csr_array(sum((m @ found[i].matrix for m, i in parts), csr_array((size, width)))),
                    sum((m @ found[i].offset for m, i in parts), needed * bias),
                    sum((abs(m) @ found[i].error for m, i in parts), own),
                )
            else:
                pixels = np.arange(size)
                matrix = csr_array((np.ones(size), (pixels, pixels)), shape=(size, width))
                found[position] = _Lines(matrix, np.zeros(size), np.zeros(size))
                sizes[position] = reach[:size]
        return found[target]


def _flat(values: Tensor) -> Vector:
    return values.detach().double().cpu().numpy().ravel()


def _spread(values: Tensor | None, shape: tuple[int, ...]) -> Vector:
    return np.zeros(int(np.prod(shape))) if values is None else _flat(values.expand(shape))


def _choose(rank: Vector, parts: Sequence[tuple[int, bool]], binaries: Binaries) -> Mask:
    """The exact ones among ReLUs, so many of each layer, of which some may not have any, and so many in all."""
    sizes = [size for size, _ in parts]
    chosen = np.repeat([late for _, late in parts], sizes)
    if binaries.per_layer is not None:
        start = 0
        for size in sizes:
            order = start + np.argsort(-rank[start : start + size], kind="stable")
            chosen[order[binaries.per_layer :]] = False
            start += size
    if binaries.in_all is not None:
        order = np.argsort(-np.where(chosen, rank, -np.inf), kind="stable")
        chosen[order[binaries.in_all :]] = False
    return chosen


def margin_program(
    network: Network,
    region: Region,
    specification: Specification,
    layers: LayerBounds,
    *,
    image: int,
    row: int,
    binaries: Binaries,
    sound: SoundFloat = "exact",
) -> Program:
    """The least value of one function of the specification on one image's box.

    Args:
        network: the network; its weights are taken as they are, the arithmetic is float64.
        region: the images' regions.
        specification: the functions.
        layers: by position of each layer that a ReLU takes, sound bounds ``(n, *shape)``.
        image: which image.
        row: which function.
        binaries: which ReLUs are exact.
        sound: which rounding errors of the network are covered.
    """
    encoding = Encoding(network, region, layers, image, sound=sound, priorities=binaries.priorities)
    weights, offset = _flat(specification.weights[image, row]), float(specification.offsets[image, row])
    return encoding.program(weights, offset, binaries)[0]


@dataclass(frozen=True, eq=False)
class Minima:
    """What is known of an image's functions.

    Attributes:
        rows: which functions were looked at, in this order.
        lower: of each, no value is below, ``(len(rows),)`` float64.
        upper: of each, the least value found, inf where none was; that of the relaxation, unless all ReLUs were exact.
        candidates: of each, the image with that value, ``(*input_shape)`` float64 in the box, or None. It breaks the
            network if the network says so.
    """

    rows: tuple[int, ...]
    lower: Tensor
    upper: Tensor
    candidates: tuple[Tensor | None, ...]


def minimise(
    network: Network,
    region: Region,
    specification: Specification,
    layers: LayerBounds,
    *,
    image: int,
    rows: Sequence[int] | None = None,
    binaries: Binaries | None = None,
    sound: SoundFloat = "exact",
    solver: Solver = "auto",
    timeout: float,
    stop_below: float | None = 0.0,
    stop_above: float | None = 0.0,
    all_rows: bool = False,
    threads: int = 1,
) -> Minima:
    """Bound functions of the specification on one image's box, one after the other.

    Args:
        network: the network; its weights are taken as they are, the arithmetic is float64.
        region: the images' regions, boxes.
        specification: the functions.
        layers: by position of each layer that a ReLU takes, sound bounds ``(n, *shape)``.
        image: which image.
        rows: which functions; None for all.
        binaries: which ReLUs are exact; None for all.
        sound: which rounding errors of the network are covered.
        solver: see ``solvers.solve``.
        timeout: seconds a function.
        stop_below: a function is done once a value below is found; None to go on to the minimum.
        stop_above: a function is done once its bound is above; None to go on to the minimum.
        all_rows: go on after the first function whose bound is not above 0.
        threads: of the solver.

    Raises:
        UserError: where the region is not a box, or the solver is not installed.
    """
    if region.ball is not None:
        raise UserError("a mixed-integer program knows boxes: it can decide Linf threats, not L2 or L1")
    binaries = Binaries() if binaries is None else binaries
    encoding = Encoding(network, region, layers, image, sound=sound, priorities=binaries.priorities)
    lower, upper = region.lower[image].double().cpu(), region.upper[image].double().cpu()
    looked: list[int] = []
    bounds: list[float] = []
    values: list[float] = []
    candidates: list[Tensor | None] = []
    for row in range(specification.offsets.shape[1]) if rows is None else rows:
        weights, offset = _flat(specification.weights[image, row]), float(specification.offsets[image, row])
        program, pixels = encoding.program(weights, offset, binaries)
        found = solve(
            program, solver=solver, timeout=timeout, stop_below=stop_below, stop_above=stop_above, threads=threads
        )
        looked.append(row)
        bounds.append(found.bound)
        values.append(torch.inf if found.value is None else found.value)
        candidate = None
        if found.x is not None:
            candidate = ((lower + upper) / 2).flatten()  # what the function does not depend on
            candidate[torch.from_numpy(pixels)] = torch.from_numpy(found.x[: len(pixels)])
            candidate = candidate.view_as(lower).clamp(lower, upper)
        candidates.append(candidate)
        if found.bound <= 0 and not all_rows:
            break
    kind = torch.float64
    return Minima(tuple(looked), torch.tensor(bounds, dtype=kind), torch.tensor(values, dtype=kind), tuple(candidates))


def lp_refine(
    network: Network,
    region: Region,
    layers: LayerBounds,
    position: int,
    *,
    image: int,
    sound: SoundFloat = "exact",
    solver: Solver = "auto",
    timeout: float = 10.0,
    deadline: float = np.inf,
) -> tuple[Tensor, Tensor]:
    """Tighter bounds of the neurons of a layer that a ReLU takes, where that may be on or off (COLT's LP refinement).

    Each is minimised and maximised over its receptive field, the box and the triangles of the ReLUs before it; only
    one side is looked at where that settles its sign.

    Args:
        network: the network; its weights are taken as they are, the arithmetic is float64.
        region: the images' regions; of balls, the boxes around them.
        layers: by position of each layer that a ReLU takes, sound bounds ``(n, *shape)``.
        position: of the layer to refine.
        image: which image.
        sound: which rounding errors of the network are covered.
        solver: see ``solvers.solve``.
        timeout: seconds a solution; one that takes longer counts with what it came to.
        deadline: of all, by ``time.monotonic``; neurons that are not reached by then keep their bounds.

    Returns:
        Lower and upper bounds ``(*shape)``, in the type of those given, rounded outwards; nowhere looser.
    """
    old = [bound[image] for bound in layers[position]]
    lower, upper = (_flat(bound).copy() for bound in old)
    wanted = (lower < 0) & (upper > 0)
    encoding = Encoding(network, region, layers, image, target=position, wanted=wanted, sound=sound)
    relaxed = Binaries(per_layer=0)
    for neuron in np.flatnonzero(wanted).tolist():
        if time.monotonic() >= deadline:  # the program alone, of which there may be thousands, takes a while
            break
        unit = np.zeros(len(wanted))
        # First the side that may settle the sign; if it does, the ReLU needs no more.
        for sign in (1.0, -1.0) if lower[neuron] + upper[neuron] > 0 else (-1.0, 1.0):
            unit[neuron] = sign
            program, _ = encoding.program(unit, 0.0, relaxed)
            left = min(timeout, deadline - time.monotonic())
            if left <= 0:
                break
            least = solve(program, solver=solver, timeout=left).bound
            if sign > 0 and np.isfinite(least):
                lower[neuron] = max(lower[neuron], least)
            elif np.isfinite(least):
                upper[neuron] = min(upper[neuron], -least)
            if lower[neuron] >= 0 or upper[neuron] <= 0:
                break
    low, high = (torch.from_numpy(it).view(old[0].shape).to(old[0]) for it in (lower, upper))
    low = torch.nextafter(low, torch.full_like(low, -torch.inf))
    high = torch.nextafter(high, torch.full_like(high, torch.inf))
    return torch.maximum(low, old[0]), torch.minimum(high, old[1])
