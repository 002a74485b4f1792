"""What a process says of its memory, and how it hands it back."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pplr.runtimes.memory import peak_rss_bytes, rss_bytes

FREES = """
import sys
import torch
from pplr.runtimes.memory import hand_back_large_blocks, rss_bytes
took = hand_back_large_blocks() if sys.argv[1] == "yes" else None
torch.ones(4 << 20)  # 16 MiB, freed at once: without the call glibc would now keep blocks of up to this size
before = rss_bytes()
blocks = [torch.ones(1 << 20) for _ in range(8)]
above = torch.ones(1 << 16)  # on top of the heap: what lies below cannot be cut off
del blocks
print(took, rss_bytes() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's")
def test_large_blocks_go_back_as_soon_as_they_are_freed():
    kept = {}
    for asked in ("yes", "no"):
        told = subprocess.run([sys.executable, "-c", FREES, asked], capture_output=True, text=True, check=True)
        took, held = told.stdout.split()
        assert took == {"yes": "True", "no": "None"}[asked]
        kept[asked] = int(held)
    assert kept["yes"] < 4 << 20
    assert kept["no"] > 24 << 20  # the control: the test sees what is kept


def test_the_peak_is_no_less_than_what_is_held():
    held, peak = rss_bytes(), peak_rss_bytes()
    assert held is None or (peak is not None and peak >= held > 0)
