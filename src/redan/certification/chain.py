"""A chain of modules as a graph whose tensors are the modules' own, for training: gradients reach them."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from redan.certification.network import Convolution, Input, Layer, Linear, Network, Relu, Reshape, Scale
from redan.errors import UserError
from redan.models.norms import Normalise

KINDS = (Normalise, nn.Conv2d, nn.Linear, nn.ReLU, nn.Flatten)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)

Moments = tuple[Tensor, Tensor]  # mean and variance of each channel, ``(channels,)``


def check_chain(network: nn.Module, *, batch_norm: bool = False) -> nn.Sequential:
    """The network as a chain. Raises: UserError where it is none of those kinds of layers.

    Args:
        network: to look at.
        batch_norm: whether BatchNorm is among them.
    """
    kinds = (*KINDS, *NORMS) if batch_norm else KINDS
    needed = f"a chain of convolutions, linear layers{', BatchNorms' * batch_norm} and ReLUs is needed, such as convmed"
    if not isinstance(network, nn.Sequential):
        raise UserError(f"{needed}; this is a {type(network).__name__}")
    for name, module in network.named_children():
        odd = isinstance(module, nn.Conv2d) and (module.padding_mode != "zeros" or isinstance(module.padding, str))
        odd = odd or (isinstance(module, NORMS) and not (module.affine and module.track_running_stats))
        if odd or not isinstance(module, kinds):
            raise UserError(f"{needed}; layer {name!r} is {module}")
    return network


def observe_chain(network: nn.Sequential, images: Tensor) -> tuple[Tensor, dict[int, Moments]]:
    """Logits of images, and by index of each BatchNorm in training mode the moments that it normalised them with.

    Its running statistics move, as in any pass; gradients go through the moments.
    """
    x, moments = images, {}
    for i, module in enumerate(network.children()):
        if isinstance(module, NORMS) and module.training:
            variance, mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=0)
            moments[i] = (mean, variance)
        x = module(x)
    return x, moments


def read_chain(network: nn.Sequential, shape: tuple[int, ...], moments: Mapping[int, Moments] | None = None) -> Network:
    """The graph of a chain, in float32; the module at index i is the layer at position i + 1.

    Args:
        network: as ``check_chain`` has it.
        shape: of an image, ``(c, h, w)``.
        moments: what a BatchNorm at an index normalises with, where that is not its running statistics.
    """
    layers: list[Layer] = [Input("input", (), shape)]
    for i, (name, module) in enumerate(network.named_children()):
        if isinstance(module, NORMS):
            layers.append(_batch_norm(name, i, layers[-1].shape, module, (moments or {}).get(i)))
        else:
            layers.append(_layer(name, i, layers[-1].shape, module))
    return Network(layers)


def _batch_norm(
    name: str, before: int, shape: tuple[int, ...], module: nn.BatchNorm1d | nn.BatchNorm2d, moments: Moments | None
) -> Layer:
    assert module.running_mean is not None and module.running_var is not None
    mean, variance = (module.running_mean, module.running_var) if moments is None else moments
    scale = module.weight / (variance + module.eps).sqrt()
    scale, shift = (it.view(-1, *(1,) * (len(shape) - 1)) for it in (scale, module.bias - scale * mean))
    return Scale(name, (before,), shape, scale, shift, shift.detach().abs())


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
