"""Training alone and beside a busy program, by how long threads that wait for each other spin before they sleep.

Each turn is a process of its own, since how threads wait is settled when torch is loaded: a model of titles takes a few
steps on all cores, by itself and beside a program that keeps one of them busy. ``briefly`` is what the commands of pplr
set, ``by default`` what GNU OpenMP does, ``not at all`` its passive policy.

    python -m benchmarks.shared_cores [--rounds 3] [--steps 2]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from benchmarks.beside import beside
from benchmarks.measuring import spread, write_result
from pplr.apps.command_group import SPINS

WAYS = {"briefly": SPINS, "by default": "300000", "not at all": "0"}
"""Turns of the loop in which a thread of libgomp waits; the second is its own number where none is set."""
SAMPLES = 8
_BUSY = "while True: pass"

Told = dict[tuple[str, str], list[float]]
"""By way and company, samples a second of each turn."""


def take_steps(steps: int) -> float:
    """Train in this process, after a step that warms up: samples a second."""
    from benchmarks.measuring import causal_lm_of, quickstart, real_batch, use_all_cores
    from benchmarks.packed import take_step
    from pplr.stages.cut import CutPlan
    from pplr.stages.model import CutModel

    use_all_cores()
    config = quickstart()
    backbone = causal_lm_of(config)
    batch = backbone.collate(real_batch(config, backbone, SAMPLES))
    model = CutModel(backbone, CutPlan.make(config.cut, backbone.total_layers), config.adapter, config.training)
    client = model.client("one", model.initial_adapter(0))
    client.begin_round(1000)
    take_step(client, batch)
    begun = time.perf_counter()
    for _ in range(steps):
        take_step(client, batch)
    return SAMPLES * steps / (time.perf_counter() - begun)


@contextmanager
def busy_beside(company: str) -> Iterator[subprocess.Popen[bytes] | None]:
    """Keep one core busy meanwhile, if there is to be company."""
    if company == "alone":
        yield None
        return
    other = subprocess.Popen([sys.executable, "-c", _BUSY], start_new_session=True)  # as from another terminal
    try:
        yield other
    finally:
        other.kill()
        other.wait()


def turn(spins: str, company: str, steps: int) -> float:
    """Train in a process of its own that waits so: samples a second."""
    own = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    command = [sys.executable, "-m", "benchmarks.shared_cores", "--child", "--steps", str(steps)]
    with busy_beside(company):
        done = subprocess.run(command, env={**own, "GOMP_SPINCOUNT": spins}, check=True, stdout=subprocess.PIPE)
    return float(json.loads(done.stdout.splitlines()[-1]))


def summed_up(told: Mapping[tuple[str, str], Sequence[float]]) -> dict[str, Any]:
    """Make rows of ratios of medians, and notes with the rates."""
    median = {key: statistics.median(rates) for key, rates in told.items()}
    notes = [
        f"{way}: {median[way, 'alone']:.2f} samples/s alone, {median[way, 'in company']:.2f} beside a busy program"
        for way in WAYS
    ]
    rows = []
    for company, words in (("alone", ""), ("in company", ", beside a program that keeps a core busy")):
        for way, against in (("by default", "libgomp's default"), ("not at all", "threads that sleep at once")):
            ratio = median["briefly", company] / median[way, company]
            rows.append(beside(f"training on all cores, threads spin briefly{words}", against, ratio))
    rates = {f"{way}, {company}": spread(own) for (way, company), own in told.items()}
    return {"samples_per_second": rates, "rows": rows, "notes": notes}


def main() -> None:
    """Measure in turns and write ``shared_cores.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(take_steps(arguments.steps)))
        return
    told: Told = {}
    for _ in range(arguments.rounds):
        for company in ("alone", "in company"):
            for way, spins in WAYS.items():
                rate = turn(spins, company, arguments.steps)
                told.setdefault((way, company), []).append(rate)
                print(f"{way}, {company}: {rate:.2f} samples/s", flush=True)
    measured = summed_up(told)
    print("\n".join(measured["notes"]))
    write_result("shared_cores", measured)


if __name__ == "__main__":
    main()
