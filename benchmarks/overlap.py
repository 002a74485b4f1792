"""Client and server at work at the same time: micro-batches in flight, and several clients in one pass of the server.

Three parts: training across TLS with micro-batches in flight against the uncut model; clients at once on a server that
computes their passes as one, against one client at a time and against the same clients at once on a server that takes
each by itself, in turns; and what one pass of several clients can save at all, by function calls in one process. The
ratio to one client at a time has the joint pass in it and the work of clients beside the server's; the ratio to each by
itself has the joint pass alone.

    python -m benchmarks.overlap
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from benchmarks.beside import beside
from benchmarks.deployment import Deployment, Process, deployment
from benchmarks.measuring import at_least, backbone_of, quickstart, real_batch, use_all_cores, write_result
from benchmarks.network import take_turns, train_at_once
from benchmarks.one_client import client_of, uncut_of
from pplr.backbones.base import Batch, load_backbone
from pplr.runtimes.identity import read_kit
from pplr.runtimes.stage_channel import StageChannel
from pplr.runtimes.stage_operator import StageOperator
from pplr.stages.client_model import ClientModel
from pplr.stages.cut import CutPlan
from pplr.stages.host import Asked, StageHost
from pplr.stages.stage import StageCall
from pplr.testing import random_adapter

BOUND = 1.3
SERVERS: dict[str, Callable[[int], tuple[str, ...]]] = {
    "each by itself": lambda count: (),
    "together": lambda count: ("--together", str(count)),
}
"""Options of ``pplr stage serve``."""
_CLIENTS = re.compile(r"^pplr_stage_pass_clients_(sum|count) (\S+)$", re.MULTILINE)


def _step(client: ClientModel, parts: Sequence[Batch], threads: int) -> None:
    torch.set_num_threads(threads)
    client.train_batch(parts, list(range(len(parts))))
    client.optimizer_step(1.0)


def in_flight(place: Deployment, size: int, micro: int, steps: int) -> dict[str, Any]:
    """Train across the network with and without micro-batches in flight, and uncut, by turns."""
    config = quickstart(f"training.samples={size}")
    whole, cores = backbone_of(config), torch.get_num_threads()
    encoded = real_batch(config, whole, size)
    batch = [whole.collate(encoded)]
    parts = [whole.collate(encoded[start : start + micro]) for start in range(0, size, micro)]
    ways: dict[str, Callable[[], None]] = {}
    with ExitStack() as stack:
        own = quickstart(f"backbone.model={place.bundles('bfloat16')[0]}")
        backbone = load_backbone(own.backbone)
        for threads in sorted({1, cores}, reverse=True):
            address, _ = stack.enter_context(place.server("bfloat16", "--threads", str(threads)))
            for flight in (1, 2):
                runtime = own.runtime.model_copy(update={"in_flight": flight})
                name = f"c{threads}{flight}"
                client, connections = client_of(
                    own.model_copy(update={"runtime": runtime}), backbone, str(place.kit(name)), address, name
                )
                stack.callback(connections.close)
                stack.callback(client.transport.leave)  # type: ignore[union-attr]  # or its server waits for the round
                told = f"across, {threads} + {threads} threads"
                if flight == 1:
                    ways[f"{told}, whole batch"] = lambda own=client, n=threads: _step(own, batch, n)
                what = "one after another" if flight == 1 else "2 in flight"
                ways[f"{told}, {what}"] = lambda own=client, n=threads: _step(own, parts, n)
        uncut = uncut_of(config, whole)
        ways["uncut, whole batch"] = lambda: _step(uncut, batch, cores)
        ways["uncut, one after another"] = lambda: _step(uncut, parts, cores)
        seconds = take_turns(ways, steps)
    torch.set_num_threads(cores)
    median = {name: statistics.median(taken) for name, taken in seconds.items()}
    best = min((name for name in median if "flight" in name), key=lambda name: median[name])
    return {
        "seconds": seconds,
        "notes": [f"{name}: median {own:.2f} s a batch of {size}" for name, own in median.items()]
        + [f"micro-batches of {micro}; the best of those in flight: {best}"],
        "rows": [
            at_least(
                "training across the cut with overlap, TLS loopback",
                "the uncut model, in one process, whole batches",
                median["uncut, whole batch"] / median[best],
                0.95,
            )
        ],
    }


def _clients_of_a_pass(place: Deployment, address: str) -> float:
    """Ask a server how many clients were in a pass, on average."""
    channel = StageChannel(address, read_kit(place.kit("operator", "operator")))
    found = {key: float(value) for key, value in _CLIENTS.findall(StageOperator(channel).metrics())}
    channel.close()
    return found["sum"] / max(1.0, found["count"])


def clients(
    place: Deployment, count: int, sizes: Sequence[int], window_s: float, turns: int, most_of_a_pass: int | None = None
) -> dict[str, Any]:
    """Let clients train at once, on a server that takes them together and on one that does not, and one alone.

    Args:
        place: Bundles and kits.
        count: Clients.
        sizes: Samples of a batch; the first is bound.
        window_s: Seconds of one client alone; all at once get four times as many.
        turns: Measurements of each way and size.
        most_of_a_pass: Clients that the one server takes together; all by default.
    """
    most = max(sizes)
    config = quickstart(f"training.samples={2 * count * most}")
    encoded = real_batch(config, backbone_of(config), 2 * count * most)
    model = f"backbone.model={place.bundles('bfloat16')[0]}"
    order = sorted(sizes, reverse=True)  # the largest is the one that warms up
    spans = {size: range(2 * number, 2 * number + 2) for number, size in enumerate(order)}
    rates: dict[int, dict[str, list[float]]] = {size: {"alone": [], **{way: [] for way in SERVERS}} for size in sizes}
    with ExitStack() as stack:
        addresses: dict[str, str] = {}
        started: dict[str, list[Process]] = {}
        for letter, (way, options) in zip("ab", SERVERS.items(), strict=True):
            addresses[way], _ = stack.enter_context(place.server("bfloat16", *options(most_of_a_pass or count)))
            started[way] = []
            for number in range(count):
                own = encoded[2 * number * most : 2 * (number + 1) * most]
                batches = [own[first : first + size] for size in order for first in (0, size)]
                client = place.client(
                    f"{letter}{number}", [model], batches, address=addresses[way], warmup=1,
                    threads=torch.get_num_threads(),
                )  # fmt: skip
                started[way].append(stack.enter_context(client))
            for client in started[way]:
                client.answer()
        for _ in range(turns):
            for size, told in rates.items():
                told["alone"].append(train_at_once(started["each by itself"][:1], window_s, spans[size]))
                for way in SERVERS:
                    told[way].append(train_at_once(started[way], 4 * window_s, spans[size]))
                print(f"batch {size}: " + "  ".join(f"{way} {own[-1]:.2f} samples/s" for way, own in told.items()))
        together = _clients_of_a_pass(place, addresses["together"])
        for client in (own for way in SERVERS for own in started[way]):
            client.end()
    told = {str(size): own for size, own in rates.items()}
    return {"clients": told, "clients_of_a_pass": together, **compared(rates, together, count)}


def compared(rates: Mapping[int, Mapping[str, Sequence[float]]], met: float, count: int) -> dict[str, Any]:
    """Make the rows: clients together against one at a time, of which the first size is bound, and each by itself.

    Args:
        rates: Samples per second of each size and way, one for each turn.
        met: Clients of a pass, on average, where they are taken together.
        count: Clients.
    """
    rows, notes = [], []
    for number, (size, told) in enumerate(rates.items()):
        median = {way: statistics.median(own) for way, own in told.items()}
        name = f"{count} clients on one server, cross-client batches of {size} each"
        alone, apart = median["together"] / median["alone"], median["together"] / median["each by itself"]
        against = "one client at a time"
        rows.append(at_least(name, against, alone, BOUND) if number == 0 else beside(name, against, alone))
        rows.append(beside(name, "the same clients at once, each by itself", apart))
        notes.append(
            f"{count} clients, batches of {size}, medians of {len(told['alone'])}: one alone {median['alone']:.2f} "
            f"samples/s, at once each by itself {median['each by itself']:.2f} "
            f"({median['each by itself'] / median['alone']:.2f} times one alone), together {median['together']:.2f}"
        )
    notes.append(f"where they are taken together, a pass has {met:.1f} clients on average, of all sizes")
    return {"rows": rows, "notes": notes}


def ceiling(count: int, sizes: Sequence[int], turns: int) -> dict[str, Any]:
    """Compute one pass of several clients and one after another, forward and backward, by function calls."""
    rows, notes = [], []
    for dtype in ("float32", "bfloat16"):
        config = quickstart(f"backbone.dtype={dtype}", f"training.samples={count * max(sizes)}")
        backbone = backbone_of(config)
        encoded = real_batch(config, backbone, count * max(sizes))
        host = StageHost(backbone, CutPlan.make(config.cut, backbone.total_layers), config.adapter, config.training)
        for number in range(count):
            host.admit(str(number), random_adapter(host.stage.shapes, seed=number, scale=0.01))
        for size in sizes:
            asked = []
            for number in range(count):
                batch = backbone.collate(encoded[number * size : (number + 1) * size])
                call = StageCall(dropout_seed=number, lengths=batch.lengths)
                asked.append(Asked(str(number), 1, backbone.embed(batch.input_ids), call))
            work = {"alone": 0.0, "together": 0.0}

            def alone(asked: Sequence[Asked] = asked, host: StageHost = host, work: Any = work) -> None:
                began = time.process_time()
                for own in asked:
                    left = host.forward(own.client, own.hidden_states, own.call, keep_as=1)
                    host.backward(own.client, 1, torch.ones_like(left))
                work["alone"] += time.process_time() - began

            def together(asked: Sequence[Asked] = asked, host: StageHost = host, work: Any = work) -> None:
                began = time.process_time()
                left = host.forward_together(asked)
                host.backward_together(
                    [Asked(own.client, 1, torch.ones_like(s)) for own, s in zip(asked, left, strict=True)]
                )
                work["together"] += time.process_time() - began

            seconds = take_turns({"alone": alone, "together": together}, turns)
            ratio = statistics.median(seconds["alone"]) / statistics.median(seconds["together"])
            tokens = sum(own.hidden_states.shape[0] * own.hidden_states.shape[1] for own in asked) // count
            notes.append(
                f"{count} clients of {size} samples ({tokens} tokens) in one pass of the middle blocks, {dtype}: "
                f"{ratio:.2f} times as fast as one after another; processor time {work['alone'] / work['together']:.2f}"
            )
            print(notes[-1], flush=True)
            rows.append({"dtype": dtype, "samples": size, "tokens": tokens, "ratio": ratio, "seconds": seconds})
    return {"passes": rows, "notes": notes}


def main() -> None:
    """Measure and write ``overlap.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5, help="training steps of each way")
    parser.add_argument("--clients", type=int, default=5)
    parser.add_argument("--together", type=int, help="most clients of a pass; all by default")
    parser.add_argument("--client-batches", type=int, nargs="+", default=[4, 1], help="the first is bound")
    parser.add_argument("--window", type=float, default=4.0, help="seconds of one client alone; all at once get more")
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 4], help="samples of each client in a pass")
    parser.add_argument("--turns", type=int, default=3, help="passes of each way")
    parser.add_argument("--only", choices=("in_flight", "clients", "ceiling"))
    arguments = parser.parse_args()
    use_all_cores()
    found: dict[str, Any] = {}
    with deployment(quickstart().cut) as place:
        parts = {
            "in_flight": lambda: in_flight(place, arguments.batch_size, arguments.micro_batch, arguments.steps),
            "clients": lambda: clients(
                place,
                arguments.clients,
                arguments.client_batches,
                arguments.window,
                arguments.windows,
                arguments.together,
            ),
            "ceiling": lambda: ceiling(arguments.clients, arguments.sizes, arguments.turns),
        }
        for name, part in parts.items():
            if arguments.only in (None, name):
                print(f"-- {name}", flush=True)
                found[name] = part()
    notes = [note for told in found.values() for note in told.pop("notes")]
    rows = [row for told in found.values() for row in told.pop("rows", [])]
    print("\n".join(notes))
    for row in rows:
        print(f"{row['name']} against {row['against']}: {row['ratio']:.3f}, met: {row['met']}")
    if arguments.only is None:
        write_result("overlap", {**found, "notes": notes, "rows": rows})


if __name__ == "__main__":
    main()
