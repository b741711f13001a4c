"""What the hardware is good for: the precision of the training step, and whether compiling pays."""

import os
import shutil

import torch

from redan.attacks.search import Precision, has_fast_bfloat16
from redan.methods.registry import METHODS
from redan.recipes.schema import Recipe

# Forward passes of the training attack from which a compiled search copy earns the minute that compiling takes.
WORTH_COMPILING = 50_000


def worth_compiling(recipe: Recipe, steps: int, device: torch.device) -> bool:
    """Whether a run earns the minute that compiling the attack's search copy takes.

    It does where the run is long, the hardware gains from it (CUDA, AMX; measured elsewhere, it does not) and there is
    a compiler for torch to call.

    Args:
        recipe: of the run.
        steps: an epoch.
        device: that trains.
    """
    if not METHODS[recipe.method.name].attacks or steps * recipe.epochs * recipe.attack.steps < WORTH_COMPILING:
        return False
    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    gains = device.type == "cuda" or (device.type == "cpu" and amx())
    return gains and shutil.which(os.environ.get("CXX", "g++")) is not None


def resolved(precision: Precision, device: torch.device) -> Precision:
    """``auto`` as what the device is good at: bfloat16 where it has it natively, else float32.

    By the hardware alone: a choice that looked at the weights could fall otherwise after a resume.
    """
    if precision != "auto":
        return precision
    return "bfloat16" if has_fast_bfloat16(device) else "float32"
