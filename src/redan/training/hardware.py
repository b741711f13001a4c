"""What the hardware is good for: the precision of the training step, and whether compiling pays."""

import torch

from redan.attacks.search import has_fast_bfloat16
from redan.recipes.schema import Recipe

# Forward passes of the training attack from which a compiled search copy earns the minute that compiling takes.
WORTH_COMPILING = 50_000


def worth_compiling(recipe: Recipe, steps: int, device: torch.device) -> bool:
    """Whether a run is long enough, on hardware where compiling helps (CUDA, AMX), to compile the search copy."""
    passes = steps * recipe.epochs * (recipe.attack.steps if recipe.method.name != "standard" else 0)
    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return passes >= WORTH_COMPILING and (device.type == "cuda" or (device.type == "cpu" and amx()))


def trains_in_bfloat16(recipe: Recipe, device: torch.device) -> bool:
    """Whether the training step itself runs in mixed bfloat16: by the recipe, or where the device has it natively."""
    return recipe.precision == "bfloat16" or (recipe.precision == "auto" and has_fast_bfloat16(device))
