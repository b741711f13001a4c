"""How much float arithmetic may err, and which errors a certificate is meant to cover.

* ``exact``: the network with its float32 weights in exact arithmetic; redan's own rounding is part of every bound.
* ``network``: besides, every order in which a float32 runtime may add up the products of each layer.
* ``off``: neither, for comparison with tools that ignore both.

Sums may be in any order, with or without fused multiply-add; arithmetic that changes the products themselves (TF32,
Winograd's and Fourier's convolutions) is not covered, and redan's own bounds are computed without it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor

from redan.certification.network import SPARE_ROUNDINGS, Affine
from redan.errors import unknown

SoundFloat = Literal["exact", "network", "off"]


@contextmanager
def full_products() -> Iterator[None]:
    """Products of float32 numbers as such: no TF32 and no bfloat16, whatever the caller has allowed elsewhere."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        # Without cuDNN, which would choose Winograd's convolutions where it finds them faster.
        with torch.backends.cudnn.flags(enabled=False, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def check_sound_float(mode: str) -> None:
    """Raise UserError for a mode that does not exist."""
    if mode not in get_args(SoundFloat):
        raise unknown("mode of --sound-float", mode, get_args(SoundFloat))


def gamma(roundings: int, dtype: torch.dtype) -> float:
    """gamma_n = n u / (1 - n u), the relative error of a sum whose products are rounded n times."""
    error = roundings * torch.finfo(dtype).eps / 2
    return error / (1 - error) if error < 1 else float("inf")


def relative_error(layer: Affine, dtype: torch.dtype, mode: SoundFloat) -> float:
    """By how much of ``|W| |x| + |b|`` the output of a layer that is computed in ``dtype`` may be off, and is to be."""
    if mode == "off":
        return 0.0
    roundings = layer.roundings + SPARE_ROUNDINGS
    own = gamma(roundings, dtype)
    return own if mode == "exact" or not layer.roundings else own + gamma(roundings, torch.float32)


def pulled_error(layer: Affine, dtype: torch.dtype, mode: SoundFloat) -> float:
    """The same for coefficients pushed back through the layer in ``dtype``, too: these are sums over its outputs."""
    if mode == "off":
        return 0.0
    return relative_error(layer, dtype, mode) + gamma(layer.pulled + SPARE_ROUNDINGS, dtype)


def smallest(layer: Affine, dtype: torch.dtype, mode: SoundFloat) -> float:
    """What a layer's output may lose to products too small for float32 or ``dtype``."""
    if mode == "off":
        return 0.0
    lost = torch.finfo(dtype).tiny if mode == "exact" else max(torch.finfo(it).tiny for it in (dtype, torch.float32))
    return layer.roundings * lost


def known(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds with what overflowed (NaN) made infinite: nothing is known there."""
    return lower.nan_to_num(-torch.inf, torch.inf, -torch.inf), upper.nan_to_num(torch.inf, torch.inf, -torch.inf)
