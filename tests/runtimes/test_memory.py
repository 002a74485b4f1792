"""What a process says of its memory, and how it hands it back."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pplr.backbones.arithmetic import multiplies_bfloat16
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


SHAPES = """
import sys
import torch
from pplr.runtimes.memory import keep_few_kernels, rss_bytes
if sys.argv[1] == "yes":
    keep_few_kernels()
torch.set_num_threads(1)
weight = torch.ones(64, 64, dtype=torch.bfloat16)

def multiply(rows):
    for count in rows:
        torch.ones(count, 64, dtype=torch.bfloat16) @ weight

multiply(range(100, 300))
before = rss_bytes()
multiply(range(300, 900))
print(rss_bytes() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="read from /proc")
@pytest.mark.skipif(not multiplies_bfloat16(), reason="such products are not compiled here")
def test_products_of_ever_new_shapes_do_not_pile_up():
    environment = {name: value for name, value in os.environ.items() if not name.endswith("CACHE_CAPACITY")}

    def grown(asked: str, **more: str) -> int:
        command, own = [sys.executable, "-c", SHAPES, asked], environment | more
        return int(subprocess.run(command, capture_output=True, text=True, check=True, env=own).stdout)

    piled = grown("no")
    assert piled > 8 << 20  # the control: the test sees what is kept
    assert grown("yes") < piled / 2
    more = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024", "LRU_CACHE_CAPACITY": "1024"}
    assert grown("yes", **more) > 0.7 * piled  # who sets them is not overruled


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
