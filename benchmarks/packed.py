"""Supervised targets per second of lists, every title a target, against one target for each prompt.

The same trainer and model on MovieLens-100K. Prompts show ten titles, as the paper's do; lists are as long as 512
tokens allow, and once more no longer than the prompts. Batches are dealt as training deals them, and micro-batches of
about equal tokens run, one of each way in turn. A way's rate is the median of its tokens per second, padding included,
times the targets for each such token in a whole epoch.

    python -m benchmarks.packed [--steps 7] [--tokens 2048]
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from typing import Any

from benchmarks.measuring import at_least, causal_lm_of, quickstart, spread, use_all_cores, write_result
from pplr.backbones.base import Batch
from pplr.backbones.batching import bucketed_batches
from pplr.config import Config
from pplr.runtimes.assembly import load_run_data
from pplr.seeds import generator
from pplr.stages.client_model import ClientModel
from pplr.stages.cut import CutPlan
from pplr.stages.model import CutModel

WAYS = {
    "one target for each prompt": ("data.history_items=10",),
    "lists of 512 tokens": ("backbone.prompt.targets=all", "data.history_items=100"),
    "lists of 11 titles": ("backbone.prompt.targets=all", "data.history_items=10"),
}
"""What is measured, the reference first."""

BATCH = 64
"""Samples of an optimizer step, the paper's; they are sorted by length before they are divided into micro-batches."""


@dataclass(frozen=True)
class Way:
    """A client, some micro-batches of its epoch, and what the whole epoch is made of.

    Args:
        client: The client.
        batches: Micro-batches, drawn evenly.
        samples: Samples of the epoch.
        targets: Titles that are targets in it.
        supervised: Their tokens.
        tokens: All tokens, without padding.
        padded: With padding.
    """

    client: ClientModel
    batches: list[Batch]
    samples: int
    targets: int
    supervised: int
    tokens: int
    padded: int


def prepare(config: Config, count: int, tokens: int) -> Way:
    """Encode real samples, deal an epoch of them, and draw micro-batches of about so many tokens."""
    data, backbone = load_run_data(config), causal_lm_of(config)
    samples = [sample for own in data.samples.values() for sample in own]
    samples = backbone.divide(samples, data.dataset.catalog)
    encoded = backbone.encode(samples, data.dataset.catalog, config.data.history_items)
    lengths = [backbone.length(own) for own in encoded]
    size = max(1, round(tokens * len(lengths) / sum(lengths)))
    parts = [
        places[start : start + size]
        for places in bucketed_batches(lengths, BATCH, 0, "benchmark")
        for start in range(0, len(places), size)
    ]
    drawn = generator(0, "micro-batches").permutation(len(parts))[:count]
    model = CutModel(backbone, CutPlan.make(None, backbone.total_layers), config.adapter, config.training)
    client = model.client("one", model.initial_adapter(0))
    client.begin_round(1000)
    return Way(
        client=client,
        batches=[backbone.collate([encoded[place] for place in parts[number]]) for number in drawn],
        samples=len(encoded),
        targets=sum(own.answer.count(backbone.answer_end) for own in encoded),
        supervised=sum(len(own.answer) for own in encoded),
        tokens=sum(lengths),
        padded=sum(len(places) * max(lengths[place] for place in places) for places in parts),
    )


def take_step(client: ClientModel, batch: Batch) -> float:
    """Take one optimizer step and return its seconds."""
    started = time.perf_counter()
    (client.train_loss(batch, 1) / batch.targets).backward()
    client.optimizer_step(1.0)
    return time.perf_counter() - started


def main() -> None:
    """Measure and write ``packed.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--samples", type=int, help="samples of an epoch; all when absent")
    arguments = parser.parse_args()
    use_all_cores()
    drawn = f"training.samples={arguments.samples or 'null'}"
    ways = {
        name: prepare(quickstart(drawn, *settings), arguments.steps + 1, arguments.tokens)
        for name, settings in WAYS.items()
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for step in range(arguments.steps + 1):
        for name, way in ways.items():
            batch = way.batches[step % len(way.batches)]
            seconds = take_step(way.client, batch)
            if step > 0:  # the first warms up
                rates[name].append(batch.input_ids.numel() / seconds)
        print("  ".join(f"{name} {own[-1]:.0f} tokens/s" for name, own in rates.items() if step), flush=True)
    told: dict[str, Any] = {}
    notes = []
    for name, way in ways.items():
        told[name] = {
            "tokens_per_second_padding_included": spread(rates[name]),
            "targets_per_second": spread([rate * way.targets / way.padded for rate in rates[name]]),
            "supervised_tokens_per_second": spread([rate * way.supervised / way.padded for rate in rates[name]]),
            "tokens_per_target": way.tokens / way.targets,
            "padding": 1 - way.tokens / way.padded,
            "samples": way.samples,
            "targets": way.targets,
        }
        own = told[name]
        notes.append(
            f"{name}: {own['targets_per_second']['median']:.2f} targets and "
            f"{own['supervised_tokens_per_second']['median']:.1f} supervised tokens a second; {way.samples:,} samples "
            f"with {way.targets:,} targets, {own['tokens_per_target']:.1f} tokens for each target, "
            f"{own['padding']:.1%} padding"
        )
        print(notes[-1])
    base, *others = WAYS
    median = {name: own["targets_per_second"]["median"] for name, own in told.items()}
    rows = [at_least(f"supervised targets per second, {others[0]}", base, median[others[0]] / median[base], 10.0)]
    notes.append(f"{others[1]}: {median[others[1]] / median[base]:.2f} times the targets a second of {base}")
    print(f"{rows[0]['name']}: {rows[0]['ratio']:.2f} times those of {base}\n{notes[-1]}")
    write_result("packed", {"rows": rows, "notes": notes, "measured": told})


if __name__ == "__main__":
    main()
