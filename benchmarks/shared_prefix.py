"""Training a batch in one row, what its prompts begin with once, against one padded row for each sample.

The same samples in the same batches as training makes them (near each other in length), with dropout; uncut, and cut
in this process. The two ways take turns, a step each. Tokens are those of the samples in both, so that rates compare.
Before that a step without dropout must give the same loss and the same gradient norm in both.

    python -m benchmarks.shared_prefix [--steps 5] [--batch-size 16]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.measuring import (
    at_least,
    at_most,
    causal_lm_of,
    quickstart,
    real_batch,
    spread,
    use_all_cores,
    write_result,
)
from pplr.backbones.base import Batch
from pplr.backbones.batching import bucketed_batches
from pplr.backbones.causal_lm import CausalLM
from pplr.config import Config, CutConfig
from pplr.stages.client_model import ClientModel
from pplr.stages.cut import CutPlan
from pplr.stages.model import CutModel

CUTS = {"uncut": None, "cut": CutConfig(input_layers=2, output_layers=1)}
WAYS = ("padded", "one row")
BOUND, BYTES = 1.2, 0.9
TOLERANCE = 0.02
"""Largest relative difference of a loss, or of a gradient norm: products are rounded to bfloat16 in both ways."""


def client_of(config: Config, backbone: CausalLM, cut: CutConfig | None) -> ClientModel:
    """Admit a client that starts a long round."""
    model = CutModel(backbone, CutPlan.make(cut, backbone.total_layers), config.adapter, config.training)
    client = model.client("one", model.initial_adapter(0))
    client.begin_round(1000)
    return client


def batches_of(backbone: CausalLM, encoded: Sequence[Any], size: int) -> list[dict[str, Batch]]:
    """Deal samples into batches, each in both ways."""
    dealt = bucketed_batches([backbone.length(own) for own in encoded], size, 0, "shared prefix")
    batches = []
    for places in dealt:
        own = [encoded[place] for place in places]
        batches.append({"padded": backbone.collate(own), "one row": backbone.collate_row(own)})
    return batches


def step(client: ClientModel, batch: Batch, seed: int | None = 1) -> tuple[float, float]:
    """Take an optimizer step; return the loss of an answer token and the gradient norm."""
    loss = client.train_loss(batch, seed) / batch.targets
    loss.backward()
    return float(loss.detach()), client.optimizer_step(1.0)


def check(config: Config, backbone: CausalLM, batch: dict[str, Batch]) -> float:
    """Take a step without dropout in both ways, refuse to go on unless they agree, and return how far apart."""
    told = {way: step(client_of(config, backbone, config.cut), batch[way], None) for way in WAYS}
    far = max(abs(one / other - 1) for one, other in zip(told["one row"], told["padded"], strict=True))
    if not far <= TOLERANCE:
        raise SystemExit(f"error: the two ways do not train alike, loss and gradient norm {told}")
    return far


def measure(config: Config, backbone: CausalLM, steps: int, size: int) -> dict[str, Any]:
    """Check, then let the two ways take turns."""
    encoded = real_batch(config, backbone, size * max(8, steps + 1))
    batches = batches_of(backbone, encoded, size)[: steps + 1]
    far = check(config, backbone, batches[0])
    print(f"loss and gradient norm differ by {far:.2%} at most without dropout", flush=True)
    clients = {cut: {way: client_of(config, backbone, plan) for way in WAYS} for cut, plan in CUTS.items()}
    rates: dict[str, dict[str, list[float]]] = {cut: {way: [] for way in WAYS} for cut in CUTS}
    busy: dict[str, dict[str, float]] = {cut: dict.fromkeys(WAYS, 0.0) for cut in CUTS}
    crossed = dict.fromkeys(WAYS, 0)
    for number, batch in enumerate(batches):
        tokens = batch["padded"].tokens
        for cut, own in clients.items():
            for way, client in own.items():
                before, started, used = client.traffic, time.perf_counter(), time.process_time()
                step(client, batch[way])
                seconds = time.perf_counter() - started
                if number > 0:  # the first warms up
                    rates[cut][way].append(tokens / seconds)
                    busy[cut][way] += time.process_time() - used
                    moved = client.traffic.since(before)
                    crossed[way] += moved.bytes_up + moved.bytes_down
            if number > 0:
                told = ", ".join(f"{way} {rate[-1]:.0f} tokens/s" for way, rate in rates[cut].items())
                print(f"{cut}: {told}", flush=True)
    measured = batches[1:]
    samples = sum(own["padded"].samples for own in measured)
    places = {way: sum(own[way].input_ids.numel() for own in measured) for way in WAYS}
    tokens = sum(own["padded"].tokens for own in measured)
    prefixes = [own["one row"].row.prefix for own in measured if own["one row"].row is not None]
    rows = [
        at_least(
            f"tokens per second in training, batches of {size} in one row, {cut}",
            "the same samples, a padded row each",
            statistics.median(told["one row"]) / statistics.median(told["padded"]),
            BOUND,
        )
        for cut, told in rates.items()
    ]
    ratio = crossed["one row"] / crossed["padded"]
    rows.append(at_most("bytes across the cut, in one row", "rows each, without their padding", ratio, BYTES))
    notes = [
        f"{samples} samples, {tokens:,} tokens; a batch's prompts begin with {min(prefixes)} to {max(prefixes)} tokens "
        f"alike; places computed: {places['padded']:,} padded, {places['one row']:,} in one row, "
        f"{places['padded'] / places['one row']:.2f} times as many",
        *(
            f"{cut}: "
            + ", ".join(f"{way} {statistics.median(rate):.0f} tokens/s" for way, rate in told.items())
            + f"; processor time {busy[cut]['padded'] / busy[cut]['one row']:.2f} times as much padded"
            for cut, told in rates.items()
        ),
        f"across the cut {crossed['padded'] / samples / 1e6:.3f} MB a sample each in its row, "
        f"{crossed['one row'] / samples / 1e6:.3f} MB in one",
        f"without dropout loss and gradient norm of a step are the same up to {far:.2%} ({config.backbone.dtype})",
    ]
    return {
        "tokens_per_second": {cut: {way: spread(own) for way, own in told.items()} for cut, told in rates.items()},
        "processor_seconds": busy,
        "bytes_across_the_cut": crossed,
        "places": places,
        "check": far,
        "rows": rows,
        "notes": notes,
    }


def main() -> None:
    """Measure and write ``shared_prefix.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=16)
    arguments = parser.parse_args()
    use_all_cores()
    torch.manual_seed(0)
    config = quickstart("training.samples=null")
    backbone = causal_lm_of(config)
    measured = measure(config, backbone, arguments.steps, arguments.batch_size)
    print("\n".join(measured["notes"]))
    for row in measured["rows"]:
        print(f"{row['name']} against {row['against']}: {row['ratio']:.3f}, met: {row['met']}")
    write_result("shared_prefix", measured)


if __name__ == "__main__":
    main()
