"""Blocks of tens of megabytes, freed and asked for again, come from what the process has."""

import platform
import subprocess
import sys

import pytest

# The share of the pages asked for that the system had to give, once the process has been at it for a while.
ASKED = """
import random, resource, torch
from redan.certification.memory import keep_freed_memory

{}
random.seed(0)
given = asked = 0
for i in range(80):
    size = random.choice([34, 50, 64]) * 2**20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(size // 4)
    if i >= 40:
        given += resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        asked += size / resource.getpagesize()
print(given / asked)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")
@pytest.mark.parametrize(("call", "low", "high"), [("", 0.9, 1.1), ("keep_freed_memory()", 0.0, 0.2)])
def test_large_blocks_come_from_the_system_once(call: str, low: float, high: float) -> None:
    done = subprocess.run([sys.executable, "-c", ASKED.format(call)], capture_output=True, text=True, check=True)
    assert low <= float(done.stdout) <= high
