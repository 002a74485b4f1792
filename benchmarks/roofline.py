"""The share of the machine's measured matmul rate that training reaches, in each number format, cut and uncut.

The rate is that of the product of two square matrices, the fastest this machine does; the products of the model's own
shapes are timed beside it. Steps are of real prompts in batches as training makes them (near each other in length), and
the products take turns with them; each batch once padded and once in one row, as ``training.shared_prefix`` has it.
Operations are counted as ``benchmarks.llama_costs`` does: forward and backward, two for each multiply-add, for real
tokens alone; padding, norms, softmax, masks and the optimizer count as nothing. In one row what the prompts share is
computed once and counts once.

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
from pplr.backbones.base import Batch
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
LAYOUTS = ("padded", "one row")
COUNTED = ("products", "attention")
"""Kinds of operations in which those lie that are counted."""


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


def batches_of(
    config: Config, backbone: CausalLM, size: int, count: int
) -> list[tuple[dict[str, Batch], list[tuple[int, int]]]]:
    """Make batches as training makes them, padded and in one row, each with its samples' tokens and targets."""
    encoded = real_batch(config, backbone, size * max(8, count))
    lengths = [backbone.length(own) for own in encoded]
    made = []
    for places in bucketed_batches(lengths, size, 0, "roofline")[:count]:
        own = [encoded[place] for place in places]
        layouts = {"padded": backbone.collate(own), "one row": backbone.collate_row(own)}
        made.append((layouts, [(len(s.prompt) + len(s.answer), len(s.answer)) for s in own]))
    return made


def take_step(client: ClientModel, batch: Batch) -> float:
    """Take an optimizer step; return its seconds."""
    started = time.perf_counter()
    (client.train_loss(batch, 1) / batch.targets).backward()
    client.optimizer_step(1.0)
    return time.perf_counter() - started


def counted(shape: Shape, rank: int, batch: Batch, rows: Sequence[tuple[int, int]]) -> int:
    """Count the operations of a step.

    In one row the last token of a sample has no place, since nothing follows it, and what all begin with is there once.
    Operations are linear in tokens, pairs of them and targets, so what the others would begin with is taken off.

    Args:
        shape: The decoder.
        rank: R of LoRA.
        batch: In either layout.
        rows: Tokens and targets of its samples.
    """
    if batch.row is None:
        return _operations(shape, rank, rows)
    apart = _operations(shape, rank, [(own - 1, targets) for own, targets in rows])
    return apart - (len(rows) - 1) * _operations(shape, rank, [(batch.row.prefix, 0)])


def _operations(shape: Shape, rank: int, rows: Sequence[tuple[int, int]]) -> int:
    return sum(sum(parts.values()) for parts in flops(shape, rank, rows).values())


def reachable(where: Mapping[str, Mapping[str, float]], model_gflops: float, best: float) -> float:
    """Say what share could be reached while everything but products takes the time that it takes.

    Args:
        where: Shares of a step's time by kind of operation.
        model_gflops: Rate of the products of the model's own shapes.
        best: Rate of the square product.

    Returns:
        The share of time in products and attention, times the share of the rate that the model's own products reach. It
        takes all time in them for work that counts, so what is reached lies below.
    """
    return sum(where.get(kind, {"seconds": 0.0})["seconds"] for kind in COUNTED) * min(1.0, model_gflops / best)


def measure_layout(shape: Shape, client: ClientModel, batch: Batch, dtype: torch.dtype, best: float) -> dict[str, Any]:
    """Measure the products that a batch needs, and where its step's time goes."""
    places = batch.input_ids.numel()
    needed = products(shape, places)
    own = {what: rate(*sizes, dtype) for what, sizes in needed.items()}
    operations = {what: 2 * m * k * n for what, (m, k, n) in needed.items()}
    together = sum(operations.values()) / sum(count / own[what] for what, count in operations.items())
    where = shares_of(lambda: take_step(client, batch))
    return {
        "places": places,
        "model_shapes_gflops": own,
        "model_gflops": together,
        "where": where,
        "reachable": reachable(where, together, best),
    }


def measure_dtype(name: str, steps: int, size: int, config: Config, backbone: CausalLM) -> dict[str, Any]:
    """Measure training and products in one number format."""
    shape, rank = shape_of(backbone), config.adapter.rank
    clients: dict[str, ClientModel] = {}
    for cut, plan in CUTS.items():
        model = CutModel(backbone, CutPlan.make(plan, backbone.total_layers), config.adapter, config.training)
        clients[cut] = model.client(cut, model.initial_adapter(0))
        clients[cut].begin_round(1000)
    ways = {way_of(cut, layout): (clients[cut], layout) for layout in LAYOUTS for cut in CUTS}
    made = batches_of(config, backbone, size, steps + 1)
    square: list[float] = []
    rates: dict[str, list[float]] = {way: [] for way in ways}
    tokens: dict[str, list[float]] = {way: [] for way in ways}
    for number, (layouts, rows) in enumerate(made):
        for way, (client, layout) in ways.items():
            square.append(rate(SQUARE, SQUARE, SQUARE, DTYPES[name]))
            seconds = take_step(client, layouts[layout])
            if number > 0:  # the first warms up
                rates[way].append(counted(shape, rank, layouts[layout], rows) / seconds / 1e9)
                tokens[way].append(layouts["padded"].tokens / seconds)
                print(f"{name}, {way}: {rates[way][-1]:.0f} of {square[-1]:.0f} GFLOP/s", flush=True)
    best = statistics.median(square)
    padded = [layouts["padded"] for layouts, _ in made]
    operations = {
        layout: sum(counted(shape, rank, layouts[layout], rows) for layouts, rows in made) for layout in LAYOUTS
    }
    return {
        "square_gflops": spread(square),
        "training_gflops": {way: spread(told) for way, told in rates.items()},
        "tokens_per_second": {way: spread(told) for way, told in tokens.items()},
        "share": {way: statistics.median(told) / best for way, told in rates.items()},
        "padding": 1 - sum(b.tokens for b in padded) / sum(b.input_ids.numel() for b in padded),
        "saved": 1 - operations["one row"] / operations["padded"],
        "layouts": {
            layout: measure_layout(shape, clients["uncut"], made[-1][0][layout], DTYPES[name], best)
            for layout in LAYOUTS
        },
    }


def way_of(cut: str, layout: str) -> str:
    """Name a way of training."""
    return cut if layout == "padded" else f"{cut}, {layout}"


def told_of(name: str, measured: Mapping[str, Any]) -> list[str]:
    """Say what was measured in one number format."""
    square, best = measured["square_gflops"], measured["square_gflops"]["median"]
    ways = "; ".join(
        f"{way} {measured['tokens_per_second'][way]['median']:.0f} tokens/s, "
        f"{own['median']:.0f} GFLOP/s, {measured['share'][way]:.1%} of it"
        for way, own in measured["training_gflops"].items()
    )
    saved = f"; one row has {measured['saved']:.1%} fewer operations to count" if "saved" in measured else ""
    lines = [
        f"{name}: the product of two matrices of {SQUARE} x {SQUARE} reaches {best:.0f} GFLOP/s "
        f"({square['lowest']:.0f} to {square['highest']:.0f}); {ways}; {measured['padding']:.1%} of all places are "
        f"padding{saved}"
    ]
    for layout, told in measured["layouts"].items():
        own = ", ".join(f"{what} {rate:.0f}" for what, rate in told["model_shapes_gflops"].items())
        where = ", ".join(f"{what} {part['seconds']:.1%}" for what, part in told["where"].items())
        bound = min(1.0, told["model_gflops"] / best)
        busy = sum(told["where"][kind]["seconds"] for kind in COUNTED if kind in told["where"])
        within = measured["training_gflops"][way_of("uncut", layout)]["median"] / busy
        reached = " and ".join(f"{measured['share'][way_of(cut, layout)]:.1%} {cut}" for cut in CUTS)
        lines += [
            f"{name}, {layout}, products of the model's own shapes, GFLOP/s: {own}; together "
            f"{told['model_gflops']:.0f}, {bound:.1%} of the square one's",
            f"{name}, {layout}, where a step's time goes, uncut: {where}",
            f"{name}, {layout}: {busy:.1%} of a step's time in products and attention, at {bound:.1%} of the rate: "
            f"{told['reachable']:.1%} is the share that could be reached while everything else takes its time; asked "
            f"for are {BOUND:.0%}, reached {reached}; what counts is done at {within:.0f} GFLOP/s in that time",
        ]
    return lines


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
