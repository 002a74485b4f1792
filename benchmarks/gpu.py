"""The authors' round on one GPU: LLaMA-7B's shape with random weights, 1,024 samples, five clients, five local epochs.

The authors give 16 minutes for a round on four GPUs. Here one holds a base in bfloat16 that five adapters share, cut
after block 20 and before the last. What is timed is one server round as ``pplr train`` carries it out: every client
trains, adapters are compared and mixed, and the checkpoint is written. One batch before it warms up.

Random weights take as long as trained ones, and so do random tokens. Sequences are as long as real prompts of Amazon
Video Games are by SmolLM2's tokenizer; LLaMA's own would make other lengths. They are kept in
``benchmarks/reference/games_lengths.json``, which ``--write-lengths`` makes.

    python -m benchmarks.gpu --micro-check
    python -m benchmarks.gpu
    python -m benchmarks.gpu --shape tiny --device cpu --samples 40 --epochs 2
    python -m benchmarks.gpu --write-lengths configs/games_pplr.yaml --set data.path=FOLDER

Model FLOP utilisation counts what the model needs (``benchmarks.llama_costs``), and no padding. Only a whole round can
meet the aim of three minutes; with fewer samples, epochs or steps, seconds are extrapolated by tokens and marked so.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.llama_costs import SHAPES, Shape, flops, kept_bytes_per_token
from benchmarks.measuring import at_least, backbone_of, use_all_cores, write_result
from pplr.backbones.causal_lm import CausalLM, EncodedSample
from pplr.config import Config
from pplr.config_files import load_config
from pplr.federation.checkpoints import CheckpointStore
from pplr.federation.client import FederatedClient
from pplr.federation.methods import make_method
from pplr.federation.rounds import Federation, run_rounds
from pplr.runtimes.run_data import load_run_data
from pplr.seeds import generator
from pplr.stages.cut import CutPlan
from pplr.stages.model import CutModel
from pplr.testing import tiny_tokenizer

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "games_pplr.yaml"
LENGTHS = Path(__file__).parent / "reference" / "games_lengths.json"
AUTHORS_SECONDS, AUTHORS_EPOCHS, AIM_SECONDS = 16 * 60, 5, 3 * 60
PEAK_TFLOPS = 989.0
"""Dense bfloat16 products of an H100 or H200 SXM, by the datasheet."""
ATTENTIONS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}

Lengths = Mapping[str, Sequence[tuple[int, int]]]
"""For each client the tokens of each sample, and how many of them are the answer's."""


def write_lengths(path: Path, overrides: Sequence[str]) -> None:
    """Encode a configuration's training samples as training does, and keep how long they are."""
    config = load_config(path, overrides)
    backbone, data = backbone_of(config), load_run_data(config)
    if not isinstance(backbone, CausalLM):
        raise SystemExit("error: the configuration's backbone is not causal_lm")
    rows = {}
    for name, samples in data.samples.items():
        encoded = backbone.encode(samples, data.dataset.catalog, config.data.history_items)
        rows[name] = [(backbone.length(own), len(own.answer)) for own in encoded]
    clients = ",\n".join(f"  {json.dumps(name)}: {json.dumps(own)}" for name, own in rows.items())
    head = f'"config": {json.dumps(path.name)}, "model": {json.dumps(config.backbone.model)}'
    LENGTHS.write_text(f'{{{head}, "clients": {{\n{clients}\n}}}}\n', encoding="utf-8")
    print(f"wrote benchmarks/reference/{LENGTHS.name}")


def read_lengths() -> dict[str, list[tuple[int, int]]]:
    """Read the lengths of all clients' samples."""
    kept = json.loads(LENGTHS.read_text(encoding="utf-8"))["clients"]
    return {name: [(tokens, targets) for tokens, targets in own] for name, own in kept.items()}


def thinned(rows: Sequence[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """Keep some samples, spread evenly over all lengths.

    Example:
        >>> thinned([(9, 1), (5, 1), (7, 1), (3, 1)], 2)
        [(5, 1), (9, 1)]
    """
    if count >= len(rows):
        return list(rows)
    return [sorted(rows)[(2 * place + 1) * len(rows) // (2 * count)] for place in range(count)]


def random_samples(rows: Sequence[tuple[int, int]], vocabulary: int, name: str) -> list[EncodedSample]:
    """Draw prompts and answers of given lengths."""
    random = generator(0, "random tokens", name)
    drawn = [(random.integers(0, vocabulary, tokens).tolist(), targets) for tokens, targets in rows]
    return [EncodedSample(tuple(row[:-targets]), tuple(row[-targets:])) for row, targets in drawn]


def random_backbone(shape: Shape, device: torch.device) -> CausalLM:
    """Make a frozen decoder of a shape on a device, of which nothing ever lies elsewhere."""
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.mlp_width,
        num_hidden_layers=shape.blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    source = torch.Generator(device).manual_seed(0)
    made: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        made[name] = torch.ones(tensor.shape, dtype=dtype, device=device)
        if not name.endswith("norm.weight"):
            made[name].normal_(0, 0.02, generator=source)
    model.load_state_dict(made, assign=True)
    return CausalLM(model.to(device), tiny_tokenizer(), folder="random weights")


class Clock:
    """Hears of a round's tasks, and notes when each epoch of each client and each part of the round ends.

    Args:
        device: What is waited for before the time is read.
        epochs: Local epochs.
    """

    def __init__(self, device: torch.device, epochs: int) -> None:
        self._device, self._epochs = device, epochs
        self.epochs: list[list[float]] = []
        self.trained = self.mixed = 0.0
        self.record: Mapping[str, Any] = {}

    def now(self) -> float:
        """Read the time, once the device has done its work."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def note(self, line: str) -> None:
        """Print a line."""
        print(line, flush=True)

    @contextmanager
    def task(self, label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        """Note the end of each epoch of a client's training, and the beginning of validation."""
        times, done = [self.now()], 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            if done % (total // self._epochs) == 0:
                times.append(self.now())

        if unit != "samples":
            self.mixed = times[0]
            yield lambda _: None
            return
        yield advance
        self.epochs.append([after - before for before, after in pairwise(times)])
        self.trained = times[-1]
        self.note(f"{label}: " + ", ".join(f"{seconds:.2f}" for seconds in self.epochs[-1]) + " s")

    def server_round(self, record: Mapping[str, Any]) -> None:
        """Take the record of the round."""
        self.record = record


class Bench:
    """A random base on a device, and the configuration of one round.

    Args:
        options: Of the command line.
        lengths: Of all clients' samples.
    """

    def __init__(self, options: argparse.Namespace, lengths: Lengths) -> None:
        self.options, self.shape, self.device = options, SHAPES[options.shape], torch.device(options.device)
        longest = max(tokens for own in lengths.values() for tokens, _ in own)
        if longest > options.tokens_per_step:
            raise SystemExit(f"error: a sample has {longest} tokens, more than --tokens-per-step")
        batch = load_config(CONFIG).training.batch_size
        parts = -(-batch // (options.tokens_per_step // longest))
        self.config: Config = load_config(
            CONFIG,
            [
                f"cut.input_layers={self.shape.input_layers}",
                f"cut.output_layers={self.shape.output_layers}",
                f"training.local_epochs={options.epochs}",
                f"training.micro_batch_size={-(-batch // parts)}",
                f"training.recompute={str(options.recompute).lower()}",
                f"federation.clients={len(lengths)}",
                "federation.rounds=1",
            ],
        )
        self.backbone = random_backbone(self.shape, self.device)
        self.model = CutModel(
            self.backbone,
            CutPlan.make(self.config.cut, self.backbone.total_layers),
            self.config.adapter,
            self.config.training,
        )
        self.initial = self.model.initial_adapter(0)
        self.method = make_method(self.config.federation)

    def attention(self) -> AbstractContextManager[Any]:
        """Keep to one kernel of attention, if one is asked for."""
        asked = self.options.attention
        return nullcontext() if asked == "any" else sdpa_kernel(ATTENTIONS[asked])

    def client(self, name: str, rows: Sequence[tuple[int, int]]) -> FederatedClient:
        """Admit a client with random samples of given lengths, and nothing to validate on."""
        encoded = random_samples(rows, self.shape.vocabulary, name)
        return FederatedClient(name, encoded, self.model.client(name, self.initial), lambda _: {})

    def steps(self, name: str, rows: Sequence[tuple[int, int]], count: int) -> list[float]:
        """Time optimizer steps of one client on one batch."""
        training = self.config.training.model_copy(update={"local_epochs": 1, "batch_size": len(rows)})
        config = self.config.model_copy(update={"training": training})
        client, clock, seconds = self.client(name, rows), Clock(self.device, 1), []
        for _ in range(count):
            started = clock.now()
            client.train(0, config, self.method, lambda _: None)
            seconds.append(clock.now() - started)
        self.model.dismiss(name)
        return seconds

    def round(self, lengths: Lengths) -> tuple[Clock, float, float]:
        """Carry out one server round; return what was heard of it, when it began and when it ended."""
        clients = [self.client(name, rows) for name, rows in lengths.items()]
        federation = Federation(clients, self.method, self.initial)
        clock = Clock(self.device, self.options.epochs)
        with tempfile.TemporaryDirectory() as folder:
            store = CheckpointStore(Path(folder) / "checkpoints", keep=1, warn=clock.note)
            began = clock.now()
            run_rounds(federation, self.config, store, clock, Path(folder))
            return clock, began, clock.now()

    def expected_bytes(self, tokens: int) -> int:
        """Say how much memory the base takes, with the activations of so many tokens."""
        size = self.backbone.dtype.itemsize
        kept = tokens * self.shape.blocks * kept_bytes_per_token(self.shape, self.config.adapter.rank, size)
        return self.shape.parameters * size + kept


def matmul_tflops(device: torch.device, dtype: torch.dtype, size: int, count: int = 10) -> float:
    """Measure the product of two square matrices, by the median: 10¹² operations for each second."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    clock, seconds = Clock(device, 1), []
    for _ in range(count + 3):
        started = clock.now()
        left @ right
        seconds.append(clock.now() - started)
    return 2 * size**3 / statistics.median(seconds[3:]) / 1e12


def attention_kernel(bench: Bench, tokens: int) -> str:
    """Ask torch which kernel it attends with."""
    width = bench.shape.width // bench.shape.heads
    states = torch.zeros(1, bench.shape.heads, tokens, width, dtype=bench.backbone.dtype, device=bench.device)
    with bench.attention():
        choice = torch._fused_sdp_choice(states.requires_grad_(True), states, states, is_causal=True)
    return str(SDPBackend(choice).name).removesuffix("_ATTENTION").lower()


def peak_memory(device: torch.device) -> dict[str, int] | None:
    """Read the most bytes of tensors so far, and of what was reserved for them; ``None`` without a GPU."""
    if device.type != "cuda":
        return None
    return {
        "allocated": torch.cuda.max_memory_allocated(device),
        "reserved": torch.cuda.max_memory_reserved(device),
    }


def round_row(seconds: float, whole: bool) -> dict[str, Any]:
    """Compare a round's seconds with the authors'; only a whole round can meet the aim."""
    what = "a round of LLaMA-7B, 1,024 samples, five epochs, one GPU"
    row = at_least(
        what if whole else f"{what} (extrapolated)",
        "the authors' 16 minutes on four GPUs",
        AUTHORS_SECONDS / seconds,
        AUTHORS_SECONDS / AIM_SECONDS,
    )
    return row | {"met": whole and row["met"]}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure a round, or the part of one that the options leave."""
    every = read_lengths()
    total = sum(map(len, every.values()))
    wanted_samples = total if options.samples is None else options.samples
    batch = load_config(CONFIG).training.batch_size
    most = total if options.steps is None else options.steps * batch
    lengths = {
        name: thinned(rows, min(most, max(1, round(len(rows) * wanted_samples / total))))
        for name, rows in every.items()
    }
    bench = Bench(options, lengths)
    dtype = bench.backbone.dtype
    told = matmul_tflops(bench.device, dtype, 8192 if bench.device.type == "cuda" else 256)
    with bench.attention():
        bench.steps("warm-up", sorted(row for own in lengths.values() for row in own)[-batch:], 1)
        clock, began, ended = bench.round(lengths)

    run = [row for own in lengths.values() for row in own] * options.epochs
    authors = [row for own in every.values() for row in own] * AUTHORS_EPOCHS
    tokens, wanted = (sum(own for own, _ in rows) for rows in (run, authors))
    whole = sorted(run) == sorted(authors) and options.shape == "llama-7b"
    training = clock.trained - began
    after = ended - clock.trained
    seconds = training * wanted / tokens + after
    counted = flops(bench.shape, bench.config.adapter.rank, run)
    rate = sum(sum(parts.values()) for parts in counted.values()) / training / 1e12
    peak = peak_memory(bench.device)
    name = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else "cpu"
    losses = {client: own["loss"] for client, own in clock.record["clients"].items()}
    share = "" if whole else f", extrapolated from {tokens / wanted:.1%} of its tokens"
    notes = [
        f"{len(run) // options.epochs:,} samples of {len(lengths)} clients, {tokens:,} tokens in {options.epochs} "
        f"epochs, without padding; cut {bench.shape.input_layers} + {bench.shape.output_layers} of "
        f"{bench.shape.blocks} blocks; {str(dtype).removeprefix('torch.')}, "
        f"{bench.config.training.micro_batch_size} samples at once",
        f"{seconds:.1f} s a round{share}; what ran: training {training:.1f} s, similarity, heating and mixing "
        f"{clock.mixed - clock.trained:.2f} s, checkpoint {ended - clock.mixed:.2f} s",
        f"{tokens / training:,.0f} tokens/s; {rate:.3g} TFLOP/s counted: {rate / options.peak_tflops:.1%} of the "
        f"{options.peak_tflops:.0f} of the datasheet, {rate / told:.1%} of the {told:.3g} that a product of two "
        "matrices reaches there",
    ]
    if peak is not None:
        notes.append(f"peak memory {peak['allocated'] / 2**30:.1f} GiB, {peak['reserved'] / 2**30:.1f} GiB reserved")
    return {
        "device": name,
        "shape": {"name": options.shape, **asdict(bench.shape), "parameters": bench.shape.parameters},
        "dtype": str(dtype).removeprefix("torch."),
        "samples": {client: len(rows) for client, rows in lengths.items()},
        "tokens": tokens,
        "targets": sum(own for _, own in run),
        "epochs": options.epochs,
        "batch_size": bench.config.training.batch_size,
        "micro_batch_size": bench.config.training.micro_batch_size,
        "recompute": options.recompute,
        "attention": {"asked": options.attention, "kernel": attention_kernel(bench, tokens // len(run))},
        "extrapolated": not whole,
        "seconds": {
            "epochs": dict(zip(lengths, clock.epochs, strict=True)),
            "training": training,
            "aggregation": clock.mixed - clock.trained,
            "checkpoint": ended - clock.mixed,
            "measured": ended - began,
            "round": seconds,
        },
        "tokens_per_second": tokens / training,
        "flops": counted,
        "tflops": {"counted": rate, "peak": options.peak_tflops, "matmul": told},
        "utilisation": {"of_peak": rate / options.peak_tflops, "of_matmul": rate / told},
        "peak_bytes": peak,
        "loss": losses,
        "rows": [round_row(seconds, whole)],
        "notes": notes,
    }


def micro_check(options: argparse.Namespace) -> None:
    """Take an optimizer step on the longest batch and on a usual one, each twice, and print what they take."""
    lengths = read_lengths()
    bench = Bench(options, lengths)
    every = sorted(row for own in lengths.values() for row in own)
    size, micro = bench.config.training.batch_size, bench.config.training.micro_batch_size or 1
    print(f"attention kernel: {attention_kernel(bench, every[len(every) // 2][0])}; {micro} samples at once")
    rate = matmul_tflops(bench.device, bench.backbone.dtype, 8192 if bench.device.type == "cuda" else 256)
    print(f"a product of two matrices reaches {rate:.3g} TFLOP/s")
    print(f"expected peak memory: {bench.expected_bytes(micro * every[-1][0]) / 2**30:.1f} GiB and some more")
    with bench.attention():
        for name, rows in (("longest", every[-size:]), ("usual", thinned(every, size))):
            tokens = sum(own for own, _ in rows)
            first, second = bench.steps(name, rows, 2)
            print(f"{name} batch, {tokens:,} tokens: first step {first:.2f} s, second {second:.2f} s", flush=True)
            if (peak := peak_memory(bench.device)) is not None:
                print(f"peak so far {peak['allocated'] / 2**30:.1f} GiB, {peak['reserved'] / 2**30:.1f} GiB reserved")
    wanted = AUTHORS_EPOCHS * sum(own for own, _ in every)
    print(f"at the last rate a round trains for {second * wanted / tokens:.0f} s")


def make_parser() -> argparse.ArgumentParser:
    """Make the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-7b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--epochs", type=int, default=AUTHORS_EPOCHS)
    parser.add_argument("--samples", type=int, help="of all clients together; all when absent")
    parser.add_argument("--steps", type=int, help="end each epoch after so many steps; the round is then extrapolated")
    parser.add_argument("--tokens-per-step", type=int, default=8192, help="most tokens in memory at once, with padding")
    parser.add_argument("--recompute", action="store_true", help="training.recompute, of the client's own blocks")
    parser.add_argument(
        "--attention", choices=["any", *ATTENTIONS], default="any", help="kernel; torch's choice if any"
    )
    parser.add_argument("--peak-tflops", type=float, default=PEAK_TFLOPS)
    parser.add_argument("--micro-check", action="store_true", help="take single steps only, and write nothing")
    parser.add_argument("--write-lengths", type=Path, metavar="CONFIG")
    parser.add_argument("--set", nargs="+", action="extend", default=[], dest="overrides", metavar="FIELD=VALUE")
    return parser


def main() -> None:
    """Measure, and write ``gpu.json`` unless the shape is tiny."""
    options = make_parser().parse_args()
    if options.write_lengths is not None:
        write_lengths(options.write_lengths, options.overrides)
        return
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("error: there is no GPU here. Use --shape tiny --device cpu")
    use_all_cores()
    if options.micro_check:
        micro_check(options)
        return
    measured = measure(options)
    print("\n".join(measured["notes"]))
    if options.shape == "tiny":
        print("nothing is written: the shape is tiny")
        return
    write_result("gpu", measured)


if __name__ == "__main__":
    main()
