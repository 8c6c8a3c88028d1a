"""What a process of a run sets before all else."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sim.test_flower import linux

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import resource, sys
from sim.environment import quiet
if "held" in sys.argv: quiet()
import numpy as np
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def model(): return [np.ones(131_072) for _ in range(40)]
model(); before = faults()
for _ in range(10): model()
print(faults() - before)
"""


@linux
@pytest.mark.slow
def test_memory_that_was_freed_is_used_again() -> None:
    """Ten models of 40 tensors of 1 MiB: anew they are 10 * 40 MiB in pages; held, next to none."""
    pages = 10 * 40 * 2**20 / resource.getpagesize()

    def faults(*arguments: str) -> int:
        done = subprocess.run([sys.executable, "-c", CODE, *arguments], capture_output=True, text=True, cwd=ROOT, check=True)
        return int(done.stdout)

    assert faults() > 0.9 * pages
    assert faults("held") < 0.01 * pages
