"""Try settings, told apart by validation alone, and keep what came out in ``results/tuning/NAME.json``.

A grid is a YAML file of trials, each a list of settings. Test cases are measured by no trial. One seed by default;
``--seeds 0 1 2`` carries out each trial with each.

    python -m benchmarks.tune configs/games_item_vectors.yaml --grid benchmarks/grids/games.yaml --name games

The data lie in ``data/amazon-games-2018``, or where ``--set data.path=FOLDER`` says.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.measuring import machine, quality_parser
from benchmarks.quality import finish
from benchmarks.records import where_trained
from pplr.errors import ConfigError, PplrError
from pplr.storage import write_json

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Trial:
    """One set of settings.

    Args:
        name: What the grid calls it.
        overrides: Settings, as ``section.field=value``.
    """

    name: str
    overrides: Sequence[str]


def read_grid(path: Path, common: Sequence[str] = ()) -> list[Trial]:
    """Read the trials of a grid.

    Raises:
        ConfigError: The file is not such a grid, or a setting is the seed.
    """
    cure = "Write a list of settings below each trial's name."
    try:
        told = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the grid {path}: {' '.join(str(error).split())}", cure=cure) from error
    if not isinstance(told, dict) or not all(
        isinstance(own, list) and all(isinstance(setting, str) for setting in own) for own in told.values()
    ):
        raise ConfigError(f"{path} is no grid of trials", cure=cure)
    if any(setting.startswith("run.seed=") for own in [common, *told.values()] for setting in own):
        raise ConfigError(f"a trial of {path}, or --set, sets run.seed", cure="Name the seeds with --seeds.")
    return [Trial(str(name), [*common, *own]) for name, own in told.items()]


def best_round(rounds: Sequence[Mapping[str, Any]], metric: str) -> tuple[int, float]:
    """Find the round of the best mean over clients, each counting as many times as it has samples.

    Returns:
        The server round, from 1, and the mean.
    """
    means = []
    for told in rounds:
        own = [(c["samples"], c["validation"][metric]) for c in told["clients"].values() if c["validation"]]
        means.append(sum(samples * value for samples, value in own) / sum(samples for samples, _ in own))
    best = (min if metric == "loss" else max)(range(len(means)), key=lambda place: means[place])
    return best + 1, means[best]


def carry_out(config: Path, trial: Trial, seed: int, folder: Path, metric: str) -> dict[str, Any]:
    """Train a trial with a seed, unless that is done already; tell its best round by validation.

    Returns:
        What the file says of a seed: ``machine``, ``best_round``, ``rounds``, the metric and ``train_seconds``.
    """
    finish(config, [*trial.overrides, f"run.seed={seed}", "evaluation.test_users=1", "evaluation.floors=[]"], folder)
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines()]
    at, value = best_round(rounds, metric)
    seconds = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["seconds"]["train"]
    provenance = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    print(f"{trial.name}, seed {seed}: {metric} {value:.4f} in round {at} of {len(rounds)}", flush=True)
    told = {"best_round": at, "rounds": len(rounds), metric: value, "train_seconds": seconds}
    return {"machine": where_trained(provenance), **told}


def main() -> None:
    """Carry out all trials and write them down."""
    parser = quality_parser(__doc__)
    parser.set_defaults(seeds=[0])
    parser.add_argument("--grid", type=Path, required=True)
    parser.add_argument("--metric", default="ndcg@10")
    parser.add_argument("--parallel", type=int, default=1, help="trials at once")
    arguments = parser.parse_args()
    metric = arguments.metric
    failed: list[str] = []
    told: dict[str, Any] = {}
    try:
        trials = read_grid(arguments.grid, arguments.overrides)
    except PplrError as error:
        sys.exit(f"error: {error}")

    def run(job: tuple[Trial, int]) -> dict[str, Any] | None:
        trial, seed = job
        folder = ROOT / "runs" / "tuning" / arguments.name / f"{trial.name}-{seed}"
        try:
            return carry_out(arguments.config, trial, seed, folder, metric)
        except PplrError as error:
            print(f"{trial.name}, seed {seed} failed: {error}", flush=True)
            failed.append(f"{trial.name}, seed {seed}")
            return None

    jobs = [(trial, seed) for seed in arguments.seeds for trial in trials]
    with ThreadPoolExecutor(arguments.parallel) as pool:
        for (trial, seed), found in zip(jobs, pool.map(run, jobs), strict=True):
            if found is not None:
                own = told.setdefault(trial.name, {"set": list(trial.overrides), "seeds": {}})
                own["seeds"][str(seed)] = found
    path = ROOT / "results" / "tuning" / f"{arguments.name}.json"
    write_json(path, {"machine": machine(), "config": str(arguments.config), "metric": metric, "trials": told})
    print(f"wrote results/tuning/{path.name}")
    if failed:
        sys.exit(f"error: {len(failed)} of {len(jobs)} failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
