"""A federated round of five clients, against the usual way: HF's Trainer with PEFT, the base loaded for each client.

Both train on the same samples with real histories and mix by the same formula. The usual way is measured in float32
and as ``bf16=True`` runs it on a bfloat16 base; what is bound is the faster of the two. Client by client they take
turns with pplr, so that all meet the same machine. pplr's round is the one of ``pplr train`` with
``training.shared_prefix``, with its checkpoint, the model cut in this process; a padded round and one in float32
follow in each turn. None measures validation. First a small round in float32 without dropout, batches in the same order
in both, must end with the same training loss and the same adapter of every client.

    python -m benchmarks.federated_round [--samples 24] [--rounds 3]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.beside import beside
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
from pplr.runtimes.run_data import load_run_data
from pplr.seeds import generator
from pplr.stages.cut import CutPlan
from pplr.stages.model import CutModel

DType = Literal["float32", "bfloat16"]

BOUND = 3.0
LOSS_TOLERANCE = 1e-5
"""Largest difference of a client's training loss, relative, both in float32."""
ADAPTER_TOLERANCE = 1e-3
"""Largest distance of a client's two adapters, relative to how far training and mixing have moved one.

Adam moves every number by about the rate whatever its gradient measures, so a number whose gradient is near zero may go
either way. One tensor of a hundred that goes the wrong way is a distance of 0.2."""
DTYPES: tuple[DType, ...] = ("float32", "bfloat16")
TRAINING = (
    "training.samples=null",
    "training.local_epochs=1",
    "federation.rounds=1",
    "adapter.dropout=0.05",
    "training.shared_prefix=true",
)
NAME = "a federated round of five clients, SmolLM2-135M, same samples, same loss"
USUAL = "HF Trainer + PEFT, the base loaded for each client, padded, logits everywhere"

Samples = Mapping[str, Sequence[EncodedSample]]


def drawn(config: Config, backbone: CausalLM, count: int) -> dict[str, list[EncodedSample]]:
    """Draw as many of each client's own samples, and encode them."""
    data = load_run_data(config)
    made = {}
    for name, own in data.samples.items():
        places = generator(0, "federated round", name).permutation(len(own))[:count]
        made[name] = backbone.encode([own[int(i)] for i in places], data.dataset.catalog, config.data.history_items)
    return made


def with_dtype(config: Config, dtype: DType) -> Config:
    """Have the base in a number format."""
    return config.model_copy(update={"backbone": config.backbone.model_copy(update={"dtype": dtype})})


class _Turns:
    """Listens to a server round of pplr, and lets each client take its turn in the usual ways before it."""

    def __init__(self, usual: Mapping[DType, Callable[[str], Usual]]) -> None:
        self._usual = usual
        self.told: dict[DType, dict[str, Usual]] = {dtype: {} for dtype in usual}
        self.seconds: dict[str, list[float]] = {way: [] for way in (*usual, "pplr")}
        self.losses: dict[str, float] = {}

    def note(self, line: str) -> None:
        """Print a line."""
        print(line, flush=True)

    @contextmanager
    def task(self, label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        """Time a client's training in every way; pass over validation, which measures nothing."""
        if unit != "samples":
            yield lambda _: None
            return
        name = label.rsplit(" ", 1)[-1]
        for dtype, train in self._usual.items():
            started = time.perf_counter()
            self.told[dtype][name] = train(name)
            self.seconds[dtype].append(time.perf_counter() - started)
        started = time.perf_counter()
        yield lambda _: None
        self.seconds["pplr"].append(time.perf_counter() - started)
        self.note(f"client {name}: " + ", ".join(f"{way} {own[-1]:.1f} s" for way, own in self.seconds.items()))

    def server_round(self, record: Mapping[str, Any]) -> None:
        """Keep each client's training loss."""
        self.losses = {name: own["loss"] for name, own in record["clients"].items()}


def a_round(
    config: Config, backbone: CausalLM, samples: Samples, usual: Sequence[DType] = (), *, in_order: bool = False
) -> dict[str, Any]:
    """Carry out one server round of pplr, and beside it the same in usual ways.

    Args:
        config: Of one round.
        backbone: The base that pplr's clients share.
        samples: Of each client.
        usual: Number formats of the usual ways.
        in_order: Give the usual ways the batches of pplr, rather than shuffle.
    """
    plan = CutPlan.make(config.cut, backbone.total_layers)
    model = CutModel(backbone, plan, config.adapter, config.training)
    initial = model.initial_adapter(0)
    clients = [FederatedClient(n, own, model.client(n, initial), lambda _: {}) for n, own in samples.items()]

    def train(name: str, dtype: DType) -> Usual:
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
            dtype=dtype,
            in_order=in_order,
        )

    turns = _Turns({dtype: lambda name, dtype=dtype: train(name, dtype) for dtype in usual})
    with tempfile.TemporaryDirectory() as folder:
        store = CheckpointStore(Path(folder) / "checkpoints", keep=1, warn=turns.note)
        federation = Federation(clients, make_method(config.federation), initial)
        started = time.perf_counter()
        run_rounds(federation, config, store, turns, Path(folder))
        whole = time.perf_counter() - started
    seconds, apart = {"pplr": whole - sum(sum(turns.seconds[dtype]) for dtype in usual)}, {}
    for dtype, told in turns.told.items():
        started = time.perf_counter()
        mixed = mixed_by_loops([own.adapter for own in told.values()], [own.loss for own in told.values()], 0)
        seconds[dtype] = sum(turns.seconds[dtype]) + time.perf_counter() - started
        ours = [client.model.adapter() for client in clients]
        apart[dtype] = max(_distance(one, other, initial) for one, other in zip(ours, mixed, strict=True))
    losses = {dtype: {name: own.loss for name, own in told.items()} for dtype, told in turns.told.items()}
    return {
        "seconds": seconds,
        "client_seconds": turns.seconds,
        "load_seconds": {d: sum(own.load_seconds for own in told.values()) for d, told in turns.told.items()},
        "loss": {**losses, "pplr": turns.losses},
        "adapters_apart": apart,
    }


def _distance(one: Mapping[str, Any], other: Mapping[str, Any], initial: Mapping[str, Any]) -> float:
    """Say how far two adapters are apart, where the second's way from the initial one is 1."""
    apart = sum(float((one[name].cpu().double() - own.double()).square().sum()) for name, own in other.items())
    moved = sum(float((own.double() - initial[name].cpu().double()).square().sum()) for name, own in other.items())
    return float((apart / moved) ** 0.5)


def check(config: Config, backbone: CausalLM, samples: Samples) -> tuple[float, float]:
    """Train without dropout in both ways, and refuse to go on unless every client ends with the same.

    Args:
        config: Of one round.
        backbone: In float32.
        samples: Of each client.

    Returns:
        The largest relative difference of a loss, and the largest distance of two mixed adapters.
    """
    if config.backbone.dtype != "float32":
        raise SystemExit(f"error: the two ways are compared in float32, not in {config.backbone.dtype}")
    adapter = config.adapter.model_copy(update={"dropout": 0.0})
    training = config.training.model_copy(update={"batch_size": min(4, config.training.batch_size)})
    quiet = config.model_copy(update={"adapter": adapter, "training": training})
    told = a_round(quiet, backbone, samples, ("float32",), in_order=True)
    loss, apart = told["loss"], told["adapters_apart"]["float32"]
    far = max(abs(loss["pplr"][name] / own - 1) for name, own in loss["float32"].items())
    if not (far <= LOSS_TOLERANCE and apart <= ADAPTER_TOLERANCE):
        raise SystemExit(f"error: the two ways do not train alike, adapters {apart:.1e} apart and losses {loss}")
    return far, apart


def measure(config: Config, count: int, rounds: int) -> dict[str, Any]:
    """Check, then measure some rounds."""
    precise = with_dtype(config, "float32")
    exact, backbone = causal_lm_of(precise), causal_lm_of(config)
    samples = drawn(config, backbone, count)
    far, apart = check(precise, exact, {name: own[: max(1, count // 2)] for name, own in samples.items()})
    print(f"without dropout losses differ by {far:.1e} at most, and adapters by {apart:.1e}", flush=True)
    padded = config.model_copy(update={"training": config.training.model_copy(update={"shared_prefix": False})})
    seconds: dict[str, list[float]] = {}
    told, loads = [], dict[DType, list[float]]({dtype: [] for dtype in DTYPES})
    pairs: dict[DType, list[float]] = {dtype: [] for dtype in DTYPES}
    for _ in range(rounds):
        turn = {
            "pplr": a_round(config, backbone, samples, DTYPES),
            "pplr, padded": a_round(padded, backbone, samples),
            "pplr, float32": a_round(precise, exact, samples),
        }
        told.append(turn)
        for way, own in turn.items():
            seconds.setdefault(way, []).append(own["seconds"]["pplr"])
        main = turn["pplr"]
        for dtype in DTYPES:
            seconds.setdefault(dtype, []).append(main["seconds"][dtype])
            loads[dtype].append(main["load_seconds"][dtype])
            took = main["client_seconds"]
            pairs[dtype] += [usual / own for usual, own in zip(took[dtype], took["pplr"], strict=True)]
    return {
        "samples": {name: len(own) for name, own in samples.items()},
        "seconds": {way: spread(own) for way, own in seconds.items()},
        "load_seconds": {dtype: spread(own) for dtype, own in loads.items()},
        "client_ratios": {dtype: spread(own) for dtype, own in pairs.items()},
        "check": {"loss": far, "adapters_apart": apart},
        "rounds": told,
        **_told(config, backbone, samples, seconds, loads, pairs, (far, apart)),
    }


def _told(
    config: Config,
    backbone: CausalLM,
    samples: Samples,
    seconds: Mapping[str, Sequence[float]],
    loads: Mapping[DType, Sequence[float]],
    pairs: Mapping[DType, Sequence[float]],
    checked: tuple[float, float],
) -> dict[str, Any]:
    """Make the rows and the notes."""
    median = {way: statistics.median(own) for way, own in seconds.items()}
    load = {dtype: statistics.median(own) for dtype, own in loads.items()}
    faster, slower = sorted(DTYPES, key=lambda dtype: median[dtype])
    spoken = {"float32": f"{USUAL}, float32", "bfloat16": f"{USUAL}, bf16=True on a bfloat16 base"}
    lengths = [backbone.length(sample) for own in samples.values() for sample in own]
    cut = "uncut" if config.cut is None else f"cut {config.cut.input_layers} + {config.cut.output_layers}"
    rows = [
        at_least(NAME, f"{spoken[faster]} (its faster way)", median[faster] / median["pplr"], BOUND),
        beside(NAME, spoken[slower], median[slower] / median["pplr"]),
        beside(f"{NAME}, pplr in float32", spoken["float32"], median["float32"] / median["pplr, float32"]),
        beside(f"{NAME}, pplr's rows padded", spoken[faster], median[faster] / median["pplr, padded"]),
    ]
    notes = [
        f"{len(samples)} clients, {len(lengths)} samples in all, {sum(lengths):,} tokens ({min(lengths)} to "
        f"{max(lengths)} a sample), one epoch, batches of {config.training.batch_size}; pplr {config.backbone.dtype}, "
        f"{cut} of {backbone.total_layers} blocks in one process, a batch in one row, what prompts share once, with "
        "mixing and checkpoint",
        f"seconds of a round, medians of {len(seconds['pplr'])}: "
        + ", ".join(f"{way if way.startswith('pplr') else 'usual, ' + way} {own:.1f}" for way, own in median.items()),
        *(
            f"usual, {dtype}: {load[dtype]:.1f} s of a round go into loading the base and making the Trainer; without "
            f"them {(median[dtype] - load[dtype]) / median['pplr']:.2f} times the seconds of pplr; of single clients, "
            f"one against the other, {min(own):.2f} to {max(own):.2f} times, median {statistics.median(own):.2f}"
            for dtype, own in pairs.items()
        ),
        "in float32, without dropout and with batches in the same order, every client's training loss is the same up "
        f"to {checked[0]:.1e}, and its mixed adapter up to {checked[1]:.1e} of its way from the initial one",
    ]
    return {"rows": rows, "notes": notes}


def main() -> None:
    """Measure and write ``federated_round.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=24, help="of each client")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", nargs="+", action="extend", default=[], dest="overrides", metavar="FIELD=VALUE")
    arguments = parser.parse_args()
    use_all_cores()
    torch.manual_seed(0)
    config = quickstart("backbone.dtype=bfloat16", *TRAINING, *arguments.overrides)
    measured = measure(config, arguments.samples, arguments.rounds)
    print("\n".join(measured["notes"]))
    for row in measured["rows"]:
        print(f"{row['name']} against {row['against']}: {row['ratio']:.2f}, met: {row['met']}")
    write_result("federated_round", measured)


if __name__ == "__main__":
    main()
