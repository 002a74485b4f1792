"""Supervised targets per second of lists, every title a target, against one target for each prompt.

The same trainer and model on MovieLens-100K; batches as training deals them, a step of each in turn. Prompts show ten
titles, as the paper's do. Lists are as long as 512 tokens allow, and once more no longer than the prompts.

    python -m benchmarks.packed [--steps 7]
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from benchmarks.measuring import at_least, backbone_of, quickstart, spread, use_all_cores, write_result
from pplr.backbones.base import Batch
from pplr.backbones.batching import bucketed_batches
from pplr.config import Config
from pplr.runtimes.assembly import load_run_data
from pplr.stages.cut import CutPlan
from pplr.stages.model import ClientModel, CutModel

WAYS = {
    "one target for each prompt": ("data.history_items=10",),
    "lists of 512 tokens": ("backbone.prompt.targets=all", "data.history_items=100"),
    "lists of 11 titles": ("backbone.prompt.targets=all", "data.history_items=10"),
}
"""What is measured, the reference first."""

TOKENS = 2048
"""Tokens of a batch, as nearly as whole samples make them, so that every way runs products of one size."""


def make_batches(config: Config, count: int) -> tuple[ClientModel, list[Batch]]:
    """Make a client and batches of real samples, dealt as training deals them."""
    data, backbone = load_run_data(config), backbone_of(config)
    catalog = data.dataset.catalog
    samples = backbone.divide([sample for own in data.samples.values() for sample in own], catalog)
    encoded = backbone.encode(samples, catalog, config.data.history_items)
    lengths = [backbone.length(own) for own in encoded]
    size = max(1, round(TOKENS * len(lengths) / sum(lengths)))
    order = bucketed_batches(lengths, size, 0, "benchmark")[:count]
    model = CutModel(backbone, CutPlan.make(None, backbone.total_layers), config.adapter, config.training)
    client = model.client("one", model.initial_adapter(0))
    client.begin_round(1000)
    return client, [backbone.collate([encoded[place] for place in places]) for places in order]


def take_step(client: ClientModel, batch: Batch) -> float:
    """Take one optimizer step and return its seconds."""
    started = time.perf_counter()
    (client.train_loss(batch, 1) / batch.targets).backward()
    client.optimizer_step(1.0)
    return time.perf_counter() - started


def titles_of(client: ClientModel, batch: Batch) -> int:
    """Count the titles that a batch's targets are the tokens of."""
    end = getattr(client.backbone, "answer_end")  # noqa: B009  (of causal_lm alone)
    return int((batch.is_target & (batch.input_ids == end)).sum())


def main() -> None:
    """Measure and write ``packed.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=7)
    arguments = parser.parse_args()
    use_all_cores()
    made = {
        name: make_batches(quickstart("training.samples=null", *settings), arguments.steps + 1)
        for name, settings in WAYS.items()
    }
    rates: dict[str, dict[str, list[float]]] = {name: {"targets": [], "tokens": []} for name in made}
    for step in range(arguments.steps + 1):
        for name, (client, batches) in made.items():
            batch = batches[step]
            seconds = take_step(client, batch)
            if step > 0:  # the first warms up
                rates[name]["targets"].append(titles_of(client, batch) / seconds)
                rates[name]["tokens"].append(batch.targets / seconds)
        print(
            "  ".join(f"{name} {own['targets'][-1]:.2f}/s" for name, own in rates.items() if own["targets"]), flush=True
        )
    told: dict[str, Any] = {}
    notes = []
    for name, (client, batches) in made.items():
        told[name] = {what: spread(own) for what, own in rates[name].items()}
        whole = sum(batch.input_ids.numel() for batch in batches)
        real, titles = sum(batch.tokens for batch in batches), sum(titles_of(client, batch) for batch in batches)
        told[name] |= {"tokens_per_target": real / titles, "padding": 1 - real / whole}
        notes.append(
            f"{name}: {told[name]['targets']['median']:.2f} supervised titles and {told[name]['tokens']['median']:.0f} "
            f"supervised tokens a second, {real / titles:.1f} tokens through the model for each title, "
            f"{1 - real / whole:.1%} padding"
        )
        print(notes[-1])
    base, *others = WAYS
    ratios = {name: told[name]["targets"]["median"] / told[base]["targets"]["median"] for name in others}
    notes.append(f"{others[1]} train {ratios[others[1]]:.1f} times the targets a second of {base}")
    print(notes[-1])
    rows = [at_least(f"supervised targets per second, {others[0]}", base, ratios[others[0]], 10.0)]
    print(f"{rows[0]['name']}: {rows[0]['ratio']:.2f}")
    write_result("packed", {"rows": rows, "notes": notes, "measured": told})


if __name__ == "__main__":
    main()
