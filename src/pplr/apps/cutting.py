"""The commands that cut a model into bundles, and say beforehand what a cut would cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

__all__ = ["cut", "plan"]

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A short name, a hub id, a folder or a GGUF file.")]
_Dtype = Literal["float32", "bfloat16"]


def cut(
    model: Model,
    input_layers: Annotated[int, typer.Option(min=0, help="Blocks after the embeddings that the client holds.")],
    output_layers: Annotated[int, typer.Option(min=0, help="Blocks before the norm that the client holds.")],
    out: Annotated[Path, typer.Option(help="An empty or new folder; client/ and server/ are written into it.")],
    dtype: Annotated[_Dtype | None, typer.Option(help="Number format; the checkpoint's own when absent.")] = None,
) -> None:
    """Cut a model into a client's bundle and a server's, a block at a time."""
    from pplr.apps.tables import Table, human_bytes
    from pplr.apps.terminal import Screen, TerminalProgress

    screen = Screen()
    progress = TerminalProgress(screen)
    with screen.busy("loading libraries"):
        from pplr.backbones.bundles import total_layers, write_bundles
        from pplr.backbones.loading import find_checkpoint
        from pplr.config import CutConfig
        from pplr.stages.cut import CutPlan
    source = find_checkpoint(model, progress.note)
    blocks = total_layers(source)
    CutPlan.make(CutConfig(input_layers=input_layers, output_layers=output_layers), blocks)
    with progress.task("cutting", blocks, "blocks") as advance:
        made = write_bundles(
            source, out, input_layers=input_layers, output_layers=output_layers, dtype=dtype, advance=advance
        )
    rows = [(own.role, str(len(own.blocks)), human_bytes(own.stored_bytes), str(own.folder)) for own in made]
    screen.table(Table(("bundle", "blocks", "tensors", "folder"), rows, texts=("bundle", "folder")))


def plan(
    model: Model,
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help="What a client has for it, such as 2GB.")] = None,
    storage: Annotated[str | None, typer.Option(metavar="SIZE", help="What a client's bundle may take.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples of a batch.")] = 16,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a sample.")] = 200,
    targets: Annotated[int, typer.Option(min=1, help="Answer tokens of a sample.")] = 14,
    dtype: Annotated[_Dtype, typer.Option(help="Number format of the base and on the wire.")] = "bfloat16",
    rank: Annotated[int, typer.Option(min=1, help="LoRA's rank.")] = 8,
    tokens_per_second: Annotated[
        bool, typer.Option("--tokens-per-second", help="Measure the client's part on this machine.")
    ] = False,
) -> None:
    """Say which cuts fit a client, and what each costs it."""
    from pplr.apps.tables import Table, human_bytes
    from pplr.apps.terminal import Screen, TerminalProgress

    if targets > tokens:
        raise typer.BadParameter("it is more than --tokens", param_hint="--targets")
    screen = Screen()
    progress = TerminalProgress(screen)
    with screen.busy("loading libraries"):
        from pplr.backbones.loading import find_checkpoint
        from pplr.config import AdapterConfig
        from pplr.stages import planning
    budgets = [None if size is None else planning.parse_bytes(size) for size in (memory, storage)]
    workload = planning.Workload(samples, tokens, targets)
    source = find_checkpoint(model, progress.note)
    with screen.busy("measuring one block"):
        sizes = planning.read_sizes(source, dtype, AdapterConfig(rank=rank), workload, measure_speed=tokens_per_second)
    costs = [planning.cut_cost(sizes, own, workload) for own in planning.usual_cuts(sizes.total_layers)]
    fits = planning.fitting(costs, *budgets)
    rows = [
        (
            str(cost.plan.input_layers),
            str(cost.plan.output_layers),
            human_bytes(cost.stored_bytes),
            human_bytes(cost.memory_bytes),
            f"{cost.compute_share:.1%}",
            human_bytes(cost.wire_bytes),
            "-" if cost.tokens_per_second is None else f"{cost.tokens_per_second:,.0f}",
            "yes" if fit else "no",
        )
        for cost, fit in zip(costs, fits, strict=True)
    ]
    names = ("input", "output", "client stores", "client memory", "compute", "wire a sample", "tokens/s", "fits")
    screen.table(Table(names, rows, texts=()))
    screen.line()
    screen.line(
        f"{sizes.total_layers} blocks, {dtype}. Memory: stored tensors, adapter with optimizer, and a batch of "
        f"{samples} x {tokens} tokens; Python and its libraries come on top. Wire: hidden states and gradients, "
        "both ways."
    )
    if not any(fits):
        smallest = min(costs, key=lambda cost: cost.memory_bytes)
        screen.line(f"No cut fits; the smallest takes {human_bytes(smallest.memory_bytes)} of memory.")
