"""What the hardware is good for: the precision of the training step, and whether compiling pays."""

import torch

from redan.attacks.search import Precision, has_fast_bfloat16
from redan.recipes.schema import Recipe

# Forward passes of the training attack from which a compiled search copy earns the minute that compiling takes.
WORTH_COMPILING = 50_000


def worth_compiling(recipe: Recipe, steps: int, device: torch.device) -> bool:
    """Whether a run is long enough, on hardware where compiling helps (CUDA, AMX), to compile the search copy."""
    passes = steps * recipe.epochs * (recipe.attack.steps if recipe.method.name != "standard" else 0)
    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return passes >= WORTH_COMPILING and (device.type == "cuda" or (device.type == "cpu" and amx()))


def resolved(precision: Precision, device: torch.device) -> Precision:
    """``auto`` as what the device is good at: bfloat16 where it has it natively, else float32.

    By the hardware alone: a choice that looked at the weights could fall otherwise after a resume.
    """
    if precision != "auto":
        return precision
    return "bfloat16" if has_fast_bfloat16(device) else "float32"
