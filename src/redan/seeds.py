"""Seeds derived from a run's seed and a place in it, so that randomness needs no state to be saved.

The same place gives the same draws, whether a run came there in one go or after a resume.
"""

import hashlib

import torch
from torch import Generator


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any sequence of numbers and words; nearby sequences give unrelated seeds."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: int | str) -> Generator:
    """A CPU generator seeded with ``derive_seed(*parts)``."""
    return torch.Generator().manual_seed(derive_seed(*parts))


def generator_on(device: torch.device, draws: Generator | None) -> Generator | None:
    """What draws on the device: a CPU generator itself there, elsewhere one that its next draw seeds."""
    if draws is None or device.type == "cpu":
        return draws
    return torch.Generator(device).manual_seed(int(torch.randint(2**62, (), generator=draws)))
