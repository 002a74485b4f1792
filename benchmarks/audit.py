"""What a server reads of a trained run, at several cuts and noises, kept in ``results/privacy/NAME.json`` with a plot.

The run is trained once; each seed draws other users, other public text and other noise.

    python -m benchmarks.audit configs/movielens_item_vectors.yaml --name item-vectors --set backbone.keep_blocks=12
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from benchmarks.measuring import machine, quality_parser
from benchmarks.quality import finish
from pplr.apps.auditing import SWEPT_NOISES, draw_frontier, parse_cuts, sweep_cuts
from pplr.errors import PplrError
from pplr.runtimes.run import open_run
from pplr.storage import write_json

ROOT = Path(__file__).parent.parent


def main() -> None:
    """Train, unless it is trained, attack with every seed, and write what came out."""
    parser = quality_parser(__doc__)
    parser.add_argument("--users", type=int, default=20)
    parser.add_argument("--cut", nargs="+", default=[], metavar="K,M")
    parser.add_argument("--noise", nargs="+", type=float, default=list(SWEPT_NOISES))
    parser.add_argument("--guard", nargs="+", default=[], metavar="FIELD=VALUE,...")
    parser.add_argument("--passes", nargs="+", type=int, default=[1])
    parser.add_argument("--attack", nargs="+", default=[])
    parser.add_argument("--has", nargs="+", default=[])
    arguments = parser.parse_args()
    folder = ROOT / "runs" / "privacy" / arguments.name
    told: list[dict[str, Any]] = []
    try:
        finish(arguments.config, arguments.overrides, folder)
        run = open_run(folder)
        cuts = parse_cuts(arguments.cut) or sweep_cuts(run.assembly().backbone.total_layers)
        for seed in arguments.seeds:
            found = run.audit(
                attacks=arguments.attack,
                knowledge=arguments.has,
                users=arguments.users,
                cuts=cuts,
                noises=arguments.noise,
                passes=arguments.passes,
                guards=[[part for part in own.split(",") if part] for own in arguments.guard],
                seed=seed,
            )
            told.append(found)
            print(f"seed {seed}: {found['verdict']}", flush=True)
    except PplrError as error:
        sys.exit(f"error: {error}")
    path = ROOT / "results" / "privacy" / f"{arguments.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "-m", "benchmarks.audit", *sys.argv[1:]])
    content = {"command": command, "machine": machine(), "seeds": told}
    write_json(path, content)
    draw_frontier(told[0], path.with_suffix(".png"))
    print(f"wrote results/privacy/{path.name} and its plot")


if __name__ == "__main__":
    main()
