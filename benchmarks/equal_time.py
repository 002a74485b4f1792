"""Validation NDCG@10 on MovieLens-100K after the same wall-clock time: item vectors against one target a prompt.

All data pooled and the model uncut, the rate constant after its warm-up. The clock starts before the model is loaded:
loading, encoding and reading the items' texts are part of the time, and nothing that an earlier run has computed is in
the cache, only what was fetched. One target a prompt trains in its faster way, what prompts share once
(``training.shared_prefix``); its titles are written along the trie. Ranking the validation users comes after the time.
With --lists a third way trains, lists whose every title is a target.

    python -m benchmarks.equal_time [--seconds 120] [--users 200] [--seeds 0 1 2]
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.beside import beside
from benchmarks.measuring import at_least, backbone_of, use_all_cores, write_result
from benchmarks.packed import take_step
from pplr.backbones.base import load_backbone
from pplr.backbones.batching import bucketed_batches
from pplr.config import Config
from pplr.config_files import load_config
from pplr.progress import Silent
from pplr.recommend.evaluation import evaluate, metric_value
from pplr.runtimes.assembly import POOLED, Assembly
from pplr.runtimes.run_data import load_run_data
from pplr.seeds import derive_seed
from pplr.storage import cache_dir

CONFIGS = Path(__file__).parent.parent / "configs"
BASE, OURS, LISTS = "one target for each prompt", "item vectors", "lists"
WAYS = {
    OURS: ("movielens_item_vectors.yaml", ("training.batch_size=16",)),
    BASE: (
        "quickstart_causal_lm.yaml",
        ("data.history_items=10", "training.batch_size=16", "training.warmup_steps=5", "training.shared_prefix=true"),
    ),
    LISTS: (
        "quickstart_causal_lm.yaml",
        (
            "training.shared_prefix=false",
            "backbone.prompt.targets=all",
            "data.history_items=30",
            "training.batch_size=4",
            "training.warmup_steps=5",
        ),
    ),
}
SHARED = (
    "training.samples=null", "training.schedule=constant", "training.micro_batch_size=null", "cut=null",
    "federation.method=centralized", "runtime.threads=null", "evaluation.cutoffs=[10]", "evaluation.grounding=trie",
)  # fmt: skip
FETCHED = ("models", "sources", "wheels", "archives")
"""Folders of the cache that hold what was fetched; the others hold what was computed."""
BOUND = 3.0


def configure(way: str, seed: int, users: int, overrides: Sequence[str] = ()) -> Config:
    """Load one way's configuration."""
    name, own = WAYS[way]
    return load_config(
        CONFIGS / name, [*SHARED, *own, f"run.seed={seed}", f"evaluation.validation_users={users}", *overrides]
    )


@contextmanager
def nothing_computed() -> Iterator[None]:
    """Use a cache that holds what was fetched before, and nothing that was computed."""
    before, whole = os.environ.get("PPLR_CACHE"), cache_dir().resolve()
    with tempfile.TemporaryDirectory() as folder:
        for name in FETCHED:
            if (whole / name).exists():
                (Path(folder) / name).symlink_to(whole / name, target_is_directory=True)
        os.environ["PPLR_CACHE"] = folder
        try:
            yield
        finally:
            os.environ.pop("PPLR_CACHE")
            if before is not None:
                os.environ["PPLR_CACHE"] = before


def measure(config: Config, seconds: float) -> dict[str, Any]:
    """Prepare and train one way for some seconds in all, then rank its validation users."""
    with nothing_computed():
        began = time.perf_counter()
        assembly = Assembly(config, Silent(), load_backbone(config.backbone))
        trainer = assembly.federated_client(POOLED)
        client, seed = trainer.model, config.run.seed
        client.begin_round(1_000_000)
        prepared = time.perf_counter() - began
        collate = assembly.backbone.collate_row if config.training.shared_prefix else assembly.backbone.collate
        steps, epoch, targets = 0, 0, 0
        while time.perf_counter() - began < seconds:
            drawn = assembly.backbone.draw(trainer.encoded, derive_seed(seed, "draw", epoch))
            lengths = [assembly.backbone.length(own) for own in drawn]
            for places in bucketed_batches(lengths, config.training.batch_size, seed, "equal time", epoch):
                if time.perf_counter() - began >= seconds:
                    break
                batch = collate([drawn[place] for place in places])
                take_step(client, batch)
                steps, targets = steps + 1, targets + batch.targets
            epoch += 1
        client.end_round()
        spent = time.perf_counter() - began
        began = time.perf_counter()
        cases = [case for own in assembly.data.validation.values() for case in own]
        ranker = assembly.ranker(client)
        found = evaluate(ranker, {POOLED: cases}, config.evaluation.cutoffs, config.evaluation.batch_size)
        ranked = time.perf_counter() - began
        assembly.close()
    return {
        "ndcg@10": metric_value(found, "ndcg@10"),
        "users": len(cases),
        "steps": steps,
        "epochs_begun": epoch,
        "supervised": targets,  # tokens of titles, or items
        "seconds": spent,
        "prepare_seconds": prepared,
        "evaluate_seconds": ranked,
    }


def ratio_of(one: float, other: float) -> float:
    """Divide two qualities: infinite where only the other is 0, not a number where both are."""
    if other > 0:
        return one / other
    return math.inf if one > 0 else math.nan


def row_of(name: str, ratios: Sequence[float], bound: float | None) -> dict[str, Any]:
    """Make a row of the median of the seeds' ratios; there is none where half of them are infinite or unknown."""
    unknown = any(math.isnan(ratio) for ratio in ratios)
    median = math.nan if unknown else statistics.median(ratios)
    if math.isfinite(median):
        return beside(name, BASE, median) if bound is None else at_least(name, BASE, median, bound)
    zero = sum(not math.isfinite(ratio) for ratio in ratios)
    reason = f"{BASE} has NDCG@10 0 with {zero} of {len(ratios)} seeds" + (", and so has the other way" * unknown)
    return {**beside(name, BASE, None), "at_least": bound, "reason": reason}


def summed_up(told: Mapping[str, Sequence[Mapping[str, Any]]], seeds: Sequence[int], seconds: float) -> dict[str, Any]:
    """Put the ways beside each other, seed by seed.

    Args:
        told: What each way measured, one for each seed.
        seeds: The seeds.
        seconds: Of each way.
    """
    quality = {way: [own["ndcg@10"] for own in rows] for way, rows in told.items()}
    notes = [
        f"{way}: NDCG@10 {', '.join(format(own, '.4f') for own in quality[way])} with seeds "
        f"{', '.join(map(str, seeds))} after {seconds:.0f} s each, of which (median) "
        f"{statistics.median(own['prepare_seconds'] for own in rows):.1f} s before the first step; "
        f"{rows[0]['users']} users"
        for way, rows in told.items()
    ]
    rows = []
    for way, bound in ((OURS, BOUND), (LISTS, None)):
        if way not in told:
            continue
        pairs = list(zip(quality[way], quality[BASE], strict=True))
        ratios = [ratio_of(*pair) for pair in pairs]
        row = row_of(
            f"validation NDCG@10 after equal wall-clock time, {way}, median of {len(seeds)} seeds", ratios, bound
        )
        rows.append(row)
        shown = (f"{ratio:.2f}" if math.isfinite(ratio) else "none" for ratio in ratios)
        apart = ", ".join(f"{one - other:+.4f}" for one, other in pairs)
        notes.append(f"{way} against {BASE}, seed by seed: ratio {', '.join(shown)}; difference {apart}")
        if row["ratio"] is None:
            notes.append(f"{way}: no ratio, because {row['reason']}")
    return {"rows": rows, "notes": notes, "measured": dict(told)}


def main() -> None:
    """Measure and write ``equal_time.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0, help="of each way, with all that comes before training")
    parser.add_argument("--users", type=int, default=200, help="validation users, in equal parts of five clients")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--lists", action="store_true", help="train lists as well, which takes half as long again")
    parser.add_argument("--set", nargs="+", default=[], dest="overrides", metavar="FIELD=VALUE")
    arguments = parser.parse_args()
    use_all_cores()
    ways = [way for way in WAYS if arguments.lists or way != LISTS]
    for way in ways:  # what has to be fetched is fetched before the clock starts
        config = configure(way, 0, 1, arguments.overrides)
        backbone_of(config)
        load_run_data(config)
    told: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for seed in arguments.seeds:
        for way in ways:
            config = configure(way, seed, max(1, arguments.users // 5), arguments.overrides)
            own = measure(config, arguments.seconds)
            told[way].append(own)
            print(f"seed {seed}, {way}: {own}", flush=True)
    measured = summed_up(told, arguments.seeds, arguments.seconds)
    print("\n".join(measured["notes"]))
    write_result("equal_time", measured)


if __name__ == "__main__":
    main()
