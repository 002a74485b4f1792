"""What a server round costs besides training: in this process, through Flower's simulation engine, and over TLS.

A few samples are trained: client after client in one process and in the engine, by five client processes at once over
the link. What is left of a round's time after the clients' own training (of the slowest, where they train at once) is
similarity, mixing, validation on one user for each client, checkpoints, and all that carries orders and reports. The
first round, which starts engines and loads models, is left out and told beside; and so is what a client would pay if
it were started anew for every message, as Flower does it by itself: libraries, model and data.

    python -m benchmarks.round_overhead [--rounds 5] [CONFIG]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.federation import federation
from benchmarks.measuring import spread, use_all_cores, write_result
from pplr.config_files import load_config
from pplr.runtimes import flower_federation
from pplr.runtimes.launch import train

RUNTIMES = ("in_process", "flower_simulation", "flower")
ROOT = Path(__file__).parent.parent
SAMPLES = 40
SMALL = (
    f"training.samples={SAMPLES}",
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
        self.trained: list[list[float]] = []

    def note(self, line: str) -> None:
        """Pass over a line."""

    @contextmanager
    def task(self, label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        """Pass over a task."""
        yield lambda _: None

    def server_round(self, record: Mapping[str, Any]) -> None:
        """Remember a round."""
        self.ends.append(time.perf_counter())
        self.trained.append([own.get("seconds", 0.0) for own in record["clients"].values()])


def measure(path: Path, runtime: str, rounds: int, folder: Path) -> dict[str, Any]:
    """Train, and return the seconds of each round but the first besides training."""
    cores = len(os.sched_getaffinity(0))
    clock = Clock()
    settings = (
        f"runtime.name={runtime}",
        f"runtime.threads={cores}",
        f"runtime.client_cpus={cores}",  # one client after the other, as in one process
        f"federation.rounds={rounds}",
    )
    if runtime == "flower":
        few = f"training.samples={SAMPLES // 5}"  # of each client, which knows no others
        config = load_config(path, [*SMALL, *settings, few, "data.catalog=all", "runtime.threads=1"])
        folder.mkdir()
        with federation(config, folder) as (enrolled, state):
            clock.began = time.perf_counter()
            flower_federation.train(config, folder / "run", federation=enrolled, state=state, progress=clock)
    else:
        train(load_config(path, [*SMALL, *settings]), folder, progress=clock).close()
    together = max if runtime == "flower" else sum
    walls = [later - earlier for earlier, later in zip(clock.ends, clock.ends[1:], strict=False)]
    rest = [wall - together(trained) for wall, trained in zip(walls, clock.trained[1:], strict=True)]
    return {"seconds": spread(rest), "first_round_ends_after_s": clock.ends[0] - clock.began, "rounds": rest}


def started_anew(path: Path) -> float:
    """Say how long a fresh process takes until a client could train."""
    code = (
        "from pathlib import Path; from pplr.config_files import load_config; from pplr.progress import Silent; "
        "from pplr.runtimes import flower_node; from pplr.runtimes.assembly import Assembly; "
        f"own = Assembly(load_config(Path({str(path)!r}), {list(SMALL)!r}), Silent()); own.federated_client('0')"
    )
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    """Measure both and write ``benchmarks/results/round_overhead.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path, default=ROOT / "configs" / "quickstart.yaml")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=RUNTIMES)
    arguments = parser.parse_args()
    found: dict[str, Any] = {}
    notes = []
    with tempfile.TemporaryDirectory() as name:
        for runtime in arguments.runtimes:
            found[runtime] = measure(arguments.config, runtime, arguments.rounds, Path(name) / runtime)
            own = found[runtime]
            notes.append(
                f"{runtime}: {own['seconds']['median']:.2f} s a round besides training, {own['seconds']['lowest']:.2f} "
                f"to {own['seconds']['highest']:.2f} over {own['seconds']['count']} rounds of five clients; the first "
                f"round ended {own['first_round_ends_after_s']:.1f} s after the start"
            )
            print(notes[-1], flush=True)
    loading = started_anew(arguments.config)
    notes.append(
        f"a client that is started anew for a message: {loading:.1f} s until its libraries, model and data are loaded"
    )
    print(notes[-1], flush=True)
    use_all_cores()  # a run may have set another number
    write_result("round_overhead", {"rows": [], "notes": notes, "runtimes": found, "started_anew_s": loading})


if __name__ == "__main__":
    main()
