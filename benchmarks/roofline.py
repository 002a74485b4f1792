"""The share of the machine's measured matmul rate that training reaches, in each number format, cut and uncut.

The rate is that of the product of two square matrices, the fastest this machine does; the products of the model's own
shapes are timed beside it. Steps are of real prompts in batches as training makes them (near each other in length), and
the products take turns with them. Operations are counted as ``benchmarks.llama_costs`` does: forward and backward, two
for each multiply-add, for real tokens alone; padding, norms, softmax, masks and the optimizer count as nothing.

    python -m benchmarks.roofline [--steps 5] [--batch-size 16]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from benchmarks.llama_costs import Shape, flops
from benchmarks.measuring import at_least, causal_lm_of, quickstart, real_batch, spread, use_all_cores, write_result
from benchmarks.op_shares import shares_of
from pplr.backbones.base import Backbone, Batch
from pplr.backbones.batching import bucketed_batches
from pplr.backbones.causal_lm import CausalLM
from pplr.config import Config, CutConfig
from pplr.stages.client_model import ClientModel
from pplr.stages.cut import CutPlan
from pplr.stages.model import CutModel

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
CUTS = {"uncut": None, "cut": CutConfig(input_layers=2, output_layers=1)}
SQUARE = 2048
BOUND = 0.6


def shape_of(backbone: CausalLM) -> Shape:
    """Read a decoder's sizes."""
    own: Any = backbone.model.config
    heads, held = own.num_attention_heads, own.num_key_value_heads
    return Shape(
        width=own.hidden_size,
        blocks=own.num_hidden_layers,
        heads=heads,
        mlp_width=own.intermediate_size,
        vocabulary=own.vocab_size,
        input_layers=0,
        output_layers=0,
        value_width=own.hidden_size * held // heads,
    )


def rate(rows: int, inner: int, columns: int, dtype: torch.dtype, count: int = 3) -> float:
    """Measure a product as a linear layer takes it, by the median: 10⁹ operations for each second."""
    left, right = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
    seconds = []
    for _ in range(count):
        started = time.perf_counter()
        torch.nn.functional.linear(left, right)
        seconds.append(time.perf_counter() - started)
    return 2 * rows * inner * columns / statistics.median(seconds) / 1e9


def products(shape: Shape, tokens: int) -> dict[str, tuple[int, int, int]]:
    """Name the products of a block, of so many tokens."""
    return {
        "q and o": (tokens, shape.width, shape.width),
        "k and v": (tokens, shape.width, shape.values),
        "gate and up": (tokens, shape.width, shape.mlp_width),
        "down": (tokens, shape.mlp_width, shape.width),
    }


def batches_of(config: Config, backbone: Backbone, size: int, count: int) -> list[tuple[Batch, list[tuple[int, int]]]]:
    """Make batches as training makes them, each with its rows' tokens and targets."""
    encoded = real_batch(config, backbone, size * max(8, count))
    lengths = [backbone.length(own) for own in encoded]
    made = []
    for places in bucketed_batches(lengths, size, 0, "roofline")[:count]:
        own = [encoded[place] for place in places]
        made.append((backbone.collate(own), [(len(s.prompt) + len(s.answer), len(s.answer)) for s in own]))
    return made


def take_step(client: ClientModel, batch: Batch) -> float:
    """Take an optimizer step; return its seconds."""
    started = time.perf_counter()
    (client.train_loss(batch, 1) / batch.targets).backward()
    client.optimizer_step(1.0)
    return time.perf_counter() - started


def counted(shape: Shape, rank: int, rows: Sequence[tuple[int, int]]) -> int:
    """Count the operations of a step."""
    return sum(sum(parts.values()) for parts in flops(shape, rank, rows).values())


def measure_dtype(name: str, steps: int, size: int, config: Config, backbone: CausalLM) -> dict[str, Any]:
    """Measure training and products in one number format."""
    shape = shape_of(backbone)
    clients: dict[str, ClientModel] = {}
    for way, cut in CUTS.items():
        plan = CutPlan.make(cut, backbone.total_layers)
        model = CutModel(backbone, plan, config.adapter, config.training)
        clients[way] = model.client(way, model.initial_adapter(0))
        clients[way].begin_round(1000)
    made = batches_of(config, backbone, size, steps + 1)
    square: list[float] = []
    rates: dict[str, list[float]] = {way: [] for way in clients}
    tokens: dict[str, list[float]] = {way: [] for way in clients}
    for number, (batch, rows) in enumerate(made):
        for way, client in clients.items():
            square.append(rate(SQUARE, SQUARE, SQUARE, DTYPES[name]))
            seconds = take_step(client, batch)
            if number > 0:  # the first warms up
                rates[way].append(counted(shape, config.adapter.rank, rows) / seconds / 1e9)
                tokens[way].append(batch.tokens / seconds)
                print(f"{name}, {way}: {rates[way][-1]:.0f} of {square[-1]:.0f} GFLOP/s", flush=True)
    padded = made[-1][0].input_ids.numel()
    own = {what: rate(*sizes, DTYPES[name]) for what, sizes in products(shape, padded).items()}
    best = statistics.median(square)
    in_model = sum(2 * m * k * n for m, k, n in products(shape, padded).values())
    by_shape = in_model / sum(2 * m * k * n / own[what] for what, (m, k, n) in products(shape, padded).items())
    return {
        "square_gflops": spread(square),
        "model_shapes_gflops": own,
        "model_gflops": by_shape,
        "training_gflops": {way: spread(told) for way, told in rates.items()},
        "tokens_per_second": {way: spread(told) for way, told in tokens.items()},
        "share": {way: statistics.median(told) / best for way, told in rates.items()},
        "padding": 1 - sum(b.tokens for b, _ in made) / sum(b.input_ids.numel() for b, _ in made),
        "where": shares_of(lambda: take_step(clients["uncut"], made[-1][0])),
    }


def told_of(name: str, measured: Mapping[str, Any]) -> list[str]:
    """Say what was measured in one number format."""
    square, best = measured["square_gflops"], measured["square_gflops"]["median"]
    ways = "; ".join(
        f"{way} {measured['tokens_per_second'][way]['median']:.0f} tokens/s, "
        f"{own['median']:.0f} GFLOP/s, {measured['share'][way]:.1%} of it"
        for way, own in measured["training_gflops"].items()
    )
    own = ", ".join(f"{what} {told:.0f}" for what, told in measured["model_shapes_gflops"].items())
    where = ", ".join(f"{what} {part['seconds']:.1%}" for what, part in measured["where"].items())
    return [
        f"{name}: the product of two matrices of {SQUARE} x {SQUARE} reaches {best:.0f} GFLOP/s "
        f"({square['lowest']:.0f} to {square['highest']:.0f}); {ways}; {measured['padding']:.1%} of all places are "
        "padding",
        f"{name}, products of the model's own shapes, GFLOP/s: {own}; together {measured['model_gflops']:.0f}, which "
        f"bounds the share at {min(1.0, measured['model_gflops'] / best):.1%}",
        f"{name}, where a step's time goes: {where}",
    ]


def measure(steps: int, size: int, load: Callable[[str], tuple[Config, CausalLM]]) -> dict[str, Any]:
    """Measure every number format."""
    formats, rows, notes = {}, [], []
    for name in DTYPES:
        formats[name] = told = measure_dtype(name, steps, size, *load(name))
        for way, share in told["share"].items():
            what = f"share of the machine's measured matmul rate in training, {name}, {way}"
            rows.append(at_least(what, f"a product of two {SQUARE} x {SQUARE} matrices", share, BOUND))
        notes += told_of(name, told)
    return {"formats": formats, "rows": rows, "notes": notes}


def load_demo(name: str) -> tuple[Config, CausalLM]:
    """Load the demo's configuration and base in a number format."""
    config = quickstart(f"backbone.dtype={name}", "training.samples=null")
    backbone = causal_lm_of(config)
    return config, backbone


def main() -> None:
    """Measure and write ``roofline.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=16)
    arguments = parser.parse_args()
    use_all_cores()
    measured = measure(arguments.steps, arguments.batch_size, load_demo)
    print("\n".join(measured["notes"]))
    write_result("roofline", measured)


if __name__ == "__main__":
    main()
