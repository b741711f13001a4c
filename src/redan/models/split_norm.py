"""Split BatchNorm (Xie et al., CVPR 2020): statistics and affine weights of their own for clean and adversarial images.

A transform of any network, not a network: every BatchNorm2d becomes a pair, everything else is shared.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from torch import Tensor, nn

Branch = Literal["adversarial", "clean"]


class SplitBatchNorm2d(nn.Module):
    """Two BatchNorms in one place; ``branch`` says which of them computes.

    Args:
        norm: the BatchNorm to double; both start as it is.

    Shape: ``(n, c, h, w)`` to the same.
    """

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.adversarial = norm
        self.clean = copy.deepcopy(norm)
        self.branch: Branch = "adversarial"

    @property
    def num_features(self) -> int:
        """Channels."""
        return self.adversarial.num_features

    def forward(self, x: Tensor) -> Tensor:
        normalised: Tensor = self.adversarial(x) if self.branch == "adversarial" else self.clean(x)
        return normalised


def split_batch_norm(network: nn.Module) -> nn.Module:
    """A copy of the network in which every BatchNorm2d is a pair; it computes with the adversarial one."""

    def split(module: nn.Module) -> nn.Module:
        return SplitBatchNorm2d(module) if isinstance(module, nn.BatchNorm2d) else module

    return _rebuilt(copy.deepcopy(network), split)


def merge_batch_norm(network: nn.Module, branch: Branch) -> nn.Module:
    """A copy of the network in which every pair is the BatchNorm of that branch: a plain network again."""

    def merge(module: nn.Module) -> nn.Module:
        chosen: nn.Module = getattr(module, branch) if isinstance(module, SplitBatchNorm2d) else module
        return chosen

    return _rebuilt(copy.deepcopy(network), merge)


def _rebuilt(module: nn.Module, change: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """The module with every descendant, and itself, replaced by what ``change`` makes of it.

    A module that goes by several names is changed once, and goes by all of them again.
    """
    done: dict[nn.Module, nn.Module] = {}

    def rebuilt(module: nn.Module) -> nn.Module:
        if module not in done:
            done[module] = change(module)
            if done[module] is module:
                for name, child in module._modules.items():  # not named_children: that gives each child one name
                    if child is not None:
                        setattr(module, name, rebuilt(child))
        return done[module]

    return rebuilt(module)


@contextmanager
def using_branch(network: nn.Module, branch: Branch) -> Iterator[None]:
    """Let every pair of the network compute with that branch, inside the block."""
    pairs = [module for module in network.modules() if isinstance(module, SplitBatchNorm2d)]
    for pair in pairs:
        pair.branch = branch
    try:
        yield
    finally:
        for pair in pairs:
            pair.branch = "adversarial"
