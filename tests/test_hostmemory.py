"""Freed memory stays with the process."""

import subprocess
import sys

import pytest

CHILD = """
import resource, sys
if sys.argv[1] == "keep":
    from qcn_jax.hostmemory import keep_freed_memory
    assert keep_freed_memory()
import numpy as np
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(8 << 20).sum()  # 64 MiB, freed at once
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="settings of glibc")
def test_large_blocks_are_faulted_in_only_once():
    faults = [int(subprocess.run([sys.executable, "-c", CHILD, how], check=True, capture_output=True).stdout)
              for how in ("keep", "default")]
    assert faults[0] < 100 < faults[1]
