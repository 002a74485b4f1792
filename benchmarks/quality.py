"""Train a configuration with some seeds and keep what came out in ``results/NAME.json``.

python -m benchmarks.quality configs/movielens_item_vectors.yaml --name item-vectors-centralized \
        --set federation.method=centralized
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measuring import quality_parser, write_quality
from benchmarks.records import first_difference, settings_of, where_trained
from pplr.config_files import load_config
from pplr.errors import PplrError, RunError

ROOT = Path(__file__).parent.parent
KEPT = ("method", "backbone", "cut", "overall", "spread", "floors", "seconds", "samples_per_second")


def finish(config: Path, overrides: Sequence[str], folder: Path) -> None:
    """Train in a process of its own, or go on, unless the folder already holds this run and it is finished.

    Raises:
        RunError: The folder holds a run of other settings, or training failed.
    """
    begun = folder / "config.yaml"
    if begun.exists():
        differs = first_difference(settings_of(load_config(begun)), settings_of(load_config(config, overrides)))
        if differs is not None:
            raise RunError(
                f"{folder} holds a run of other settings: {differs}", cure="Choose another --name, or delete it."
            )
    if (folder / "metrics.json").exists():
        return
    command = [sys.executable, "-m", "pplr.apps.cli", "train", str(config), "--run-dir", str(folder)]
    for override in overrides:
        command += ["--set", override]
    code = subprocess.run([*command, "--resume"] if begun.exists() else command, check=False).returncode
    if code:
        raise RunError(f"training in {folder} ended with {code}", cure="Mend what it said, and run the command again.")


def train(config: Path, overrides: Sequence[str], seed: int, folder: Path) -> dict[str, Any]:
    """Train one seed, unless it is trained already; return its metrics."""
    finish(config, [*overrides, f"run.seed={seed}"], folder)
    told: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines()]
    provenance = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    held = {key: value for key, value in provenance.items() if key.endswith("sha256")}
    measured = {key: told[key] for key in KEPT if key in told}
    metric = load_config(folder / "config.yaml").evaluation.validation_metric
    validation = {"metric": metric, "clients": _validated(rounds, metric)}
    machine = where_trained(provenance)
    return {"seed": seed, "rounds": len(rounds), "machine": machine, **held, **measured, "validation": validation}


def _validated(rounds: Sequence[dict[str, Any]], metric: str) -> dict[str, list[float | None]]:
    """Tell what each client measured after each round, by its name; ``None`` where it did not."""
    told = [own["clients"] for own in rounds]
    names = dict.fromkeys(name for own in told for name in own)
    values = {name: [(own.get(name, {}).get("validation") or {}).get(metric) for own in told] for name in names}
    return {name: [None if v is None else round(v, 6) for v in own] for name, own in values.items()}


def main() -> None:
    """Train every seed and write ``results/NAME.json``."""
    arguments = quality_parser(__doc__).parse_args()
    folders = {seed: ROOT / "runs" / f"{arguments.name}-{seed}" for seed in arguments.seeds}
    try:
        runs = [train(arguments.config, arguments.overrides, seed, folder) for seed, folder in folders.items()]
    except PplrError as error:
        sys.exit(f"error: {error}")
    result = {"config": str(arguments.config), "set": arguments.overrides, "runs": runs}
    write_quality(arguments.name, result)


if __name__ == "__main__":
    main()
