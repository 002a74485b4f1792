"""What each form of states on the wire saves, and what it changes.

The wire's own encoding and decoding stand between the two sides in one process, so that what is lost is lost just as
on a network. The base is float32, so that float32 on the wire loses nothing.

    python -m benchmarks.wire
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from benchmarks.measuring import at_most, causal_lm_of, quickstart, use_all_cores, write_result
from pplr.backbones.base import Backbone
from pplr.backbones.batching import bucketed_batches
from pplr.config import Config
from pplr.data.prompts import Sample
from pplr.recommend.training import evaluation_loss
from pplr.runtimes import codec
from pplr.runtimes.codec import Limits, Wire
from pplr.runtimes.run_data import load_run_data
from pplr.seeds import derive_seed
from pplr.stages.client_model import ClientModel
from pplr.stages.cut import CutPlan
from pplr.stages.host import StageHost
from pplr.stages.model import CutModel
from pplr.stages.stage import StageCall
from pplr.stages.transport import LocalTransport

CROSSINGS = ("states to the server", "states from the server", "gradients to the server", "gradients from the server")


class WireTransport(LocalTransport):
    """Crosses the cut in this process, but through the wire's encoding; notes what that loses while ``noting``."""

    def __init__(self, host: StageHost, client: str, wire: Wire, width: int) -> None:
        super().__init__(host, client)
        self._wire, self._limits = wire, Limits(width, max_norm=float("inf"))
        self.noting = False
        self.errors: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def _cross(self, states: Tensor, lengths: Tensor, crossing: str) -> Tensor:
        if self.noting:
            for wire in Wire:
                self.errors[wire.value][crossing].append(codec.relative_error(states, lengths, wire))
        message = codec.encode_states(states, lengths, self._wire)
        crossed = len(message.data) + len(message.scales)
        self.traffic.bytes_up += crossed * crossing.endswith("to the server")
        self.traffic.bytes_down += crossed * crossing.endswith("from the server")
        return codec.decode_states(message, self._limits, dtype=states.dtype, device=states.device)[0]

    def forward(self, hidden_states: Tensor, lengths: Tensor, call: StageCall, *, keep_as: int | None) -> Tensor:
        """Run the middle stage: (B, T, D) -> (B, T, D)."""
        entering = self._cross(hidden_states, lengths, CROSSINGS[0])
        leaving = self._host.forward(self._client, entering, call, keep_as=keep_as)
        return self._cross(leaving, lengths, CROSSINGS[1])

    def backward(self, step: int, grad_hidden_states: Tensor, lengths: Tensor) -> Tensor | None:
        """Send a gradient back: (B, T, D) -> (B, T, D), if that pass wants one."""
        leaving = self._host.backward(self._client, step, self._cross(grad_hidden_states, lengths, CROSSINGS[2]))
        return None if leaving is None else self._cross(leaving, lengths, CROSSINGS[3])


def client_of(config: Config, backbone: Backbone, wire: Wire) -> tuple[ClientModel, WireTransport]:
    """Admit a client whose states go through a wire's encoding."""
    plan = CutPlan.make(config.cut, backbone.total_layers)
    host = StageHost(backbone, plan, config.adapter, config.training)
    transport = WireTransport(host, "a", wire, backbone.hidden_size)

    def connect(name: str, _: CutPlan) -> WireTransport:
        host.admit(name, {tensor: torch.zeros(shape) for tensor, shape in host.stage.shapes.items()})
        return transport

    model = CutModel(backbone, plan, config.adapter, config.training, connect=connect)
    return model.client("a", model.initial_adapter(config.run.seed)), transport


def trained(
    config: Config, backbone: Backbone, encoded: list[Any], held_out: list[Any], wire: Wire, steps: int, noted: int
) -> dict[str, Any]:
    """Train for some steps over a wire; what crossed, what was lost in the last of them, and the validation loss."""
    client, transport = client_of(config, backbone, wire)
    size, seed = config.training.batch_size, config.run.seed
    lengths = [backbone.length(sample) for sample in encoded]
    order = bucketed_batches(lengths, size, seed, "wire")[:steps]
    before = evaluation_loss(client, held_out, size)
    client.begin_round(steps)
    start = transport.traffic.reading()
    samples = padded = 0
    for number, positions in enumerate(order):
        batch = backbone.collate([encoded[i] for i in positions])
        transport.noting = wire is Wire.FLOAT32 and number >= steps - noted
        (client.train_loss(batch, derive_seed(seed, "dropout", number)) / batch.targets).backward()
        client.optimizer_step(config.training.clip_norm)
        samples += batch.samples
        padded += 4 * batch.input_ids.numel() * backbone.hidden_size * 4  # float32, both ways, forward and backward
    client.end_round()
    transport.noting = False
    crossed = transport.traffic.since(start)
    return {
        "bytes_per_sample": (crossed.bytes_up + crossed.bytes_down) / samples,
        "padded_float32_bytes_per_sample": padded / samples,
        "relative_error": {
            name: {crossing: statistics.mean(values) for crossing, values in told.items()}
            for name, told in transport.errors.items()
        },
        "loss_before": before,
        "loss": evaluation_loss(client, held_out, size),
    }


def main() -> None:
    """Measure and write ``wire.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--history-items", type=int, default=3, help="short histories, so that it ends soon")
    parser.add_argument("--held-out", type=int, default=96, help="validation samples")
    parser.add_argument("--long-steps", type=int, default=2, help="steps of whole histories, for the bytes on the wire")
    arguments = parser.parse_args()
    use_all_cores()
    base = quickstart("backbone.dtype=float32", "evaluation.validation_users=null", "training.samples=null")
    backbone = causal_lm_of(base)
    runs: dict[str, list[dict[str, Any]]] = {wire.value: [] for wire in Wire}
    long: dict[str, dict[str, Any]] = {}
    for seed in range(arguments.seeds + 1):
        whole_histories = seed == arguments.seeds
        steps = arguments.long_steps if whole_histories else arguments.steps
        config = quickstart(
            "backbone.dtype=float32",
            "evaluation.validation_users=null",
            f"run.seed={seed}",
            f"training.samples={max(steps, 8) * 8}",
            *([] if whole_histories else [f"data.history_items={arguments.history_items}"]),
        )
        data = load_run_data(config)
        items, catalog = config.data.history_items, data.dataset.catalog
        samples = [sample for own in data.samples.values() for sample in own]
        cases = [case for own in data.validation.values() for case in own]
        held_out = [Sample(case.user, case.history, target) for case in cases for target in case.targets]
        held_out = held_out[:: max(1, len(held_out) // arguments.held_out)][: arguments.held_out]
        encoded = backbone.encode(samples, catalog, items)
        kept = backbone.encode(held_out[:8] if whole_histories else held_out, catalog, items)
        for wire in Wire:
            started = time.monotonic()
            told = trained(config, backbone, encoded, kept, wire, steps, noted=5)
            if whole_histories:
                long[wire.value] = told
            else:
                runs[wire.value].append(told)
            print(
                f"seed {seed}, {wire.value}, {steps} steps: {told['bytes_per_sample'] / 1e6:.3f} MB a sample, "
                f"validation loss {told['loss_before']:.4f} -> {told['loss']:.4f}, {time.monotonic() - started:.0f} s",
                flush=True,
            )
    lost = runs["float32"][0]["relative_error"]
    change = {
        name: [own["loss"] - exact["loss"] for own, exact in zip(told, runs["float32"], strict=True)]
        for name, told in runs.items()
    }
    rows = [
        at_most(
            f"bytes on the wire per training sample, {wire.value}",
            "padded float32",
            long[wire.value]["bytes_per_sample"] / long[wire.value]["padded_float32_bytes_per_sample"],
            {Wire.FLOAT32: 1.0, Wire.BFLOAT16: 0.5, Wire.INT8: 0.25}[wire],
        )
        for wire in Wire
    ]
    losses = {name: ", ".join(f"{own['loss']:.4f}" for own in told) for name, told in runs.items()}
    notes = [
        f"{name}: {long[name]['bytes_per_sample'] / 1e6:.3f} MB a sample with whole histories; validation loss after "
        f"{arguments.steps} steps {losses[name]} (before: "
        f"{runs[name][0]['loss_before']:.4f}), against float32 {', '.join(f'{d:+.4f}' for d in change[name])}"
        for name in runs
    ]
    notes += [
        f"relative error, {name}: " + ", ".join(f"{crossing} {value:.2e}" for crossing, value in told.items())
        for name, told in lost.items()
    ]
    for line in [*notes, *(f"{row['name']}: {row['ratio']:.4f}, met: {row['met']}" for row in rows)]:
        print(line)
    write_result(
        "wire",
        {"relative_error": lost, "loss_change": change, "runs": runs, "long": long, "notes": notes, "rows": rows},
    )


if __name__ == "__main__":
    main()
