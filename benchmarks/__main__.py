"""Run every benchmark, each in a process of its own, then write the summary and ``docs/benchmarks.md``.

``gpu`` needs a GPU, and ``equal_time`` an hour; they run where they are named.
"""

from __future__ import annotations

import subprocess
import sys

from benchmarks.summary import write_summary

BENCHMARKS = (
    "training", "packed", "clients", "bfloat16", "epoch", "network", "network_memory", "wire", "aggregation",
    "round_overhead"
)  # fmt: skip


def main() -> None:
    """Run all, or those that are named."""
    for name in sys.argv[1:] or BENCHMARKS:
        print(f"== {name}", flush=True)
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)
    write_summary()


if __name__ == "__main__":
    main()
