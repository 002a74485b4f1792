"""Similarity and mixing of many clients' adapters, on disk: time, peak memory, against plain loops and Flower's FedAvg.

The adapters are random numbers in the shapes of SmolLM2-135M's LoRA of rank 8 on the query and value projections. Each
number of clients is measured in a process of its own, three times. The plain loops, the formula written out client by
client in memory, run on the same bits of input, and take turns with pplr; of many clients they make a few mixtures, and
the time of all is worked out from the median of these. A whole round of a federation's server is measured beside it,
once: every report is checked and written as it comes, then all are mixed, then the round is checkpointed.

    python -m benchmarks.aggregation [--clients 10 100 1000] [--method pplr]
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measuring import at_least, at_most, spread, use_all_cores, write_result
from benchmarks.reference.plain_loops import mixed_by_loops
from pplr.backbones.adapters import PEFT_PREFIX, AdapterState
from pplr.config import Config, FederationConfig
from pplr.federation.aggregation import SIMILARITIES, mix_on_disk, similarity
from pplr.federation.checkpoints import CheckpointStore
from pplr.federation.decisions import Trained
from pplr.federation.methods import RoundView, make_method
from pplr.federation.server import FederationServer
from pplr.federation.stacks import StoredAdapters
from pplr.recommend.local_result import LocalResult
from pplr.runtimes.memory import peak_rss_bytes

RANK, LAYERS, WIDTH, VALUES = 8, 30, 576, 192
LOOPED = {10: 1.0, 1000: 50.0}
"""Numbers of clients that are mixed by plain loops too, and how many times as fast pplr should be."""
SOME = 5
"""Most clients whose mixtures the loops make."""
TURNS = 3
"""How often pplr mixes."""
IN_MEMORY = 100
"""Most clients whose adapters Flower's own strategy is given at once, and that are compared by every similarity."""
SECONDS, BYTES = 30.0, 2e9


def shapes() -> dict[str, tuple[int, ...]]:
    """Name LoRA's factors on SmolLM2-135M's query and value projections."""
    made: dict[str, tuple[int, ...]] = {}
    for layer in range(LAYERS):
        for name, out in (("q_proj", WIDTH), ("v_proj", VALUES)):
            start = f"{PEFT_PREFIX}model.layers.{layer}.self_attn.{name}"
            made |= {f"{start}.lora_A.weight": (RANK, WIDTH), f"{start}.lora_B.weight": (out, RANK)}
    return made


def draw(client: int) -> AdapterState:
    """Draw a client's adapter: one start for all, and what was learned besides."""
    source, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(client + 1)
    return {
        name: 0.02 * torch.randn(shape, generator=source) + 0.005 * torch.randn(shape, generator=own)
        for name, shape in shapes().items()
    }


def view_of(adapters: Any, clients: int) -> RoundView:
    """Make what the server knows after a round of local training."""
    losses = np.random.default_rng(0).normal(3.0, 0.1, clients).tolist()
    return RoundView(1, adapters, {name: torch.zeros(shape) for name, shape in shapes().items()}, losses, [1] * clients)


def measure(clients: int, method: str, folder: Path) -> dict[str, float]:
    """Weigh and mix in this process."""
    use_all_cores()
    adapters = StoredAdapters(folder / "before")
    into = StoredAdapters.create(folder / "after", adapters.shapes, clients)
    before = peak_rss_bytes()
    started = time.perf_counter()
    mixing = make_method(FederationConfig(method=method, clients=clients)).mixing(view_of(adapters, clients))
    weighed = time.perf_counter()
    if mixing.weights is None:
        raise SystemExit(f"{method} mixes nothing")
    mix_on_disk(adapters, mixing.weights, into)
    ended = time.perf_counter()
    return {
        "weighing": weighed - started,
        "mixing": ended - weighed,
        "total": ended - started,
        "peak_rss_bytes": peak_rss_bytes(),
        "before_rss_bytes": before,
    }


def measure_similarities(clients: int, folder: Path) -> dict[str, float]:
    """Compare the adapters by each similarity in this process, and say how long each takes."""
    use_all_cores()
    adapters, initial = StoredAdapters(folder / "before"), draw(clients)
    seconds = {}
    for of in SIMILARITIES:
        started = time.perf_counter()
        similarity(adapters, initial, of=of)
        seconds[of] = time.perf_counter() - started
    return seconds


def measure_server(clients: int, method: str, folder: Path) -> dict[str, float]:
    """Carry out one round of a federation's server in this process, whose clients' reports are drawn here."""
    use_all_cores()
    federation = FederationConfig(method=method, clients=clients, rounds=1)
    names = [f"{number:06d}" for number in range(clients)]
    store = CheckpointStore(folder / "checkpoints", keep=1, warn=print)
    initial = {name: torch.zeros(shape) for name, shape in shapes().items()}
    config = Config(federation=federation)
    server = FederationServer(config, make_method(federation), names, initial, store, print)
    losses = np.random.default_rng(0).normal(3.0, 0.1, clients).tolist()
    before = peak_rss_bytes()
    server.begin()
    taking = 0.0
    for number, name in enumerate(names):
        result = LocalResult(samples=1, steps=1, tokens=1, targets=1, loss=losses[number], seconds=0.0)
        trained = Trained(result, 1, draw(number))
        started = time.perf_counter()
        server.take(name, trained)
        taking += time.perf_counter() - started
    started = time.perf_counter()
    server.mix()
    mixed = time.perf_counter()
    server.finish({name: {"loss": 1.0} for name in names}, names, {})
    ended = time.perf_counter()
    return {
        "taking": taking,
        "mixing": mixed - started,
        "checkpoint": ended - mixed,
        "total": taking + ended - started,
        "peak_rss_bytes": peak_rss_bytes(),
        "before_rss_bytes": before,
    }


def against_loops(clients: int, some: Sequence[int], folder: Path) -> dict[str, Any]:
    """Mix by plain loops in memory, in turns with pplr on disk in a process of its own.

    Args:
        clients: C.
        some: Clients whose mixture the loops make, the one after the other.
        folder: To work in.

    Returns:
        Seconds of the loops' norms, which all mixtures need once, and of a mixture; of all that makes, which is worked
        out from the medians of both; of pplr; the ratio; and the largest difference of a number.
    """
    states = [draw(client) for client in range(clients)]
    stack = StoredAdapters.create(folder / "before", shapes(), clients)
    for number, state in enumerate(states):
        stack.put(number, state)
    losses = view_of(stack, clients).losses
    norms: list[float] = []
    mixtures: list[float] = []
    totals: list[float] = []
    worst = 0.0
    for turn in range(max(len(some), TURNS)):
        if turn < TURNS:
            totals.append(measured_apart(clients, "pplr", folder)["total"])
        if turn < len(some):
            started = time.perf_counter()
            mixed_by_loops(states, losses, 1, ())
            ended = time.perf_counter()
            (expected,) = mixed_by_loops(states, losses, 1, some[turn : turn + 1])
            norms.append(ended - started)
            mixtures.append(time.perf_counter() - ended - norms[-1])
            found = StoredAdapters(folder / "after").get(some[turn])
            worst = max(worst, *(float((found[name] - tensor).abs().max()) for name, tensor in expected.items()))
    looped = statistics.median(norms) + clients * statistics.median(mixtures)
    return {
        "norms": spread(norms),
        "mixture": spread(mixtures),
        "looped": looped,
        "seconds": spread(totals),
        "ratio": looped / statistics.median(totals),
        "worst": worst,
    }


def told_of_loops(clients: int, told: dict[str, Any]) -> str:
    """Say what was measured of the loops and of pplr, and what was worked out."""
    made, here = told["mixture"], told["seconds"]
    few = made["count"] < clients
    how = f"{told['looped']:.1f} s" + (f", of which {made['count']} mixtures were made and the rest worked out" * few)
    return (
        f"{clients:,} clients by plain loops, in float64 in memory: {how} (a mixture takes {made['median']:.3g} s, "
        f"{made['lowest']:.3g} to {made['highest']:.3g}, the norms {told['norms']['median']:.3g} s); in turns with "
        f"them here {here['median']:.2f} s from disk to disk ({here['lowest']:.2f} to {here['highest']:.2f} over "
        f"{here['count']} runs); largest difference of a mixed number {told['worst']:.1e}"
    )


def against_flower(clients: int, folder: Path) -> dict[str, float]:
    """Average the same adapters by Flower's FedAvg, which holds them in memory and makes one average.

    Returns:
        Its seconds, and how far its average is from that of ``fedavg`` here at most.
    """
    from pplr.runtimes.flower_settings import load_flower

    load_flower()
    from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
    from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

    use_all_cores()
    stack = StoredAdapters(folder / "before")
    records = []
    for client in range(clients):
        arrays = ArrayRecord({name: Array(tensor.numpy()) for name, tensor in stack.get(client).items()})
        records.append(RecordDict({"arrays": arrays, "metrics": MetricRecord({"samples": 1})}))
    started = time.perf_counter()
    average = aggregate_arrayrecords(records, "samples")
    seconds = time.perf_counter() - started
    measure(clients, "fedavg", folder)
    ours = StoredAdapters(folder / "after").get(0)
    worst = max(float(np.abs(average[name].numpy() - tensor.numpy()).max()) for name, tensor in ours.items())
    return {"seconds": seconds, "largest_difference": worst}


def measured_apart(clients: int, method: str, folder: Path, what: str = "mixing") -> dict[str, float]:
    """Measure the mixing, Flower or a server's round in a process that does nothing else."""
    command = [sys.executable, "-m", "benchmarks.aggregation", "--method", method, "--what", what]
    command += ["--measure", str(clients), str(folder)]
    shutil.rmtree(folder / "after", ignore_errors=True)
    told: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return told


def in_a_process(clients: int, method: str, what: str = "mixing", times: int = 1) -> dict[str, float]:
    """Draw the adapters, then measure in a process of its own.

    Returns:
        The median of what was measured so many times, and the most memory.
    """
    with tempfile.TemporaryDirectory() as name:
        if what != "server":
            stack = StoredAdapters.create(Path(name) / "before", shapes(), clients)
            for client in range(clients):
                stack.put(client, draw(client))
        runs = [measured_apart(clients, method, Path(name), what) for _ in range(times)]
    return {key: (max if key.endswith("_bytes") else statistics.median)(run[key] for run in runs) for key in runs[0]}


def main() -> None:
    """Measure and write ``benchmarks/results/aggregation.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", nargs="+", type=int, default=[10, 100, 1000])
    parser.add_argument("--method", default="pplr")
    parser.add_argument("--measure", nargs=2, metavar=("CLIENTS", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument(
        "--what", choices=("mixing", "similarities", "flower", "server"), default="mixing", help=argparse.SUPPRESS
    )
    arguments = parser.parse_args()
    if arguments.measure:
        clients, folder = int(arguments.measure[0]), Path(arguments.measure[1])
        if arguments.what == "flower":
            told = against_flower(clients, folder)
        elif arguments.what == "similarities":
            told = measure_similarities(clients, folder)
        else:
            measured_by = measure if arguments.what == "mixing" else measure_server
            told = measured_by(clients, arguments.method, folder)
        print(json.dumps(told))
        return
    use_all_cores()
    rows, notes, loops = [], [], {}
    for clients, bound in LOOPED.items():
        if clients > max(arguments.clients):
            continue
        some = range(min(clients, SOME))
        with tempfile.TemporaryDirectory() as name:
            loops[str(clients)] = told = against_loops(clients, some, Path(name))
        rows.append(at_least(f"aggregation, {clients:,} clients", "the formula in plain loops", told["ratio"], bound))
        notes.append(told_of_loops(clients, told))
        print(notes[-1], flush=True)
    size = 4 * sum(int(np.prod(shape)) for shape in shapes().values())
    curve: dict[str, Any] = {}
    for clients in arguments.clients:
        measured = in_a_process(clients, arguments.method, times=TURNS)
        curve[str(clients)] = measured
        held = f"peak {measured['peak_rss_bytes'] / 1e6:.0f} MB, {measured['before_rss_bytes'] / 1e6:.0f} MB before"
        notes.append(
            f"{clients} clients, {size / 1e6:.2f} MB each: {measured['total']:.2f} s (similarity and weights "
            f"{measured['weighing']:.2f} s, mixing {measured['mixing']:.2f} s), {held} it began; medians of "
            f"{TURNS} runs"
        )
        if clients == 1000:
            rows.append(at_most(f"seconds of {clients} clients", f"{SECONDS:.0f} s", measured["total"] / SECONDS, 1.0))
            peak = measured["peak_rss_bytes"] / BYTES
            rows.append(at_most(f"peak memory of {clients} clients", f"{BYTES / 1e9:.0f} GB", peak, 1.0))
    compared: dict[str, Any] = {}
    for clients in [clients for clients in arguments.clients if clients <= IN_MEMORY]:
        compared[str(clients)] = told = in_a_process(clients, arguments.method, "similarities")
        shares = ", ".join(f"{of} {seconds:.2f} s" for of, seconds in told.items())
        notes.append(f"{clients} clients compared by each similarity, once: {shares}")
    served: dict[str, Any] = {}
    for clients in arguments.clients:
        measured = in_a_process(clients, arguments.method, "server")
        served[str(clients)] = measured
        notes.append(
            f"a server's round of {clients} clients, run once: {measured['total']:.2f} s (checking and writing reports "
            f"{measured['taking']:.2f} s, mixing {measured['mixing']:.2f} s, checkpoint with each client's best "
            f"{measured['checkpoint']:.2f} s), peak {measured['peak_rss_bytes'] / 1e6:.0f} MB"
        )
        if clients == 1000:
            peak = measured["peak_rss_bytes"] / BYTES
            rows.append(
                at_most(f"peak memory of a server's round, {clients} clients", f"{BYTES / 1e9:.0f} GB", peak, 1.0)
            )
    flower: dict[str, Any] = {}
    for clients in [clients for clients in arguments.clients if clients <= IN_MEMORY]:
        own, theirs = in_a_process(clients, "fedavg"), in_a_process(clients, "fedavg", "flower")
        flower[str(clients)] = theirs | {"fedavg_here_seconds": own["total"]}
        notes.append(
            f"FedAvg of {clients} clients, run once: Flower's {theirs['seconds']:.2f} s for one average in memory, "
            f"fedavg here {own['total']:.2f} s, in which {clients} adapters are read from disk and {clients} are "
            f"written; numbers differ by {theirs['largest_difference']:.1e} at most"
        )
    write_result(
        "aggregation",
        {"flower": flower, "rows": rows, "notes": notes, "curve": curve, "server": served, "loops": loops}
        | {"similarities": compared},
    )


if __name__ == "__main__":
    main()
