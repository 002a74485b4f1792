"""What an epoch over MovieLens-100K takes with each backbone, cut and uncut, and where the time goes.

Steps on real batches, cut and uncut in turn. Scoring is the loss and its gradient for states that are there already;
the optimizer is timed by itself; the sequence is the rest of a step. The catalog is encoded once: by the base model for
item vectors, by a client's model (and anew for each epoch) for RecFormer.

    python -m benchmarks.epoch [--steps 8] [--configs configs/movielens_item_vectors.yaml ...]
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.measuring import at_least, backbone_of, spread, use_all_cores, write_result
from pplr.backbones.base import Backbone, Batch
from pplr.backbones.batching import bucketed_batches
from pplr.config import Config
from pplr.config_files import load_config
from pplr.recommend.generative import embed_texts
from pplr.runtimes.run_data import load_run_data
from pplr.stages.client_model import ClientModel
from pplr.stages.cut import CutPlan
from pplr.stages.model import CutModel

ROOT = Path(__file__).parent.parent
CONFIGS = tuple(
    ROOT / "configs" / f"{name}.yaml" for name in ("movielens_item_vectors", "movielens_recformer", "movielens_pplr")
)


def take_step(client: ClientModel, batch: Batch) -> dict[str, float]:
    """Take one optimizer step and say what its parts took."""
    states = client.hidden_states(batch).requires_grad_(True)
    started = time.perf_counter()
    client.backbone.loss(states, batch, client.output_end).backward()
    scored = time.perf_counter()
    client.begin_round(1000)  # lets the gradients of this look go
    began = time.perf_counter()
    (client.train_loss(batch, 1) / batch.targets).backward()
    ran = time.perf_counter()
    client.optimizer_step(1.0)
    ended = time.perf_counter()
    scoring = scored - started
    return {
        "step": ended - began,
        "sequence": ran - began - scoring,
        "scoring": scoring,
        "optimizer": ended - ran,
    }


def encode_catalog(backbone: Backbone, config: Config, data: Any) -> float | None:
    """Prepare the backbone with the catalog, nothing cached; return the seconds, or ``None`` where nothing is read."""
    taken: list[float] = []

    def read(texts: Any) -> Any:
        model = CutModel(backbone.text, CutPlan.make(None, backbone.total_layers), config.adapter, config.training)
        client = model.client("reader", model.initial_adapter(0))
        started = time.perf_counter()
        vectors = embed_texts(client, texts, pooling=config.backbone.item_vectors.pooling)
        taken.append(time.perf_counter() - started)
        return vectors

    backbone.prepare(data.dataset.catalog, read)
    return taken[0] if taken else None


def measure(path: Path, steps: int) -> dict[str, Any]:
    """Measure one configuration."""
    config = load_config(path, ["training.samples=null", "runtime.threads=null"])
    backbone, data = backbone_of(config), load_run_data(config)
    catalog = encode_catalog(backbone, config, data)
    samples = [sample for own in data.samples.values() for sample in own]
    encoded = backbone.draw(backbone.encode(samples, data.dataset.catalog, config.data.history_items), 0)
    size = config.training.batch_size
    order = bucketed_batches([backbone.length(own) for own in encoded], size, 0, "benchmark")
    batches = [backbone.collate([encoded[i] for i in places]) for places in order[: steps + 1]]
    clients = {}
    for name, cut in (("uncut", None), ("cut", config.cut)):
        model = CutModel(backbone, CutPlan.make(cut, backbone.total_layers), config.adapter, config.training)
        clients[name] = model.client(name, model.initial_adapter(0))
        started = time.perf_counter()
        clients[name].refresh()
        if backbone.constant and name == "uncut":
            catalog = time.perf_counter() - started
        clients[name].begin_round(1000)
    parts: dict[str, list[dict[str, float]]] = {name: [] for name in clients}
    rates: dict[str, list[float]] = {name: [] for name in clients}
    for number, batch in enumerate(batches):
        for name, client in clients.items():
            told = take_step(client, batch)
            if number > 0:  # the first warms up
                parts[name].append(told)
                rates[name].append(batch.targets / told["step"])
    seconds = {
        name: {part: statistics.median(own[part] for own in told) for part in told[0]} for name, told in parts.items()
    }
    epoch = {name: len(order) * told["step"] for name, told in seconds.items()}
    return {
        "config": path.name,
        "backbone": backbone.name,
        "blocks": backbone.total_layers,
        "samples": len(encoded),
        "batch_size": size,
        "catalog_seconds": catalog,
        "step_seconds": seconds,
        "targets_per_second": {name: spread(told) for name, told in rates.items()},
        "samples_per_second": {name: size / told["step"] for name, told in seconds.items()},
        "epoch_minutes_at_this_rate": {name: told / 60 for name, told in epoch.items()},
    }


def main() -> None:
    """Measure and write ``epoch.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--configs", nargs="+", type=Path, default=CONFIGS)
    arguments = parser.parse_args()
    use_all_cores()
    measured = [measure(path, arguments.steps) for path in arguments.configs]
    rows, notes = [], []
    for own in measured:
        targets = {name: told["median"] for name, told in own["targets_per_second"].items()}
        what = f"{own['backbone']} ({own['config']}, {own['blocks']} blocks)"
        rows.append(at_least(f"targets per second, {what}, cut", "uncut", targets["cut"] / targets["uncut"], 0.9))
        split = own["step_seconds"]["uncut"]
        shares = ", ".join(f"{part} {split[part] / split['step']:.0%}" for part in ("sequence", "scoring", "optimizer"))
        catalog = "nothing of the catalog is encoded"
        if own["catalog_seconds"] is not None:
            catalog = f"encoding the catalog {own['catalog_seconds']:.1f} s"
        notes.append(
            f"{what}: {own['samples_per_second']['uncut']:.1f} samples and {targets['uncut']:.1f} targets a second "
            f"uncut, {own['samples_per_second']['cut']:.1f} and {targets['cut']:.1f} cut; a step's time: {shares}; "
            f"{catalog}; an epoch of {own['samples']:,} samples at this rate: "
            f"{own['epoch_minutes_at_this_rate']['uncut']:.1f} min uncut"
        )
        print(notes[-1], flush=True)
    write_result("epoch", {"rows": rows, "notes": notes, "measured": measured})


if __name__ == "__main__":
    main()
