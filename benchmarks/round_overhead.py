"""What a server round costs besides training: in this process, and through Flower's simulation engine.

The same few samples are trained in both, client after client. What is left of a round's time after the clients' own
training is similarity, mixing, validation on one user for each client, checkpoints, and all that carries orders and
reports. The first round, which starts the engine and loads models, is left out and told beside.

    python -m benchmarks.round_overhead [--rounds 5] [CONFIG]
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.measuring import spread, write_result
from pplr.config_files import load_config
from pplr.runtimes.launch import train

ROOT = Path(__file__).parent.parent
SMALL = (
    "training.samples=40",
    "evaluation.validation_users=1",
    "evaluation.validation_metric=loss",
    "evaluation.test_users=10",
    "evaluation.floors=[]",
    "federation.patience=null",
)


class Clock:
    """Progress that remembers when each round ended, and what the clients' training took in it."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.ends: list[float] = []
        self.trained: list[float] = []

    def note(self, line: str) -> None:
        """Pass over a line."""

    @contextmanager
    def task(self, label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        """Pass over a task."""
        yield lambda _: None

    def server_round(self, record: Mapping[str, Any]) -> None:
        """Remember a round."""
        self.ends.append(time.perf_counter())
        self.trained.append(sum(own.get("seconds", 0.0) for own in record["clients"].values()))


def measure(path: Path, runtime: str, rounds: int, folder: Path) -> dict[str, Any]:
    """Train, and return the seconds of each round but the first besides training."""
    cores = len(os.sched_getaffinity(0))
    settings = (
        f"runtime.name={runtime}",
        f"runtime.threads={cores}",
        f"runtime.client_cpus={cores}",  # one client after the other, as in one process
        f"federation.rounds={rounds}",
    )
    clock = Clock()
    train(load_config(path, [*SMALL, *settings]), folder, progress=clock).close()
    walls = [later - earlier for earlier, later in zip(clock.ends, clock.ends[1:], strict=False)]
    rest = [wall - trained for wall, trained in zip(walls, clock.trained[1:], strict=True)]
    return {"seconds": spread(rest), "first_round_ends_after_s": clock.ends[0] - clock.began, "rounds": rest}


def main() -> None:
    """Measure both and write ``benchmarks/results/round_overhead.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path, default=ROOT / "configs" / "quickstart.yaml")
    parser.add_argument("--rounds", type=int, default=6)
    arguments = parser.parse_args()
    found: dict[str, Any] = {}
    notes = []
    with tempfile.TemporaryDirectory() as name:
        for runtime in ("in_process", "flower_simulation"):
            found[runtime] = measure(arguments.config, runtime, arguments.rounds, Path(name) / runtime)
            own = found[runtime]
            notes.append(
                f"{runtime}: {own['seconds']['median']:.2f} s a round besides training, {own['seconds']['lowest']:.2f} "
                f"to {own['seconds']['highest']:.2f} over {own['seconds']['count']} rounds of five clients; the first "
                f"round ended {own['first_round_ends_after_s']:.1f} s after the start"
            )
            print(notes[-1], flush=True)
    write_result("round_overhead", {"rows": [], "notes": notes, "runtimes": found})


if __name__ == "__main__":
    main()
