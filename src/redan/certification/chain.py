"""A chain of modules as a graph whose tensors are the modules' own, for training: gradients reach them."""

import torch
from torch import nn

from redan.certification.network import Convolution, Input, Layer, Linear, Network, Relu, Reshape, Scale
from redan.errors import UserError
from redan.models.norms import Normalise

KINDS = (Normalise, nn.Conv2d, nn.Linear, nn.ReLU, nn.Flatten)


def check_chain(network: nn.Module) -> nn.Sequential:
    """The network as a chain. Raises: UserError where it is none of those kinds of layers."""
    if not isinstance(network, nn.Sequential):
        raise UserError(
            f"a chain of convolutions, linear layers and ReLUs is needed, such as convmed; this is a "
            f"{type(network).__name__}"
        )
    for name, module in network.named_children():
        odd = isinstance(module, nn.Conv2d) and (module.padding_mode != "zeros" or isinstance(module.padding, str))
        if odd or not isinstance(module, KINDS):
            raise UserError(
                f"a chain of convolutions, linear layers and ReLUs is needed, such as convmed; layer {name!r} is "
                f"{module}"
            )
    return network


def read_chain(network: nn.Sequential, shape: tuple[int, ...]) -> Network:
    """The graph of a chain, in float32; the module at index i is the layer at position i + 1.

    Args:
        network: as ``check_chain`` has it.
        shape: of an image, ``(c, h, w)``.
    """
    layers: list[Layer] = [Input("input", (), shape)]
    for i, (name, module) in enumerate(network.named_children()):
        layers.append(_layer(name, i, layers[-1].shape, module))
    return Network(layers)


def _layer(name: str, before: int, shape: tuple[int, ...], module: nn.Module) -> Layer:
    inputs = (before,)
    if isinstance(module, nn.ReLU):
        return Relu(name, inputs, shape)
    if isinstance(module, nn.Flatten):
        return Reshape(name, inputs, (torch.Size(shape).numel(),), input_shape=shape)
    if isinstance(module, Normalise):
        shift = -module.mean[0] / module.std[0]
        return Scale(name, inputs, shape, 1 / module.std[0], shift, shift.abs())
    assert isinstance(module, nn.Conv2d | nn.Linear)
    bias = module.weight.new_zeros(len(module.weight)) if module.bias is None else module.bias
    if isinstance(module, nn.Linear):
        return Linear(name, inputs, (module.out_features,), module.weight, bias, bias.detach().abs())
    padding = (int(module.padding[0]), int(module.padding[1]))
    axes = zip(shape[1:], padding, module.dilation, module.kernel_size, module.stride, strict=True)
    size = tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in axes)
    bias = bias.view(-1, 1, 1)
    return Convolution(
        name,
        inputs,
        (module.out_channels, *size),
        module.weight,
        bias,
        bias.detach().abs(),
        (module.stride[0], module.stride[1]),
        padding,
        (module.dilation[0], module.dilation[1]),
        module.groups,
        input_shape=shape,
    )
