"""Cold start: items that nobody took in training, and users of whom one item is known.

Each seed draws its own unseen items (holdout ``unseen_items``) and new users (``new_users``), trains pplr without them,
and measures it beside the floors, SASRec, and what a random order would reach. What comes out goes to ``results/``.

    python -m benchmarks.cold_start configs/movielens_item_vectors.yaml --name cold-start-movielens
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.measuring import quality_parser, write_quality
from benchmarks.quality import finish
from benchmarks.sasrec import REQUIREMENTS, add_arguments, cases_of, fit_sasrec
from pplr.backbones.adapters import load_adapter
from pplr.config import Config
from pplr.config_files import load_config
from pplr.data.prompts import Case
from pplr.errors import PplrError
from pplr.recommend.evaluation import Ranker, evaluate
from pplr.recommend.floors import fit_floor
from pplr.runtimes.run import Run, open_run
from pplr.runtimes.run_data import RunData, load_run_data

ROOT = Path(__file__).parent.parent
KINDS = ("unseen_items", "new_users")
RANDOM = "random order, expected"

Measured = dict[str, dict[str, dict[str, float | None]]]
"""For each model, ``catalog`` and, where items are unseen, ``among``: the metrics."""


@dataclass(frozen=True)
class Among:
    """Ranks some items alone.

    Args:
        ranker: Scores the catalog.
        items: Item numbers; all others come last.
    """

    ranker: Ranker
    items: tuple[int, ...]

    def scores(self, cases: Sequence[Case]) -> NDArray[np.float32]:
        """Score: (B, N), -inf where an item is none of these."""
        whole = self.ranker.scores(cases)
        kept = np.full_like(whole, -np.inf)
        kept[:, list(self.items)] = whole[:, list(self.items)]
        return kept


def rankers_of(run: Run) -> dict[str, Ranker]:
    """Load each client's adapter, ready to rank."""
    assembly = run.assembly()
    return {
        name: assembly.ranker(assembly.admit(name, load_adapter(run.folder / "clients" / name), "test"))
        for name in assembly.data.partition.names
    }


def measure(models: Mapping[str, Ranker | Mapping[str, Ranker]], data: RunData, config: Config) -> Measured:
    """Measure each model on the full catalog and, where items are unseen, among these alone."""
    settings, unseen = config.evaluation, data.holdout.unseen
    found: Measured = {}
    for name, ranker in models.items():
        found[name] = {"catalog": evaluate(ranker, data.test, settings.cutoffs, settings.batch_size).overall()}
        if unseen:
            own = (
                {client: Among(one, unseen) for client, one in ranker.items()}
                if isinstance(ranker, Mapping)
                else Among(ranker, unseen)
            )
            found[name]["among"] = evaluate(own, data.test, settings.cutoffs, settings.batch_size).overall()
    return found


def at_random(data: RunData, config: Config) -> dict[str, dict[str, float | None]]:
    """Work out what a random order would reach on average, for users of one target each."""
    cases = cases_of(data.test)
    unseen, items = set(data.holdout.unseen), len(data.dataset.catalog)
    sizes = {"catalog": [items - len(case.seen) for case in cases]}
    if unseen:
        sizes["among"] = [len(unseen - set(case.seen)) for case in cases]
    return {where: expected(own, config.evaluation.cutoffs) for where, own in sizes.items()}


def expected(sizes: Sequence[int], cutoffs: Sequence[int]) -> dict[str, float | None]:
    """Average the metrics over all places of one target among as many items as each user has.

    recall@K = min(K, n) / n;  ndcg@K = Σ_{r = 1 .. min(K, n)} 1/log2(r + 1) / n
    """
    found: dict[str, float | None] = {}
    for cutoff in cutoffs:
        gains = [sum(1 / math.log2(rank + 1) for rank in range(1, min(cutoff, n) + 1)) / n for n in sizes]
        found[f"recall@{cutoff}"] = float(np.mean([min(cutoff, n) / n for n in sizes])) if sizes else None
        found[f"ndcg@{cutoff}"] = float(np.mean(gains)) if sizes else None
    return found


def one_seed(kind: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train and measure everything on one draw."""
    share = arguments.share if kind == "unseen_items" else arguments.user_share
    common = [*arguments.overrides, f"data.holdout={{kind: {kind}, share: {share}}}", f"run.seed={seed}"]
    config = load_config(arguments.config, common)
    data = load_run_data(config)
    cases = cases_of(data.test)
    items = len(data.dataset.catalog)
    found: Measured = {}
    for method in arguments.methods:
        folder = arguments.root / "runs" / f"{arguments.name}-{kind}-{seed}-{method}"
        finish(arguments.config, [*common, f"federation.method={method}"], folder)
        with closing(open_run(folder)) as run:
            found |= measure({f"{config.backbone.name}, {method}": rankers_of(run)}, data, config)
    others: dict[str, Ranker] = {name: fit_floor(name, data.holdout, items, seed) for name in config.evaluation.floors}
    summary = None
    if not arguments.without_sasrec:
        fitted, summary = fit_sasrec(data, [seed], arguments)
        others["sasrec"] = fitted[seed]
    found |= measure(others, data, config)
    return {
        "seed": seed,
        "holdout_sha256": data.holdout.sha256,
        "users": len(cases),
        "left_out": data.left_out,
        "unseen": len(data.holdout.unseen),
        "models": {**found, RANDOM: at_random(data, config)},
        "sasrec": summary,
    }


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command's arguments."""
    parser = quality_parser(__doc__)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--share", type=float, default=0.1, help="of the items that are unseen")
    parser.add_argument("--user-share", type=float, default=0.25, help="of the users that are new")
    parser.add_argument("--methods", nargs="+", default=["centralized", "pplr"], help="of federation.method")
    parser.add_argument("--without-sasrec", action="store_true", help="leave out what needs an environment of its own")
    add_arguments(parser, widths=(128,), dropouts=(0.2, 0.5), lengths=(50,))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> None:
    """Draw, train, measure and write ``results/NAME.json``."""
    arguments = parse(argv)
    arguments.root = root
    try:
        runs = {kind: [one_seed(kind, seed, arguments) for seed in arguments.seeds] for kind in arguments.kinds}
    except PplrError as error:
        sys.exit(f"error: {error}")
    told = {
        "config": str(arguments.config),
        "set": arguments.overrides,
        "requirements": REQUIREMENTS,
        "cold_start": runs,
    }
    write_quality(arguments.name, told, root)


if __name__ == "__main__":
    main()
