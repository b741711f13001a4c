"""Linear functions of a layer's output, one a row, of the windows of the layer that they look at.

A neuron behind a few convolutions sees a window of the image, not all of it. Bounds of all neurons of a layer are
therefore kept as one small window a row, with the place of its corner: memory grows with the windows, not with the
square of the layer.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, eq=False)
class Rows:
    """Coefficients of linear functions, a row each.

    Attributes:
        values: ``(rows, *shape)`` on the whole layer, or ``(rows, channels, kh, kw)`` on windows of it.
        image: which image of the batch (or which sub-problem) a row is about, ``(rows,)`` int64.
        corner: top and left of each window, ``(rows, 2)`` int64; windows may reach over the edge, where coefficients
            mean nothing. None for the whole layer.
    """

    values: Tensor
    image: Tensor
    corner: Tensor | None = None

    def __len__(self) -> int:
        return len(self.values)

    def with_values(self, values: Tensor) -> "Rows":
        """Other coefficients at the same places."""
        return replace(self, values=values)

    def part(self, which: Tensor | slice) -> "Rows":
        """Some of the rows."""
        corner = None if self.corner is None else self.corner[which]
        return Rows(self.values[which], self.image[which], corner)

    def look(self, layer: Tensor) -> Tensor:
        """What each row sees of a layer's tensor ``(n, *shape)``: like ``values``, with zeros over the edge."""
        if self.corner is None and layer.dim() == 4 and layer.is_contiguous(memory_format=torch.channels_last):
            return layer.permute(0, 2, 3, 1).index_select(0, self.image).permute(0, 3, 1, 2)
        if self.corner is None:
            return layer.index_select(0, self.image)
        if not len(self):
            return torch.zeros_like(self.values)
        # Of the images that these rows are about alone: a chunk of rows is about few, and the layer is copied below.
        first, last = (int(it) for it in self.image.aminmax())
        layer, image = layer[first : last + 1], self.image - first
        (kh, kw), (channels, high, wide) = self.values.shape[2:], layer.shape[1:]
        down = self.corner[:, :1] + torch.arange(kh, device=self.corner.device)
        across = self.corner[:, 1:] + torch.arange(kw, device=self.corner.device)
        # Pixel by pixel, all channels of one side by side, and one pixel of zeros for what lies over the edge.
        pixels = torch.cat([layer.permute(0, 2, 3, 1).reshape(-1, channels), layer.new_zeros(1, channels)])
        place = ((image[:, None] * high + down) * wide)[:, :, None] + across[:, None, :]
        inside = ((down >= 0) & (down < high))[:, :, None] & ((across >= 0) & (across < wide))[:, None, :]
        place = torch.where(inside, place, len(pixels) - 1)
        return pixels.index_select(0, place.flatten()).view(len(self), kh, kw, channels).permute(0, 3, 1, 2)

    def inside(self, shape: tuple[int, ...]) -> "Rows":
        """The same rows with zeros over the edge of a layer of that shape."""
        if self.corner is None:
            return self
        (high, wide), (kh, kw) = shape[1:], self.values.shape[2:]
        down = self.corner[:, :1] + torch.arange(kh, device=self.corner.device)
        across = self.corner[:, 1:] + torch.arange(kw, device=self.corner.device)
        rows, columns = (down >= 0) & (down < high), (across >= 0) & (across < wide)
        if bool(rows.all()) and bool(columns.all()):
            return self
        mask = rows[:, None, :, None] & columns[:, None, None, :]
        return self.with_values(self.values * mask)

    def whole(self, shape: tuple[int, ...]) -> "Rows":
        """The same rows on the whole layer of that shape."""
        if self.corner is None:
            return self
        (high, wide), (kh, kw) = shape[1:], self.values.shape[2:]
        canvas = self.values.new_zeros(len(self), shape[0], high + 2 * kh, wide + 2 * kw)
        # A window lies wholly over the edge only if its row is nothing at all there; clamping keeps it off the layer.
        top = (self.corner[:, 0] + kh).clamp(0, high + kh)
        left = (self.corner[:, 1] + kw).clamp(0, wide + kw)
        down = top[:, None] + torch.arange(kh, device=top.device)
        across = left[:, None] + torch.arange(kw, device=left.device)
        index = (down[:, :, None] * canvas.shape[3] + across[:, None, :]).flatten(1)
        flat = canvas.flatten(2).scatter(2, index[:, None].expand(-1, shape[0], -1), self.values.flatten(2))
        return Rows(flat.view_as(canvas)[:, :, kh : kh + high, kw : kw + wide], self.image)

    def bounded(self, shape: tuple[int, ...]) -> "Rows":
        """The whole layer instead of windows that are no smaller than it."""
        if self.corner is None or self.values.shape[2] * self.values.shape[3] < shape[1] * shape[2]:
            return self
        return self.whole(shape)


def side_by_side(values: Tensor) -> Tensor:
    """A copy of images ``(n, c, h, w)`` with all channels of a pixel side by side in memory; anything else as it is.

    Convolutions leave rows so, and a product of tensors that lie otherwise takes ten times as long.
    """
    return values.contiguous(memory_format=torch.channels_last) if values.dim() == 4 else values


def total(values: Tensor) -> Tensor:
    """The sum of each row's numbers, ``(rows, ...)`` to ``(rows,)`` in float64, in whatever memory format."""
    return values.sum(tuple(range(1, values.dim())), dtype=torch.float64)


def total_above(values: Tensor) -> Tensor:
    """What each row's numbers, all at least 0, sum up to at most; several times faster in float32 than ``total``.

    Over channels the sum is in the numbers' own type. Nothing cancels, so that n roundings make a relative error of no
    more than gamma_n.
    """
    error = values[:1].numel() * torch.finfo(torch.float64).eps
    if values.dim() == 4:
        error += values.shape[1] * torch.finfo(values.dtype).eps
        values = values.sum(1)
    return total(values) * (1 + error)


def add(a: Rows, b: Rows, shape: tuple[int, ...]) -> Rows:
    """The sum of two sets of rows about the same images, on a layer of that shape."""
    if a.corner is None or b.corner is None:
        return Rows(a.whole(shape).values + b.whole(shape).values, a.image)
    offsets = b.corner - a.corner
    if bool((offsets != offsets[:1]).any()):  # the branches came by different strides
        return Rows(a.whole(shape).values + b.whole(shape).values, a.image)
    offset = offsets[0].tolist() if len(a) else [0, 0]
    low = [min(0, it) for it in offset]
    sizes = [max(a.values.shape[2 + axis], offset[axis] + b.values.shape[2 + axis]) - low[axis] for axis in (0, 1)]

    def place(rows: Rows, at: list[int]) -> Tensor:
        before = [at[axis] - low[axis] for axis in (0, 1)]
        after = [sizes[axis] - before[axis] - rows.values.shape[2 + axis] for axis in (0, 1)]
        return F.pad(rows.values, (before[1], after[1], before[0], after[0]))

    corner = a.corner + torch.tensor(low).to(a.corner)
    return Rows(place(a, [0, 0]) + place(b, offset), a.image, corner).bounded(shape)
