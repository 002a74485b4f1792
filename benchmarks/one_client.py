"""One client as a process of its own, which imports what a client needs and nothing else.

It reads a settings file, prints a line of JSON for each thing it did, and takes its orders line by line.

    python -m benchmarks.one_client SETTINGS.json
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pplr.backbones.base import Backbone, Batch, load_backbone
from pplr.backbones.causal_lm import EncodedSample
from pplr.config import Config
from pplr.config_files import load_config
from pplr.runtimes.connections import Connections
from pplr.runtimes.memory import hand_back_large_blocks, peak_rss_bytes
from pplr.stages.client_model import ClientModel
from pplr.stages.cut import CutPlan
from pplr.stages.model import CutModel

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart_causal_lm.yaml"


def read_batches(backbone: Backbone, rows: list[list[list[list[int]]]]) -> list[Batch]:
    """Collate batches of (prompt, answer)."""
    return [backbone.collate([EncodedSample(tuple(p), tuple(a)) for p, a in batch]) for batch in rows]


def client_of(config: Config, backbone: Backbone, kit: str, address: str, name: str) -> tuple[ClientModel, Connections]:
    """Admit a client to a stage server, and begin a round."""
    connections = Connections(Path(kit), address)
    plan = CutPlan.make(config.cut, backbone.total_layers)
    connect = connections.connector(backbone, config)
    model = CutModel(
        backbone, plan, config.adapter, config.training, connect=connect, in_flight=config.runtime.in_flight
    )
    return _begun(model, name), connections


def uncut_of(config: Config, backbone: Backbone) -> ClientModel:
    """Make the same client of the uncut model, in this process alone."""
    plan = CutPlan.make(None, backbone.total_layers)
    return _begun(CutModel(backbone, plan, config.adapter, config.training), "uncut")


def _begun(model: CutModel, name: str) -> ClientModel:
    client = model.client(name, model.initial_adapter(0))
    client.begin_round(100_000)
    return client


def one_step(client: ClientModel, batch: Batch, seed: int = 1) -> float:
    """Train once, as local training does."""
    loss = client.train_loss(batch, seed) / batch.targets
    loss.backward()
    client.optimizer_step(1.0)
    return float(loss.detach())


def activation_bytes(client: ClientModel, batch: Batch) -> dict[str, int]:
    """Count what a training step of this batch keeps in this process for its backward pass.

    Kept: every storage, once, that autograd saved in the client's stages, but for the model's own tensors and the
    adapter. Logits: (M, V) in float32, M the answer tokens, once, as if they were all computed at a time.
    """
    own = {p.untyped_storage().data_ptr() for p in client.backbone.model.parameters() if not p.is_meta}
    own |= {p.untyped_storage().data_ptr() for member in client._members for p in member.parameters.values()}
    kept: dict[int, int] = {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    client.backbone.loss = lambda states, *_: states.sum()  # type: ignore[method-assign]
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        loss = client.train_loss(batch, 1)
    del client.backbone.loss
    (loss / batch.targets).backward()
    client.optimizer_step(1.0)
    logits = batch.targets * client.backbone.model.config.vocab_size * 4
    return {"kept": sum(kept.values()), "logits": logits}


def timed(function: Any, seconds: dict[str, float], name: str) -> Any:
    """Wrap a function so that its time adds up."""

    def call(*args: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*args, **options)
        finally:
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started

    return call


def tell(**what: Any) -> None:
    """Print a line of JSON."""
    print(json.dumps(what), flush=True)


def main(settings_path: str) -> None:
    """Load, connect, train ``warmup`` batches, then follow orders.

    ``run UNTIL`` trains on its batches in turn, ``run UNTIL FIRST LAST`` on some of them, by the monotonic clock;
    ``count`` counts what a step keeps; the end of its input ends it.
    """
    told = json.loads(Path(settings_path).read_text(encoding="utf-8"))
    torch.set_num_threads(told["threads"])
    if told["address"]:
        hand_back_large_blocks()  # as every command with --kit
    config = load_config(CONFIG, told["overrides"])
    imported = peak_rss_bytes()
    backbone = load_backbone(config.backbone)
    loaded = peak_rss_bytes()
    if told["address"]:
        client, connections = client_of(config, backbone, told["kit"], told["address"], told["name"])
    else:
        client, connections = uncut_of(config, backbone), None
    batches = read_batches(backbone, told["batches"])
    losses = [one_step(client, batch) for batch in batches[: told["warmup"]]]
    tell(imported=imported, loaded=loaded, peak=peak_rss_bytes(), losses=losses)
    step = 0
    for line in sys.stdin:
        order, *rest = line.split()
        if order == "run":
            ends = [time.monotonic()]
            samples = [0]
            until, *span = map(float, rest)
            own = batches[int(span[0]) : int(span[1])] if span else batches
            while ends[-1] < until:
                batch = own[step % len(own)]
                one_step(client, batch, step)
                ends.append(time.monotonic())
                samples.append(batch.samples)
                step += 1
            tell(ends=ends, samples=samples)
        elif order == "count":
            tell(activations=[activation_bytes(client, batch) for batch in batches[: told["warmup"]]])
    if client.transport is not None:
        client.transport.leave()
    if connections is not None:
        connections.close()


if __name__ == "__main__":
    main(sys.argv[1])
