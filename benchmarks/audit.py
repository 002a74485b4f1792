"""What a server reads of a trained run, at several cuts and noises, kept in ``results/privacy/NAME.json`` with a plot.

The run is trained once; each seed draws other users, other public text and other noise. A seed that was audited is kept
in the run's folder, and not attacked again when the command is run again.

    python -m benchmarks.audit configs/movielens_item_vectors.yaml --name item-vectors --set backbone.keep_blocks=12
"""

from __future__ import annotations

import copy
import json
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.measuring import machine, quality_parser
from benchmarks.quality import finish
from pplr.apps.auditing import SWEPT_NOISES, draw_frontier, label_of, parse_cuts, read_beside, sweep_cuts
from pplr.errors import PplrError
from pplr.privacy.audits import PAIRS
from pplr.runtimes.run import open_run
from pplr.storage import sha256_file, write_json

ROOT = Path(__file__).parent.parent


def pooled(seeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Put the seeds of an audit together: means of means, between the widest of the intervals.

    Seeds draw other users of the same run, some of them the same, so that no interval of all of them would be honest.
    """
    content = copy.deepcopy(seeds[0])
    content["baseline"] = _pooled([own["baseline"] for own in seeds])
    for place, setting in enumerate(content["settings"]):
        same = [own["settings"][place] for own in seeds]
        setting["worth"] = _one([own["worth"] for own in same])
        setting["audits"] = [_pooled(own) for own in zip(*(each["audits"] for each in same), strict=True)]
    return content


def _pooled(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Put each metric of an attack together."""
    return {
        name: _one([each[name] for each in found]) if isinstance(own, dict) else own for name, own in found[0].items()
    }


def _one(found: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    known = [own for own in found if own is not None]
    if not known:
        return None
    return {
        **known[0],
        "mean": statistics.fmean(own["mean"] for own in known),
        "low": min(own.get("low", own["mean"]) for own in known),
        "high": max(own.get("high", own["mean"]) for own in known),
    }


def audit_seed(folder: Path, words: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Audit with one seed, unless that was done with the same words on the same run."""
    asked = json.loads(json.dumps({**words, "seed": seed, "run": sha256_file(folder / "metrics.json")}))
    path = folder / f"audit-seed-{seed}.json"
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["asked"] == asked:
            return dict(kept["found"])
    found = open_run(folder).audit(**words, seed=seed)
    write_json(path, {"asked": asked, "found": found})
    print(f"seed {seed}: {found['verdict']}", flush=True)
    return found


def audited(folder: Path, words: Mapping[str, Any], seeds: Sequence[int], parallel: int) -> list[dict[str, Any]]:
    """Audit with every seed, some of them at once, each in a process of its own."""
    if parallel < 2:
        return [audit_seed(folder, words, seed) for seed in seeds]
    with ProcessPoolExecutor(parallel, mp_context=get_context("spawn")) as pool:
        return list(pool.map(partial(audit_seed, folder, words), seeds))


def main() -> None:
    """Train, unless it is trained, attack with every seed, and write what came out."""
    parser = quality_parser(__doc__)
    parser.add_argument("--users", type=int, default=20)
    parser.add_argument("--cut", nargs="+", default=[], metavar="K,M")
    parser.add_argument("--noise", nargs="+", type=float, default=list(SWEPT_NOISES))
    parser.add_argument("--wire", nargs="+", default=[])
    parser.add_argument("--beside", nargs="+", type=Path, default=[], metavar="RUN_DIR")
    parser.add_argument("--guard", nargs="+", default=[], metavar="FIELD=VALUE,...")
    parser.add_argument("--passes", nargs="+", type=int, default=[1])
    parser.add_argument("--pairs", nargs="+", type=int, default=[PAIRS])
    parser.add_argument("--attack", nargs="+", default=[])
    parser.add_argument("--has", nargs="+", default=[])
    parser.add_argument("--parallel", type=int, default=1, help="seeds that are audited at once")
    arguments = parser.parse_args()
    folder = ROOT / "runs" / "privacy" / arguments.name
    try:
        others = [read_beside(own) for own in arguments.beside]
        finish(arguments.config, arguments.overrides, folder)
        cuts = parse_cuts(arguments.cut) or sweep_cuts(open_run(folder).assembly().backbone.total_layers)
        words = {
            "attacks": arguments.attack,
            "knowledge": arguments.has,
            "users": arguments.users,
            "cuts": cuts,
            "noises": arguments.noise,
            "passes": arguments.passes,
            "pairs": arguments.pairs,
            "guards": [[part for part in own.split(",") if part] for own in arguments.guard],
            "wires": arguments.wire,
        }
        told = audited(folder, words, arguments.seeds, arguments.parallel)
    except PplrError as error:
        sys.exit(f"error: {error}")
    path = ROOT / "results" / "privacy" / f"{arguments.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "-m", "benchmarks.audit", *sys.argv[1:]])
    content = {"command": command, "machine": machine(), "seeds": told}
    write_json(path, content)
    label = label_of(folder) if others else None
    draw_frontier(pooled(told), path.with_suffix(".png"), beside=others, label=label)
    print(f"wrote results/privacy/{path.name} and its plot")


if __name__ == "__main__":
    main()
