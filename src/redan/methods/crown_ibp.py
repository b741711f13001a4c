"""CROWN-IBP (Zhang et al., ICLR 2020, arXiv:1906.06316): margins pushed back to the image through interval bounds.

Early on, while boxes are loose, linear bounds of the margins are much tighter than theirs; later, intervals are as good
and regularise better. So training goes from the one to the other.
"""

from typing import Any

import torch
from torch import Tensor

from redan.certification.cauchy import lines
from redan.certification.interval import Box
from redan.certification.network import Affine, Network, Relu
from redan.certification.rows import Rows
from redan.methods.certified import check
from redan.methods.ibp import IBP


class CROWNIBP(IBP):
    """IBP whose margins are ``beta m_crown + (1 - beta) m_ibp``, see ``IBP``.

    Args:
        beta: at r = 0 and at R, moving with r / R.
    """

    def __init__(self, *args: Any, beta: tuple[float, float] = (1.0, 0.0), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check(all(0 <= it <= 1 for it in beta), "two numbers from 0 to 1 as beta", beta)
        self.beta = beta

    def margins(self, graph: Network, boxes: list[Box], labels: Tensor) -> Tensor:
        """See ``IBP.margins``."""
        beta = self.beta[0] + (self.beta[1] - self.beta[0]) * self.share
        margins = super().margins(graph, boxes, labels)
        return beta * linear_margins(graph, boxes, labels) + (1 - beta) * margins if beta else margins


def linear_margins(graph: Network, boxes: list[Box], labels: Tensor) -> Tensor:
    """Lower bounds of ``z_y - z_j``, ``(n, classes)``, by CROWN's backward pass through the boxes of all layers.

    Without the slacks for rounding of ``Crown``, and with gradients that are finite where a box is a point.

    Args:
        graph: a chain: each layer takes the one before it.
        boxes: of every layer.
        labels: ``(n,)`` int64.
    """
    n, classes = len(labels), graph.classes
    identity = torch.eye(classes, device=labels.device)
    values = (identity[labels][:, None] - identity).flatten(0, 1)
    rows = Rows(values, torch.arange(n, device=labels.device).repeat_interleave(classes))
    least = values.new_zeros(n, classes)
    for position in range(len(graph.layers) - 1, 0, -1):
        layer = graph.layers[position]
        values = rows.values.unflatten(0, (n, classes))
        if isinstance(layer, Relu):
            lower, upper = boxes[position - 1]
            slope, mu = lines(lower, upper)
            below = torch.where((lower < 0) & (upper > 0), (upper > -lower).to(slope), slope)
            positive, negative = values.clamp(min=0), values.clamp(max=0)
            least = least + 2 * (negative.flatten(2) @ mu.flatten(1)[:, :, None]).squeeze(2)
            rows = rows.with_values((positive * below[:, None] + negative * slope[:, None]).flatten(0, 1))
        else:
            assert isinstance(layer, Affine)
            if layer.bias is not None:
                least = least + values.flatten(2) @ layer.bias.expand(layer.shape).flatten()
            (rows,) = layer.pull(rows)
    lower, upper = (it.flatten(1)[:, :, None] for it in boxes[0])
    values = rows.values.unflatten(0, (n, classes)).flatten(2)
    return least + (values @ (lower + upper) / 2 - values.abs() @ (upper - lower) / 2).squeeze(2)
