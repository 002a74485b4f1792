"""A federated round of five clients, against the usual way: HF's Trainer with PEFT, the base loaded for each client.

Both train on the same samples with real histories and mix by the same formula. Client by client the two take turns, so
that both meet the same machine; pplr's round is the one of ``pplr train`` with ``training.shared_prefix``, with its
checkpoint, the model cut in this process. Neither measures validation. First a small round without dropout, batches in
the same order in both, must end with the same training loss of every client.

    python -m benchmarks.federated_round [--samples 16] [--rounds 2]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring import at_least, causal_lm_of, quickstart, spread, use_all_cores, write_result
from benchmarks.reference.plain_loops import mixed_by_loops
from benchmarks.reference.usual_round import Usual, train_usually
from pplr.backbones.batching import bucketed_batches
from pplr.backbones.causal_lm import CausalLM, EncodedSample
from pplr.config import Config
from pplr.federation.checkpoints import CheckpointStore
from pplr.federation.client import FederatedClient
from pplr.federation.methods import make_method
from pplr.federation.rounds import Federation, run_rounds
from pplr.runtimes.assembly import load_run_data
from pplr.seeds import generator
from pplr.stages.cut import CutPlan
from pplr.stages.model import CutModel

BOUND = 3.0
TOLERANCE = 0.01
"""Largest difference of a client's training loss, relative: the base is bfloat16 here, and float32 in the usual way."""
TRAINING = (
    "training.samples=null",
    "training.local_epochs=1",
    "federation.rounds=1",
    "adapter.dropout=0.05",
    "training.shared_prefix=true",
)

Samples = Mapping[str, Sequence[EncodedSample]]


def drawn(config: Config, backbone: CausalLM, count: int) -> dict[str, list[EncodedSample]]:
    """Draw as many of each client's own samples, and encode them."""
    data = load_run_data(config)
    made = {}
    for name, own in data.samples.items():
        places = generator(0, "federated round", name).permutation(len(own))[:count]
        made[name] = backbone.encode([own[int(i)] for i in places], data.dataset.catalog, config.data.history_items)
    return made


class _Turns:
    """Listens to a server round of pplr, and lets each client take its turn in the usual way before it."""

    def __init__(self, usual: Callable[[str], Usual]) -> None:
        self._usual = usual
        self.told: dict[str, Usual] = {}
        self.seconds: dict[str, list[float]] = {"usual": [], "pplr": []}
        self.losses: dict[str, float] = {}

    def note(self, line: str) -> None:
        """Print a line."""
        print(line, flush=True)

    @contextmanager
    def task(self, label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        """Time a client's training in both ways; pass over validation, which measures nothing."""
        if unit != "samples":
            yield lambda _: None
            return
        name = label.rsplit(" ", 1)[-1]
        started = time.perf_counter()
        self.told[name] = self._usual(name)
        between = time.perf_counter()
        yield lambda _: None
        ended = time.perf_counter()
        self.seconds["usual"].append(between - started)
        self.seconds["pplr"].append(ended - between)
        self.note(f"client {name}: usual {between - started:.1f} s, pplr {ended - between:.1f} s")

    def server_round(self, record: Mapping[str, Any]) -> None:
        """Keep each client's training loss."""
        self.losses = {name: own["loss"] for name, own in record["clients"].items()}


def both(config: Config, backbone: CausalLM, samples: Samples, *, in_order: bool = False) -> dict[str, Any]:
    """Carry out one server round in both ways.

    Args:
        config: Of one round.
        backbone: The base that pplr's clients share.
        samples: Of each client.
        in_order: Give the usual way the batches of pplr, rather than shuffle.
    """
    plan = CutPlan.make(config.cut, backbone.total_layers)
    model = CutModel(backbone, plan, config.adapter, config.training)
    initial = model.initial_adapter(0)
    clients = [FederatedClient(n, own, model.client(n, initial), lambda _: {}) for n, own in samples.items()]

    def usual(name: str) -> Usual:
        own = samples[name]
        if in_order:
            lengths = [backbone.length(sample) for sample in own]
            batches = bucketed_batches(lengths, config.training.batch_size, config.run.seed, name, 0, 0)
            own = [own[place] for batch in batches for place in batch]
        return train_usually(
            backbone.folder,
            own,
            initial,
            config.adapter,
            config.training,
            pad_token=backbone.pad_token,
            in_order=in_order,
        )

    turns = _Turns(usual)
    with tempfile.TemporaryDirectory() as folder:
        store = CheckpointStore(Path(folder) / "checkpoints", keep=1, warn=turns.note)
        federation = Federation(clients, make_method(config.federation), initial)
        started = time.perf_counter()
        run_rounds(federation, config, store, turns, Path(folder))
        whole = time.perf_counter() - started
    started = time.perf_counter()
    mixed = mixed_by_loops([own.adapter for own in turns.told.values()], [u.loss for u in turns.told.values()], 0)
    mixing = time.perf_counter() - started
    far = max(
        float((client.model.adapter()[name].cpu() - tensor).abs().max())
        for client, own in zip(clients, mixed, strict=True)
        for name, tensor in own.items()
    )
    trained = sum(turns.seconds["usual"])
    return {
        "seconds": {"usual": trained + mixing, "pplr": whole - trained},
        "client_seconds": turns.seconds,
        "loss": {"usual": {name: own.loss for name, own in turns.told.items()}, "pplr": turns.losses},
        "largest_difference": far,
    }


def check(config: Config, backbone: CausalLM, samples: Samples) -> tuple[float, float]:
    """Train without dropout in both ways, and refuse to go on unless every client ends with the same loss.

    Returns:
        The largest relative difference of a loss, and of a number of the mixed adapters.
    """
    adapter = config.adapter.model_copy(update={"dropout": 0.0})
    training = config.training.model_copy(update={"batch_size": min(4, config.training.batch_size)})
    quiet = config.model_copy(update={"adapter": adapter, "training": training})
    told = both(quiet, backbone, samples, in_order=True)
    loss = told["loss"]
    far = max(abs(loss["pplr"][name] / own - 1) for name, own in loss["usual"].items())
    if not far <= TOLERANCE:
        raise SystemExit(f"error: the two ways do not train alike, losses {loss}")
    return far, told["largest_difference"]


def measure(config: Config, backbone: CausalLM, count: int, rounds: int) -> dict[str, Any]:
    """Check, then measure some rounds."""
    samples = drawn(config, backbone, count)
    far, apart = check(config, backbone, {name: own[: max(1, count // 2)] for name, own in samples.items()})
    print(f"losses differ by {far:.2%} at most without dropout", flush=True)
    told = [both(config, backbone, samples) for _ in range(rounds)]
    seconds = {way: [own["seconds"][way] for own in told] for way in ("usual", "pplr")}
    ratio = statistics.median(seconds["usual"]) / statistics.median(seconds["pplr"])
    pairs = [
        usual / own
        for one in told
        for usual, own in zip(one["client_seconds"]["usual"], one["client_seconds"]["pplr"], strict=True)
    ]
    lengths = [backbone.length(sample) for own in samples.values() for sample in own]
    form = "a batch in one row, what prompts share once" if config.training.shared_prefix else "a padded row each"
    cut = "uncut" if config.cut is None else f"cut {config.cut.input_layers} + {config.cut.output_layers}"
    notes = [
        f"{len(samples)} clients, {count} samples each, {sum(lengths):,} tokens in all ({min(lengths)} to "
        f"{max(lengths)} a sample), one epoch, batches of {config.training.batch_size}; pplr {config.backbone.dtype}, "
        f"{cut} of {backbone.total_layers} blocks in one process, {form}, with mixing and checkpoint",
        f"a round takes {statistics.median(seconds['usual']):.1f} s in the usual way and "
        f"{statistics.median(seconds['pplr']):.1f} s in pplr, medians of {rounds}; of single clients, one against the "
        f"other, {min(pairs):.2f} to {max(pairs):.2f} times, median {statistics.median(pairs):.2f}",
        f"without dropout and with batches in the same order every client's training loss is the same up to {far:.2%}, "
        f"and no number of a mixed adapter differs by more than {apart:.1e} ({config.backbone.dtype} against float32)",
    ]
    return {
        "samples": {name: len(own) for name, own in samples.items()},
        "tokens": sum(lengths),
        "seconds": {way: spread(own) for way, own in seconds.items()},
        "client_ratios": spread(pairs),
        "check": {"loss": far, "adapter": apart},
        "rounds": told,
        "rows": [
            at_least(
                "a federated round of five clients, SmolLM2-135M, same samples, same loss",
                "HF Trainer + PEFT, the base loaded for each client, padded, logits everywhere, float32",
                ratio,
                BOUND,
            )
        ],
        "notes": notes,
    }


def main() -> None:
    """Measure and write ``federated_round.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=16, help="of each client")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--set", nargs="+", action="extend", default=[], dest="overrides", metavar="FIELD=VALUE")
    arguments = parser.parse_args()
    use_all_cores()
    torch.manual_seed(0)
    config = quickstart(*TRAINING, *arguments.overrides)
    backbone = causal_lm_of(config)
    measured = measure(config, backbone, arguments.samples, arguments.rounds)
    print("\n".join(measured["notes"]))
    write_result("federated_round", measured)


if __name__ == "__main__":
    main()
