"""Train a configuration with some seeds and keep what came out in ``results/NAME.json``.

python -m benchmarks.quality configs/movielens_item_vectors.yaml --name item-vectors-centralized \
        --set federation.method=centralized
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.measuring import quality_parser, write_quality

ROOT = Path(__file__).parent.parent
KEPT = ("method", "backbone", "cut", "overall", "spread", "floors", "seconds", "samples_per_second")


def train(config: Path, overrides: list[str], seed: int, folder: Path) -> dict[str, Any]:
    """Train one seed, unless its folder already holds a finished run; return its metrics."""
    metrics = folder / "metrics.json"
    if not metrics.exists():
        command = [sys.executable, "-m", "pplr.apps.cli", "train", str(config), "--run-dir", str(folder)]
        for override in [*overrides, f"run.seed={seed}"]:
            command += ["--set", override]
        subprocess.run(command, check=True)
    told: dict[str, Any] = json.loads(metrics.read_text(encoding="utf-8"))
    rounds = (folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
    provenance = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    held = {key: value for key, value in provenance.items() if key.endswith("sha256")}
    return {"seed": seed, "rounds": len(rounds), **held, **{key: told[key] for key in KEPT if key in told}}


def main() -> None:
    """Train every seed and write ``results/NAME.json``."""
    arguments = quality_parser(__doc__).parse_args()
    folders = {seed: ROOT / "runs" / f"{arguments.name}-{seed}" for seed in arguments.seeds}
    runs = [train(arguments.config, arguments.overrides, seed, folder) for seed, folder in folders.items()]
    result = {"config": str(arguments.config), "set": arguments.overrides, "runs": runs}
    write_quality(arguments.name, result)


if __name__ == "__main__":
    main()
