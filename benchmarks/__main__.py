"""Run every benchmark, each in a process of its own, then write the summary and the pages in ``docs/``.

One that fails does not keep the others from running; what failed is said at the end. ``equal_time`` takes the longest,
an hour. ``gpu`` needs a GPU, and ``first_contact`` installs everything anew; they run where they are named.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence

from benchmarks.performance_page import write_page
from benchmarks.required import BENCHMARKS
from benchmarks.summary import write_summary


def run_all(names: Sequence[str]) -> list[str]:
    """Run benchmarks in their order; return those that failed."""
    failed, begun = [], time.monotonic()
    for number, name in enumerate(names, start=1):
        print(f"== {name} ({number} of {len(names)})", flush=True)
        started = time.monotonic()
        done = subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=False)
        if done.returncode != 0:
            failed.append(f"{name} (exit status {done.returncode})")
        print(f"== {name} took {_minutes(time.monotonic() - started)}", flush=True)
    print(f"== all took {_minutes(time.monotonic() - begun)}", flush=True)
    return failed


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"


def main() -> None:
    """Run all, or those that are named."""
    failed = run_all(sys.argv[1:] or BENCHMARKS)
    write_summary()
    write_page()
    if failed:
        sys.exit(f"error: {len(failed)} failed, and their figures are those of an earlier run: {', '.join(failed)}")


if __name__ == "__main__":
    main()
