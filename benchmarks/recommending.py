"""How long recommendations take: one user of a run that is loaded, one user by the command, and all users of a client.

Each backbone trains a small run of the real model first, in a folder that is gone in the end, unless --run-dir names
finished runs. A user is asked for by ``Run.recommend`` after one that does not count. The command is ``pplr recommend``
in a process of its own, from its start to its end, so that starting Python, loading the libraries, the data and the
model are part of it. All users are those of the client that has the fewest, by ``Run.recommend_all`` and by the command
with ``--all``.

    python -m benchmarks.recommending [--users 10] [--commands 3]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring import at_most, spread, use_all_cores, write_result
from pplr.config import Config
from pplr.config_files import load_config
from pplr.runtimes.in_process import train
from pplr.runtimes.run import Run, open_run
from pplr.seeds import generator

CONFIGS = Path(__file__).parent.parent / "configs"
FEW = (
    "federation.rounds=1", "training.samples=80", "evaluation.before=false", "evaluation.floors=[]",
    "evaluation.test_users=5", "evaluation.validation_users=2", "evaluation.validation_metric=loss",
)  # fmt: skip
BACKBONES = {
    "item vectors": ("quickstart.yaml", FEW),
    "titles written along the trie": ("quickstart_causal_lm.yaml", (*FEW, "evaluation.grounding=trie")),
}
BOUND_S = 1.0


def timed(work: Callable[[], Any]) -> float:
    """Return the seconds of some work."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def smallest(run: Run) -> tuple[str, list[str]]:
    """Name the client that has the fewest users, and them."""
    data = run.assembly().data
    own = {name: data.users(name) for name in data.partition.names}
    name = min(own, key=lambda client: len(own[client]))
    return name, own[name]


def command(folder: Path, *options: str) -> None:
    """Let ``pplr recommend`` run to its end, on as many threads as this process."""
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [sys.executable, "-m", "pplr.apps.cli", "recommend", str(folder), *options],
        env={**os.environ, **threads}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise SystemExit(f"error: pplr recommend ended with {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")


def measure(run: Run, users: int, commands: int) -> dict[str, Any]:
    """Measure one finished run.

    Args:
        run: The run.
        users: Users asked for one by one, and then once more.
        commands: Commands of each kind.
    """
    client, everyone = smallest(run)
    drawn = [everyone[int(place)] for place in generator(0, "recommending").permutation(len(everyone))[: users + 1]]
    first = timed(lambda: run.recommend(client, user=drawn[0]))  # loads what is loaded once
    warm = [timed(lambda user=user: run.recommend(client, user=user)) for user in drawn[1:] or drawn]
    every = timed(lambda: run.recommend_all(client))
    cold = [
        timed(lambda user=user: command(run.folder, "--client", client, "--user", user))
        for user in [drawn[number % len(drawn)] for number in range(commands)]
    ]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "lists.csv"
        whole = timed(lambda: command(run.folder, "--client", client, "--all", "--out", str(out)))
    settings = run.config.evaluation
    told = {
        "users": len(everyone),
        "first_seconds": first,
        "warm_seconds": spread(warm),
        "command_seconds": spread(cold),
        "all_seconds": every,
        "all_users_per_second": len(everyone) / every,
        "all_command_seconds": whole,
        "all_command_users_per_second": len(everyone) / whole,
    }
    if run.config.backbone.name == "causal_lm":
        told |= {"grounding": settings.grounding, "beams": settings.beams}
    return told


def summed_up(told: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Make a row for each backbone, of one user of a run that is loaded, and say the rest."""
    rows, notes = [], []
    for name, own in told.items():
        warm, cold = own["warm_seconds"], own["command_seconds"]
        how = f", {own['beams']} beams" if "beams" in own else ""
        rows.append(
            at_most(f"ten items for one user, {name}{how}, run loaded", "one second", warm["median"] / BOUND_S, BOUND_S)
        )
        notes += [
            f"{name}{how}: one user {1e3 * warm['median']:.0f} ms when the run is loaded "
            f"({1e3 * warm['lowest']:.0f} to {1e3 * warm['highest']:.0f} over {warm['count']})",
            f"{name}{how}: one user by the command, from its start, {cold['median']:.1f} s ({cold['lowest']:.1f} to "
            f"{cold['highest']:.1f} over {cold['count']})",
            f"{name}{how}: all {own['users']} users of a client {own['all_users_per_second']:.1f} users a second when "
            f"the run is loaded; by the command with --all, from its start, {own['all_command_seconds']:.1f} s, "
            f"{own['all_command_users_per_second']:.1f} users a second; each once",
        ]
    return {"rows": rows, "notes": notes, "measured": dict(told)}


def finished(configs: Mapping[str, Config], folders: Sequence[Path], place: Path) -> dict[str, Run]:
    """Open the runs that are there, or train one of each configuration."""
    if folders:
        return {f"{run.config.backbone.name} of {run.folder.name}": run for run in map(open_run, folders)}
    return {name: train(config, place / config.backbone.name) for name, config in configs.items()}


def main() -> None:
    """Measure and write ``recommending.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=10, help="users asked for one by one")
    parser.add_argument("--commands", type=int, default=3, help="commands for one user")
    parser.add_argument("--run-dir", type=Path, nargs="+", default=[], help="finished runs, instead of small ones")
    parser.add_argument("--set", nargs="+", action="extend", default=[], dest="overrides", metavar="FIELD=VALUE")
    arguments = parser.parse_args()
    use_all_cores()
    configs = {
        name: load_config(CONFIGS / file, [*own, *arguments.overrides]) for name, (file, own) in BACKBONES.items()
    }
    told = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, run in finished(configs, arguments.run_dir, Path(folder)).items():
            told[name] = measure(run, arguments.users, arguments.commands)
            run.close()
            print(f"{name}: {told[name]}", flush=True)
    measured = summed_up(told)
    print("\n".join(measured["notes"]))
    write_result("recommending", measured)


if __name__ == "__main__":
    main()
