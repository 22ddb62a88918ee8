"""The process on its machine: where its memory comes from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

ADDRESSES = """
import numpy as np
from autograd.cpu.process import keep_memory

keep_memory()
keep_memory()
arrays = [np.ones(2**18, np.float32) for _ in range(64)]  # of 1 MB: NumPy itself asks for large pages from 4 MB on
print(arrays[-1].ctypes.data)
print(open("/proc/self/smaps").read())
"""


def flags_at(address: int, smaps: str) -> list[str]:
    """What /proc/self/smaps says of the pages at an address."""
    inside = False
    for line in smaps.splitlines():
        words = line.split()
        if "-" in words[0]:
            start, stop = (int(end, 16) for end in words[0].split("-"))
            inside = start <= address < stop
        elif inside and words[0] == "VmFlags:":
            return words[1:]
    raise AssertionError(f"nothing is mapped at {address:#x}")


@pytest.mark.skipif(not LARGE_PAGES.exists() or "[never]" in LARGE_PAGES.read_text(), reason="this system has no large pages")
def test_arrays_of_a_training_lie_in_large_pages():
    done = subprocess.run([sys.executable, "-c", ADDRESSES], capture_output=True, text=True, check=True)
    last, smaps = done.stdout.split("\n", 1)
    assert "hg" in flags_at(int(last), smaps)  # asked for by madvise
