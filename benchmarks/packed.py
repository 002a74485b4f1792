"""Supervised targets per second of lists, every title a target, against one target for each prompt.

The same trainer and model on MovieLens-100K. Prompts show ten titles, as the paper's do, and are measured padded and
in one row that holds what they share once (``training.shared_prefix``); what is bound is the faster of the two. Lists
are as long as 512 tokens allow, and once more no longer than the prompts. Batches are dealt as training deals them, and
micro-batches of about equal tokens run, one of each way in turn. A way's rate is the median of its samples' tokens per
second, without padding, times the targets for each such token in a whole epoch.

    python -m benchmarks.packed [--steps 7] [--tokens 2048]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.beside import beside
from benchmarks.measuring import at_least, causal_lm_of, quickstart, spread, use_all_cores, write_result
from pplr.backbones.base import Batch
from pplr.backbones.batching import bucketed_batches
from pplr.config import Config
from pplr.runtimes.run_data import load_run_data
from pplr.seeds import generator
from pplr.stages.client_model import ClientModel
from pplr.stages.cut import CutPlan
from pplr.stages.model import CutModel

BASES = {
    "one target for each prompt, padded": ("data.history_items=10",),
    "one target for each prompt, in one row": ("data.history_items=10", "training.shared_prefix=true"),
}
"""The references."""

LISTS = {
    "lists of 512 tokens": ("backbone.prompt.targets=all", "data.history_items=100"),
    "lists of 11 titles": ("backbone.prompt.targets=all", "data.history_items=10"),
}
"""What is compared with the faster of them; the first is bound."""

BOUND = 10.0
BATCH = 64
"""Samples of an optimizer step, the paper's; they are sorted by length before they are divided into micro-batches."""


@dataclass(frozen=True)
class Way:
    """A client, some micro-batches of its epoch, and what the whole epoch is made of.

    Args:
        client: The client.
        batches: Micro-batches, drawn evenly.
        sizes: Tokens of each one's samples, those that a row holds once counted for every sample.
        samples: Samples of the epoch.
        targets: Titles that are targets in it.
        supervised: Their tokens.
        tokens: All tokens, without padding.
    """

    client: ClientModel
    batches: list[Batch]
    sizes: list[int]
    samples: int
    targets: int
    supervised: int
    tokens: int


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
    collate = backbone.collate_row if config.training.shared_prefix else backbone.collate
    return Way(
        client=client,
        batches=[collate([encoded[place] for place in parts[number]]) for number in drawn],
        sizes=[sum(lengths[place] for place in parts[number]) for number in drawn],
        samples=len(encoded),
        targets=sum(own.answer.count(backbone.answer_end) for own in encoded),
        supervised=sum(len(own.answer) for own in encoded),
        tokens=sum(lengths),
    )


def take_step(client: ClientModel, batch: Batch) -> float:
    """Take one optimizer step and return its seconds."""
    started = time.perf_counter()
    (client.train_loss(batch, 1) / batch.targets).backward()
    client.optimizer_step(1.0)
    return time.perf_counter() - started


def measure(configs: Mapping[str, Config], steps: int, tokens: int) -> dict[str, Any]:
    """Let the ways take turns.

    Args:
        configs: Of each way, those of :data:`BASES` and :data:`LISTS`.
        steps: Measured steps of each.
        tokens: Of a micro-batch, about.
    """
    ways = {name: prepare(config, steps + 1, tokens) for name, config in configs.items()}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for step in range(steps + 1):
        for name, way in ways.items():
            number = step % len(way.batches)
            seconds = take_step(way.client, way.batches[number])
            if step > 0:  # the first warms up
                rates[name].append(way.sizes[number] / seconds)
        print("  ".join(f"{name} {own[-1]:.0f} tokens/s" for name, own in rates.items() if step), flush=True)
    told: dict[str, Any] = {}
    for name, way in ways.items():
        places = sum(batch.input_ids.numel() for batch in way.batches)
        told[name] = {
            "tokens_per_second": spread(rates[name]),
            "targets_per_second": spread([rate * way.targets / way.tokens for rate in rates[name]]),
            "supervised_tokens_per_second": spread([rate * way.supervised / way.tokens for rate in rates[name]]),
            "tokens_per_target": way.tokens / way.targets,
            "places_per_token": places / sum(way.sizes),
            "samples": way.samples,
            "targets": way.targets,
        }
    return summed_up(told)


def summed_up(told: dict[str, Any]) -> dict[str, Any]:
    """Compare lists with the faster way of one target for each prompt, which is bound, and with the other."""
    median = {name: own["targets_per_second"]["median"] for name, own in told.items()}
    slower, faster = sorted(BASES, key=lambda name: median[name])
    bound, short = LISTS
    name = "supervised targets per second"
    rows = [
        at_least(f"{name}, {bound}", f"{faster} (the faster way)", median[bound] / median[faster], BOUND),
        beside(f"{name}, {bound}", slower, median[bound] / median[slower]),
        beside(f"{name}, {short}", faster, median[short] / median[faster]),
    ]
    notes = [
        f"{name}: {own['targets_per_second']['median']:.2f} targets and "
        f"{own['supervised_tokens_per_second']['median']:.1f} supervised tokens a second; {own['samples']:,} samples "
        f"with {own['targets']:,} targets, {own['tokens_per_target']:.1f} tokens for each target, "
        f"{own['places_per_token']:.2f} places computed for each token"
        for name, own in told.items()
    ]
    return {"rows": rows, "notes": notes, "measured": told}


def main() -> None:
    """Measure and write ``packed.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--samples", type=int, help="samples of an epoch; all when absent")
    arguments = parser.parse_args()
    use_all_cores()
    drawn = f"training.samples={arguments.samples or 'null'}"
    configs = {name: quickstart(drawn, *settings) for name, settings in {**BASES, **LISTS}.items()}
    measured = measure(configs, arguments.steps, arguments.tokens)
    print("\n".join(measured["notes"]))
    for row in measured["rows"]:
        print(f"{row['name']} against {row['against']}: {row['ratio']:.2f}, met: {row['met']}")
    write_result("packed", measured)


if __name__ == "__main__":
    main()
