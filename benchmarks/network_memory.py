"""Memory of a client that holds its own layers alone, and of a server over many sessions.

python -m benchmarks.network_memory
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

import torch

from benchmarks.deployment import Deployment, deployment
from benchmarks.measuring import RESULTS, at_most, backbone_of, quickstart, real_batch, use_all_cores, write_result
from pplr.backbones.base import load_backbone
from pplr.backbones.bundles import read_bundle
from pplr.recommend.generation import generate
from pplr.runtimes.connections import Connections
from pplr.stages.cut import CutPlan
from pplr.stages.model import CutModel

_PEAK = """
from pathlib import Path
print(next(int(x.split()[1]) for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM")))
"""
BASELINES = {
    "torch and transformers": "import torch, transformers",
    "torch and transformers' model code": "import torch\nfrom transformers import AutoTokenizer, LlamaForCausalLM",
}


def baseline(imports: str) -> int:
    """Peak resident bytes of a process that imports and ends."""
    told = subprocess.run([sys.executable, "-c", imports + _PEAK], check=True, capture_output=True, text=True)
    return int(told.stdout) * 1024


def client_memory(place: Deployment, dtype: str, size: int, steps: int, baselines: dict[str, int]) -> dict[str, Any]:
    """Measure a client's process against what it needs, and against one that trains the uncut model."""
    config = quickstart(f"backbone.dtype={dtype}", f"training.samples={steps * size}")
    whole = backbone_of(config)
    encoded = real_batch(config, whole, steps * size)
    batches = [encoded[start : start + size] for start in range(0, len(encoded), size)]
    folder = whole.folder
    del whole
    bundle = read_bundle(place.bundles(dtype)[0])
    threads = torch.get_num_threads()
    overrides = [f"backbone.dtype={dtype}", f"backbone.model={bundle.folder}"]
    held = []
    for options in ((), ("--recompute",)):
        with place.server(dtype, *options) as (address, server):
            server.forget_peak()
            before = server.status("VmRSS")
            name, settings = (f"lean-{dtype}", ["training.recompute=true"]) if options else (f"own-{dtype}", [])
            told, counted = _train(place, name, [*overrides, *settings], batches, address, threads)
            held.append((told, counted, server.status("VmHWM") - before))
    (own, activations, added), (lean, _, lean_added) = held
    overrides[1] = f"backbone.model={folder}"
    with place.client(f"uncut-{dtype}", overrides, batches, warmup=steps, threads=threads) as process:
        uncut = process.answer()
        process.end()
    needed = {name: held + int(1.3 * bundle.stored_bytes) + activations for name, held in baselines.items()}
    label = f"peak of a client's process, {dtype}, {steps} batches of {size}"
    rows = [
        at_most(what, f"{name} imported + 1.3 x bundle + activations", told["peak"] / value, 1.0)
        for what, told in ((label, own), (f"{label}, recompute", lean))
        for name, value in needed.items()
    ]
    rows.append(at_most(label, "a process that trains the uncut model", own["peak"] / uncut["peak"], 1.0))
    what = f"memory that a client in training adds to its server, {dtype}, {steps} batches of {size}"
    rows.append(at_most(f"{what}, --recompute", "without --recompute", lean_added / added, 1.0))
    told = {key: own[key] for key in ("imported", "loaded", "peak")}
    return {
        **told,
        "recompute_peak": lean["peak"],
        "uncut_peak": uncut["peak"],
        "server_added": added,
        "server_added_recompute": lean_added,
        "bundle": bundle.stored_bytes,
        "activations": activations,
        "rows": rows,
    }


def _train(
    place: Deployment, name: str, overrides: list[str], batches: list[Any], address: str, threads: int
) -> tuple[dict[str, Any], int]:
    """Train every batch once in a process of its own; return what it told and the activations of the largest."""
    with place.client(name, overrides, batches, address=address, warmup=len(batches), threads=threads) as client:
        told = client.answer()
        client.ask("count")
        activations = max(sum(parts.values()) for parts in client.answer()["activations"])
        client.end()
    print(f"{name}: {told}, activations {activations}", flush=True)
    return told, activations


def server_memory(place: Deployment, sessions: int, first: int, dtype: str) -> dict[str, Any]:
    """Open session after session, each of which trains a step or writes a few tokens, and watch the server."""
    client_bundle = place.bundles(dtype)[0]
    config = quickstart(f"backbone.model={client_bundle}", f"backbone.dtype={dtype}")
    backbone = load_backbone(config.backbone)
    plan = CutPlan.make(config.cut, backbone.total_layers)
    held: dict[int, int] = {}
    with place.server(dtype) as (address, server):
        idle = server.status("VmRSS")
        connections = Connections(place.kit("sessions"), address)
        model = CutModel(
            backbone, plan, config.adapter, config.training, connect=connections.connector(backbone, config)
        )
        initial = model.initial_adapter(0)
        started = time.monotonic()
        for number in range(1, sessions + 1):
            client = model.client(f"tenant {number}", initial)
            tokens = 4 + number % 5
            if number % 2:
                batch = backbone.pad([list(range(10, 10 + tokens))], [tokens - 2])
                client.begin_round(1)
                (client.train_loss(batch, number) / batch.targets).backward()
                client.optimizer_step(1.0)
                client.end_round()
            else:
                generate(client, [list(range(10, 10 + tokens))], max_new_tokens=2)
            model.dismiss(f"tenant {number}")
            if number in (first, sessions) or number % 100 == 0:
                held[number] = server.status("VmRSS")
                print(f"{number} sessions: {held[number] / 1e6:.1f} MB, {time.monotonic() - started:.0f} s", flush=True)
        connections.close()
    adapter = 4 * sum(tensor.nbytes for name, tensor in initial.items() if name in model._middle_shapes)
    base = read_bundle(place.bundles(dtype)[1]).stored_bytes
    row = at_most(
        f"server's memory after {sessions} sessions", f"after {first} sessions", held[sessions] / held[first], 1.05
    )
    return {"idle": idle, "base": base, "one_tenancy": adapter, "resident": held, "row": row}


def main() -> None:
    """Measure and write ``network_memory.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--sessions", type=int, default=1000)
    parser.add_argument("--first", type=int, default=50)
    parser.add_argument("--server-dtype", default="float32", help="of the sessions' base")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"], help="of the clients' bases")
    parser.add_argument("--only", choices=("client", "server"), help="client: keep what was written of the server")
    arguments = parser.parse_args()
    use_all_cores()
    baselines = {name: baseline(imports) for name, imports in BASELINES.items()}
    bare = {name: baseline(imports) for name, imports in {"python": "", "torch": "import torch"}.items()}
    for name, held in {**bare, **baselines}.items():
        print(f"{name}: {held / 1e6:.0f} MB")
    clients: dict[str, Any] = {}
    server: dict[str, Any] = {}
    with deployment(quickstart().cut) as place:
        if arguments.only != "server":
            for dtype in arguments.dtype:
                clients[dtype] = client_memory(place, dtype, arguments.batch_size, arguments.steps, baselines)
        if arguments.only != "client":
            server = server_memory(place, arguments.sessions, arguments.first, arguments.server_dtype)
    rows = [row for told in clients.values() for row in told.pop("rows")]
    rows += [server.pop("row")] if server else []
    for row in rows:
        print(f"{row['name']} against {row['against']}: {row['ratio']:.3f}, met: {row['met']}")
    if arguments.only == "client" and (path := RESULTS / "network_memory.json").exists():
        kept = json.loads(path.read_text(encoding="utf-8"))  # the server as it was measured before
        server = kept["server"]
        server["resident"] = {int(number): held for number, held in server["resident"].items()}
        rows += [row for row in kept["rows"] if row["name"].startswith("server")]
    if clients and server:
        notes = [f"a process that imports {name}: {held / 1e6:.0f} MB at its peak" for name, held in baselines.items()]
        notes += [
            f"client, {dtype}: {told['imported'] / 1e6:.0f} MB after imports, {told['loaded'] / 1e6:.0f} MB after "
            f"loading, {told['peak'] / 1e6:.0f} MB at its peak, {told['recompute_peak'] / 1e6:.0f} MB with "
            f"training.recompute; bundle {told['bundle'] / 1e6:.0f} MB, activations "
            f"{told['activations'] / 1e6:.0f} MB; uncut {told['uncut_peak'] / 1e6:.0f} MB; it adds "
            f"{told['server_added'] / 1e6:.0f} MB to its server, {told['server_added_recompute'] / 1e6:.0f} MB to one "
            "with --recompute"
            for dtype, told in clients.items()
        ]
        sessions, last = max(server["resident"].items())
        notes.append(
            f"server, {arguments.server_dtype}: {server['idle'] / 1e6:.0f} MB before any session, {last / 1e6:.0f} MB "
            f"after {sessions}; its base {server['base'] / 1e6:.0f} MB, one adapter with gradients and "
            f"moments {server['one_tenancy'] / 1e6:.1f} MB"
        )
        write_result("network_memory", {"clients": clients, "server": server, "notes": notes, "rows": rows})


if __name__ == "__main__":
    main()
