"""Item vectors beside SASRec of RecTools: targets a second in training, and what each has learned in the same time.

Both train on the pooled train parts of the same holdout, on as many threads, for as long, once each and without a stop
in between: SASRec by one ``fit`` that a callback ends. The rate is that of the whole training, its targets by its
seconds; the time in which they are tested, by the same evaluation, does not count. SASRec is much the smaller model:
one 64 numbers wide, where the other reads histories by blocks of an LLM. A target is a position whose item is to be
told from the catalog.

    python -m benchmarks.sasrec_speed [--seconds 60]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.beside import beside
from benchmarks.epoch import ROOT
from benchmarks.measuring import backbone_of, use_all_cores, write_result
from benchmarks.packed import take_step
from benchmarks.sasrec import Scored, add_arguments, environment, task
from pplr.backbones.base import Batch
from pplr.backbones.batching import bucketed_batches
from pplr.config import Config
from pplr.config_files import load_config
from pplr.progress import Silent
from pplr.recommend.evaluation import evaluate
from pplr.recommend.training import train_locally
from pplr.runtimes.assembly import Assembly

CONFIG = ROOT / "configs" / "movielens_item_vectors.yaml"
POOLED = ("federation.method=centralized", "training.batch_size=16", "training.schedule=constant")


class _TimeIsUp(Exception):  # noqa: N818  (no error)
    """Ends training from within."""


def item_vectors(config: Config, seconds: float) -> tuple[dict[str, Any], Assembly]:
    """Train once for some seconds; return what the whole of it reached, and the figures of the test."""
    backbone = backbone_of(config)
    assembly = Assembly(config, Silent(), backbone)
    client = assembly.federated_client(assembly.trainers[0])
    drawn = backbone.draw(client.encoded, 0)
    order = bucketed_batches([backbone.length(own) for own in drawn], config.training.batch_size, 0, "speed")
    other = assembly.admit("another", assembly.initial)
    other.begin_round(1000)
    take_step(other, backbone.collate([drawn[place] for place in order[0]]))  # warms up
    assembly.dismiss("another")
    samples, counted, taken, begun, train_batch = 0, 0, 0.0, time.monotonic(), client.model.train_batch

    def count(parts: Sequence[Batch], seeds: Sequence[int | None]) -> list[float]:
        nonlocal counted
        counted += sum(part.targets for part in parts)
        return train_batch(parts, seeds)

    def advance(done: int) -> None:
        nonlocal samples, taken
        samples, taken = samples + done, time.monotonic() - begun
        if taken >= seconds:
            raise _TimeIsUp

    client.model.train_batch = count  # type: ignore[method-assign]
    training = config.training.model_copy(update={"local_epochs": 10_000})
    with contextlib.suppress(_TimeIsUp):
        train_locally(
            client.model, client.encoded, training, client="pooled", server_round=0, rounds=1, seed=0, advance=advance
        )
    tested = evaluate(assembly.ranker(client.model), assembly.data.test, [10], config.evaluation.batch_size)
    told = {
        "targets": counted,
        "targets_per_second": counted / taken,
        "epochs": samples / len(client.encoded),
        "seconds": taken,
        "test": tested.overall(),
    }
    return told, assembly


def sasrec(assembly: Assembly, seconds: float) -> dict[str, Any]:
    """Train SASRec for as long in its own environment, and test its scores."""
    parser = argparse.ArgumentParser()
    add_arguments(parser, widths=(64,), dropouts=(0.2,), lengths=(50,))
    told = task(assembly.data, [0], parser.parse_args([])) | {"seconds": seconds}
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "histories.json", Path(folder) / "scores.npz"
        source.write_text(json.dumps(told), encoding="utf-8")
        command = [environment(), str(Path(__file__).with_name("rectools_sasrec.py")), str(source), str(out)]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": ""})
        with np.load(out) as tables:
            summary = json.loads(str(tables["summary"]))
            ranker = Scored(tables["seed_0"], list(told["test_histories"]))
    tested = evaluate(ranker, assembly.data.test, [10], assembly.config.evaluation.batch_size)
    own = summary["runs"][0]
    return {
        "targets": own["targets"],
        "targets_per_second": own["targets"] / own["seconds"],
        "epochs": own["epochs"],
        "seconds": own["seconds"],
        "test": tested.overall(),
    }


def summed_up(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Put both beside each other; the row has no bound."""
    notes = [
        f"{name}: {own['epochs']:.1f} epochs in {own['seconds']:.0f} s, test NDCG@10 {own['test']['ndcg@10']:.4f}, "
        f"Recall@10 {own['test']['recall@10']:.4f}"
        for name, own in (("item vectors", ours), ("SASRec", theirs))
    ]
    rate, other = ours["targets_per_second"], theirs["targets_per_second"]
    notes.insert(0, f"targets a second over the whole training: item vectors {rate:,.0f}, SASRec {other:,.0f}")
    row = beside(
        "item vectors, targets a second, whole training step",
        "SASRec of RecTools (64 wide, 2 blocks, length 50) on the same data, one fit",
        rate / other,
    )
    return {"item_vectors": ours, "sasrec": theirs, "rows": [row], "notes": notes}


def main() -> None:
    """Measure and write ``sasrec_speed.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="for which each trains")
    parser.add_argument("--set", nargs="+", action="extend", default=[], dest="overrides", metavar="FIELD=VALUE")
    arguments = parser.parse_args()
    use_all_cores()
    config = load_config(CONFIG, [*POOLED, *arguments.overrides])
    ours, assembly = item_vectors(config, arguments.seconds)
    print(f"item vectors: {ours['test']}", flush=True)
    measured = summed_up(ours, sasrec(assembly, arguments.seconds))
    print("\n".join(measured["notes"]))
    write_result("sasrec_speed", measured)


if __name__ == "__main__":
    main()
