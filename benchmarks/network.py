"""What the network costs: training and generation across TLS on loopback, and five clients of one server at once.

The server, and each of the five clients, is a process of its own; they share the cores of this machine.

    python -m benchmarks.network
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, SuppressTokensLogitsProcessor

from benchmarks.deployment import Deployment, Process, deployment
from benchmarks.measuring import at_least, at_most, backbone_of, quickstart, real_batch, use_all_cores, write_result
from benchmarks.one_client import client_of, one_step, timed, uncut_of
from pplr.backbones.base import load_backbone
from pplr.recommend.generation import generate
from pplr.runtimes import codec
from pplr.runtimes.identity import read_kit
from pplr.runtimes.stage_channel import StageChannel
from pplr.runtimes.stage_operator import StageOperator

_SERVED = re.compile(r'^pplr_stage_request_seconds_sum\{method="(\w+)"\} (\S+)$', re.MULTILINE)


def take_turns(ways: dict[str, Callable[[], Any]], times: int) -> dict[str, list[float]]:
    """Let each way run once, then take turns; seconds of each turn."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(times + 1):
        for name, run in ways.items():
            started = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - started)
        if turn:
            print("  ".join(f"{name} {taken[-1]:.2f} s" for name, taken in seconds.items()), flush=True)
    return seconds


def _served(operator: StageOperator) -> float:
    """Seconds that the server took between a training request's last byte and its answer, so far."""
    training = {"Forward", "Backward", "GradientNorm", "OptimizerStep"}
    return sum(float(took) for method, took in _SERVED.findall(operator.metrics()) if method in training)


def training(place: Deployment, size: int, steps: int) -> dict[str, Any]:
    """Train across the network and uncut, by turns, in one process."""
    config = quickstart(f"training.samples={size}")
    whole = backbone_of(config)
    encoded = real_batch(config, whole, size)
    with place.server("bfloat16") as (address, _), ExitStack() as stack:
        own = quickstart(f"backbone.model={place.bundles('bfloat16')[0]}")
        across, connections = client_of(own, load_backbone(own.backbone), str(place.kit("a")), address, "a")
        uncut = uncut_of(config, whole)
        stack.callback(connections.close)
        channel = StageChannel(address, read_kit(place.kit("operator", "operator")))
        stack.callback(channel.close)
        operator, parts = StageOperator(channel), dict[str, float]()
        taken = {codec: ("encode_states", "decode_states"), StageChannel: ("call",)}
        before = {(what, name): getattr(what, name) for what, names in taken.items() for name in names}
        batch = whole.collate(encoded)
        one_step(across, batch)
        served = _served(operator)
        for (what, name), function in before.items():
            setattr(what, name, timed(function, parts, name))
        try:
            seconds = take_turns(
                {"across": lambda: one_step(across, batch), "uncut": lambda: one_step(uncut, batch)}, steps
            )
        finally:
            for (what, name), function in before.items():
                setattr(what, name, function)
        served = _served(operator) - served
        across.transport.leave()  # type: ignore[union-attr]
    exchanged = parts.pop("call")
    told = {"encode": parts["encode_states"], "decode": parts["decode_states"], "server": served}
    told["wire"] = exchanged - served
    ratio = statistics.median(seconds["uncut"]) / statistics.median(seconds["across"])
    per_step = {name: value / (steps + 1) for name, value in told.items()}
    print("seconds a step of", ", ".join(f"{name} {value:.4f}" for name, value in per_step.items()))
    return {
        "samples_per_second": {name: [size / s for s in taken] for name, taken in seconds.items()},
        "seconds_per_step": per_step,
        "row": at_least(
            "training across TLS on loopback, samples per second", "the same trainer, uncut, in one process", ratio, 0.9
        ),
    }


def train_at_once(clients: Sequence[Process], window_s: float, batches: range | None = None) -> float:
    """Let clients train at once, on all of their batches or on some; samples per second of them all."""
    until = time.monotonic() + window_s
    span = "" if batches is None else f" {batches.start} {batches.stop}"
    for client in clients:
        client.ask(f"run {until}{span}")
    rates = []
    for client in clients:
        told = client.answer()
        rates.append(sum(told["samples"]) / (told["ends"][-1] - told["ends"][0]))
    return sum(rates)


def at_once(
    place: Deployment,
    count: int,
    size: int,
    window_s: float,
    turns: int,
) -> dict[str, Any]:
    """Measure clients at once against one alone, by turns.

    Args:
        place: Bundles and kits.
        count: Clients.
        size: Samples of a batch.
        window_s: Seconds of one client alone; all at once get as many times more.
        turns: Measurements of each way.
    """
    config = quickstart(f"training.samples={4 * count * size}")
    encoded = real_batch(config, backbone_of(config), 4 * count * size)
    model = f"backbone.model={place.bundles('bfloat16')[0]}"
    alone: list[float] = []
    together: list[float] = []
    with place.server("bfloat16") as (address, server), ExitStack() as stack:
        clients = []
        for number in range(count):
            own = encoded[4 * number * size : 4 * (number + 1) * size]
            batches = [own[start : start + size] for start in range(0, len(own), size)]
            client = place.client(
                f"c{number}", [model], batches, address=address, warmup=1, threads=torch.get_num_threads()
            )
            clients.append(stack.enter_context(client))
        for client in clients:
            client.answer()
        for _ in range(turns):
            alone.append(train_at_once(clients[:1], window_s))
            together.append(train_at_once(clients, count * window_s))
            print(f"alone {alone[-1]:.2f} samples/s  {count} at once {together[-1]:.2f} samples/s", flush=True)
        held = sum(client.status("VmHWM") for client in clients) + server.status("VmHWM")
        for client in clients:
            client.end()
    print(f"{held / 1e9:.1f} GB in all")
    ratio = statistics.median(together) / statistics.median(alone)
    return {
        "samples_per_second": {"one client": alone, f"{count} clients": together},
        "peak_bytes_of_all": held,
        "row": at_least(
            f"{count} client processes at once through one server, samples per second", "one client alone", ratio, 0.9
        ),
    }


def generation(place: Deployment, size: int, beams: int, new: int, turns: int) -> dict[str, Any]:
    """Write titles across the network, uncut, and by HF's ``generate``; float32, no end, the same number of tokens."""
    config = quickstart("backbone.dtype=float32", f"training.samples={size}")
    whole = backbone_of(config)
    prompts = [list(sample.prompt) for sample in real_batch(config, whole, size)]
    longest = max(map(len, prompts))
    ids = torch.tensor([[whole.pad_token] * (longest - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts])
    endless = [SuppressTokensLogitsProcessor([whole.end_token], device="cpu")]
    settings = GenerationConfig(
        max_new_tokens=new,
        num_beams=beams,
        do_sample=False,
        eos_token_id=whole.end_token,
        pad_token_id=whole.end_token,
    )
    written: dict[str, torch.Tensor] = {}
    with place.server("float32") as (address, _), ExitStack() as stack:
        own = quickstart(f"backbone.model={place.bundles('float32')[0]}", "backbone.dtype=float32")
        across, connections = client_of(own, load_backbone(own.backbone), str(place.kit("a")), address, "a")
        stack.callback(connections.close)
        uncut = uncut_of(config, whole)

        def by_hf() -> None:
            with torch.no_grad():
                written["hf"] = whole.model.generate(
                    ids, attention_mask=mask, generation_config=settings, logits_processor=LogitsProcessorList(endless)
                )

        def by(name: str, model: Any) -> None:
            told = generate(model, prompts, beams=beams, max_new_tokens=new, processors=endless)
            written[name] = told.sequences

        ways = {"across": lambda: by("across", across), "uncut": lambda: by("uncut", uncut), "hf": by_hf}
        seconds = take_turns(ways, turns)
        across.transport.leave()  # type: ignore[union-attr]
    answers = {name: tokens[:, longest:] for name, tokens in written.items()}
    same = {name: int((answers[name] == answers["hf"]).all(1).sum()) for name in ("across", "uncut")}
    print(f"of {size} answers of {answers['hf'].shape[1]} tokens, those the same as HF's: {same}")
    median = {name: statistics.median(taken) for name, taken in seconds.items()}
    shape = f"batch of {size}, beam {beams}, {new} tokens, float32"
    return {
        "seconds": seconds,
        "answers_same_as_hf": same,
        "answers": size,
        "rows": [
            at_most(
                f"generation across TLS on loopback, latency ({shape})",
                "HF generate on the whole model",
                median["across"] / median["hf"],
                1.3,
            ),
            at_most(
                f"generation across TLS on loopback, latency ({shape})",
                "the same generation, uncut, in one process",
                median["across"] / median["uncut"],
                1.3,
            ),
        ],
    }


def main() -> None:
    """Measure and write ``network.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=9, help="training steps of each way")
    parser.add_argument("--turns", type=int, default=5, help="generations of each way")
    parser.add_argument("--clients", type=int, default=5)
    parser.add_argument("--client-batch", type=int, default=4, help="samples of a batch where clients train at once")
    parser.add_argument("--window", type=float, default=12.0, help="seconds of one client alone; all at once get more")
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--only", choices=("training", "at_once", "generation"))
    arguments = parser.parse_args()
    use_all_cores()
    found: dict[str, Any] = {}
    with deployment(quickstart().cut) as place:
        parts = {
            "training": lambda: training(place, arguments.batch_size, arguments.steps),
            "at_once": lambda: at_once(
                place, arguments.clients, arguments.client_batch, arguments.window, arguments.windows
            ),
            "generation": lambda: generation(place, 8, 4, 16, arguments.turns),
        }
        for name, part in parts.items():
            if arguments.only in (None, name):
                print(f"-- {name}", flush=True)
                found[name] = part()
    rows = [row for told in found.values() for row in told.pop("rows", [told.pop("row", None)])]
    for row in rows:
        print(f"{row['name']} against {row['against']}: {row['ratio']:.3f}, met: {row['met']}")
    if arguments.only is None:
        write_result("network", {**found, "notes": _notes(found), "rows": rows})


def _notes(found: dict[str, Any]) -> list[str]:
    """Say in sentences what the page tells besides the ratios."""
    step, wrote = found["training"]["seconds_per_step"], found["generation"]
    rates = {**found["training"]["samples_per_second"], **found["at_once"]["samples_per_second"]}
    return [
        *(f"{name}: median {statistics.median(rate):.2f} samples/s" for name, rate in rates.items()),
        "of a training step across the network: "
        + ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in step.items())
        + " (server: from a request's last byte to its answer; wire: the rest of the exchange)",
        f"server and clients at once: {found['at_once']['peak_bytes_of_all'] / 1e9:.1f} GB at their peaks",
        f"answers the same as HF's: {wrote['answers_same_as_hf']['across']} of {wrote['answers']} across, "
        f"{wrote['answers_same_as_hf']['uncut']} uncut",
    ]


if __name__ == "__main__":
    main()
