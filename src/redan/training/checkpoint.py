"""The optimiser's state as plain tensors, so that a checkpoint needs no pickle."""

import torch
from torch import Tensor


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state, one tensor a parameter and quantity."""
    return {
        f"optimizer/{index}/{key}": torch.as_tensor(value)
        for index, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
        if value is not None
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what ``optimizer_tensors`` took, each tensor in the memory layout of its parameter.

    The layout matters: elementwise kernels may round differently on another one, and a resumed run is to be bitwise
    the same.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, value in tensors.items():
        prefix, _, rest = name.partition("/")
        if prefix != "optimizer":
            continue
        index, _, key = rest.partition("/")
        parameter = parameters[int(index)]
        if value.shape == parameter.shape:
            value = torch.empty_like(parameter).copy_(value)
        optimizer.state[parameter][key] = value
