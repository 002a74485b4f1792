"""Validation NDCG@10 on MovieLens-100K after the same seconds of training: item vectors, lists, one target a prompt.

All data pooled and the model uncut, the rate constant after its warm-up. Titles are written along the trie. What is
done once before training (encoding, reading the items' texts) is timed apart.

    python -m benchmarks.equal_time [--seconds 120] [--users 200] [--seeds 0 1 2]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measuring import at_least, use_all_cores, write_result
from benchmarks.packed import take_step
from pplr.backbones.base import load_backbone
from pplr.backbones.batching import bucketed_batches
from pplr.config import Config
from pplr.config_files import load_config
from pplr.progress import Silent
from pplr.recommend.evaluation import evaluate, metric_value
from pplr.runtimes.assembly import POOLED, Assembly
from pplr.seeds import derive_seed

CONFIGS = Path(__file__).parent.parent / "configs"
WAYS = {
    "item vectors": ("movielens_item_vectors.yaml", ("training.batch_size=16",)),
    "one target for each prompt": (
        "quickstart_causal_lm.yaml",
        ("training.shared_prefix=false", "data.history_items=10", "training.batch_size=16", "training.warmup_steps=5"),
    ),
    "lists": (
        "quickstart_causal_lm.yaml",
        ("training.shared_prefix=false", "backbone.prompt.targets=all", "data.history_items=30",
         "training.batch_size=4", "training.warmup_steps=5"),
    ),
}  # fmt: skip
SHARED = (
    "training.samples=null", "training.schedule=constant", "training.micro_batch_size=null", "cut=null",
    "federation.method=centralized", "runtime.threads=null", "evaluation.cutoffs=[10]", "evaluation.grounding=trie",
)  # fmt: skip


def configure(way: str, seed: int, users: int, overrides: Sequence[str] = ()) -> Config:
    """Load one way's configuration."""
    name, own = WAYS[way]
    return load_config(
        CONFIGS / name, [*SHARED, *own, f"run.seed={seed}", f"evaluation.validation_users={users}", *overrides]
    )


def measure(config: Config, seconds: float) -> dict[str, Any]:
    """Train one way for some seconds and rank its validation users."""
    began = time.perf_counter()
    assembly = Assembly(config, Silent(), load_backbone(config.backbone))
    trainer = assembly.federated_client(POOLED)
    client, seed = trainer.model, config.run.seed
    client.begin_round(1_000_000)
    prepared = time.perf_counter() - began
    spent, steps, epoch, targets = 0.0, 0, 0, 0
    while spent < seconds:
        drawn = assembly.backbone.draw(trainer.encoded, derive_seed(seed, "draw", epoch))
        lengths = [assembly.backbone.length(own) for own in drawn]
        for places in bucketed_batches(lengths, config.training.batch_size, seed, "equal time", epoch):
            if spent >= seconds:
                break
            batch = assembly.backbone.collate([drawn[place] for place in places])
            spent += take_step(client, batch)
            steps, targets = steps + 1, targets + batch.targets
        epoch += 1
    client.end_round()
    began = time.perf_counter()
    cases = [case for own in assembly.data.validation.values() for case in own]
    ranker = assembly.ranker(client)
    found = evaluate(ranker, {POOLED: cases}, config.evaluation.cutoffs, config.evaluation.batch_size)
    return {
        "ndcg@10": metric_value(found, "ndcg@10"),
        "users": len(cases),
        "steps": steps,
        "epochs_begun": epoch,
        "supervised": targets,  # tokens of titles, or items
        "train_seconds": spent,
        "prepare_seconds": prepared,
        "evaluate_seconds": time.perf_counter() - began,
    }


def main() -> None:
    """Measure and write ``equal_time.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--users", type=int, default=200, help="validation users, in equal parts of five clients")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--set", nargs="+", default=[], dest="overrides", metavar="FIELD=VALUE")
    arguments = parser.parse_args()
    use_all_cores()
    told: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for seed in arguments.seeds:
        for way in WAYS:
            config = configure(way, seed, max(1, arguments.users // 5), arguments.overrides)
            own = measure(config, arguments.seconds)
            told[way].append(own)
            print(f"seed {seed}, {way}: {own}", flush=True)
    means = {way: statistics.mean(own["ndcg@10"] for own in rows) for way, rows in told.items()}
    notes = [
        f"{way}: NDCG@10 {means[way]:.4f}, mean over seeds {arguments.seeds} after {arguments.seconds:.0f} s each "
        f"({', '.join(format(own['ndcg@10'], '.4f') for own in rows)})"
        for way, rows in told.items()
    ]
    base = "one target for each prompt"
    rows = []
    if means[base] > 0:
        ratio = means["item vectors"] / means[base]
        rows = [at_least("validation NDCG@10 after equal wall-clock time, item vectors", base, ratio, 3.0)]
        notes.append(f"lists: {means['lists'] / means[base]:.2f} times the NDCG@10 of {base}")
    print("\n".join(notes))
    write_result("equal_time", {"rows": rows, "notes": notes, "measured": told})


if __name__ == "__main__":
    main()
