"""What was run, and how to run it again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Final

from pplr.apps.reports.elements import (
    Code,
    Drawing,
    Facts,
    Listing,
    Paragraph,
    Part,
    Section,
    Span,
    Table,
    Text,
    measured,
    said,
)
from pplr.apps.reports.records import RunFiles

__all__ = ["cut_drawing", "repeat_section", "setting_section"]

_FIRST: Final = {"item_vectors": "a vector for each item"}
_LAST: Final = {
    "causal_lm": "norm, head, loss on the answer",
    "encoder": "pooling, items, loss on the target",
    "item_vectors": "norm, items, loss on the targets",
}
UNKNOWN: Final = "not recorded"


def setting_section(files: RunFiles) -> Section:
    """Say of what the run is, with its cut drawn."""
    config, told = files.config, files.provenance
    training, federation, adapter = config.training, config.federation, config.adapter
    data: Text = (said(config.data.source),)
    if told is not None:
        data = (
            f"{said(told.data.source)}: ",
            measured(told.data.users),
            " users, ",
            measured(told.data.items),
            " items, ",
            measured(told.data.interactions),
            " interactions",
        )
    targets = ", ".join(adapter.target_modules)
    rows: dict[str, Text] = {
        "method": (Code(federation.method),),
        "backbone": (Code(config.backbone.name), f" on {said(config.backbone.model)}, {config.backbone.dtype}"),
        "data": data,
        "held out": (f"{config.data.holdout.kind}", *_left_out(files)),
        "clients": (measured(len(files.clients) or federation.clients), f", users shared out by {_partition(files)}"),
        "server rounds": (measured(len(files.rounds)), " done of at most ", measured(federation.rounds)),
        "adapter": (f"{adapter.kind}, rank {adapter.rank} on {said(targets)}" if adapter.kind == "lora" else "full",),
        "local training": (
            f"epochs a round: {training.local_epochs}, batches of {training.batch_size}, "
            f"learning rate {training.learning_rate:g}",
        ),
        "runtime": (f"{config.runtime.name}, hidden states travel as {config.runtime.wire}",),
        "seed": (measured(config.run.seed),),
    }
    return Section("setting", "What was run", [cut_drawing(files), Facts(rows), *_clients_table(files)])


def cut_drawing(files: RunFiles) -> Drawing:
    """Draw which part of the model is where."""
    backbone, metrics = files.config.backbone.name, files.metrics
    first, last = _FIRST.get(backbone, "embeddings of tokens"), _LAST[backbone]
    cut = metrics.cut if metrics is not None else files.config.cut
    if cut is None:
        spans = [Span("client", "whole model", (first, "all blocks", last))]
        return Drawing(spans, "The model is not cut: every client holds it whole, and only adapters leave it.")
    total = getattr(cut, "total_layers", None)
    k, m = cut.input_layers, cut.output_layers
    end, ends = ("L", f"L-{m}" if m else "L") if total is None else (str(total), str(total - m))
    middle = f"blocks {k} to {_before(ends)}" if _before(ends) != str(k) else f"block {k}"
    output = (f"blocks {ends} to {_before(end)}",) if m else ()
    spans = [
        Span(
            "client",
            "input stage",
            (first, *((f"blocks 0 to {k - 1}" if k > 1 else "block 0",) if k else ())),
            "hidden states",
        ),
        Span("server", "middle stage", (middle, "an adapter for each client"), "hidden states"),
        Span("client", "output stage", (*output, last)),
    ]
    caption = "Where the model is cut. Gradients cross both cuts the other way; in training the loss is the client's."
    if cut.by_client:
        own = (f"{said(name)} {one}" for name, one in cut.by_client.items())
        caption += f" Clients with another cut: {', '.join(own)}."
    return Drawing(spans, caption)


def _before(end: str) -> str:
    """Name the last block before an end that is half-open."""
    if end.isdigit():
        return str(int(end) - 1)
    head, _, taken = end.partition("-")
    return f"{head}-{int(taken or 0) + 1}"


def _left_out(files: RunFiles) -> Text:
    told = files.provenance
    if told is None or not told.data.users_without_test_case:
        return ()
    return ("; ", measured(told.data.users_without_test_case), " users have no test case")


def _partition(files: RunFiles) -> str:
    own = files.config.data.partition
    return f"{own.by} {said(own.column)}" if own.column else own.by


def _clients_table(files: RunFiles) -> list[Part]:
    if not files.clients:
        return []
    labels = files.provenance.clients if files.provenance else {}
    tested = files.metrics.clients if files.metrics else {}
    last = files.rounds[-1].clients if files.rounds else {}
    rows = [
        (
            said(name),
            said(labels.get(name, UNKNOWN)),
            measured(last[name].samples if name in last else None),
            measured(tested.get(name, {}).get("users")),
        )
        for name in files.clients
    ]
    columns = ("client", "whose users", "samples in the last round", "test users")
    return [Table("The clients", columns, rows, texts=("whose users",))]


def repeat_section(files: RunFiles) -> Section:
    """Say how to run it again, and by what to see that it is the same."""
    told, folder = files.provenance, str(files.folder)
    again = shlex.join(["pplr", "train", f"{folder}/config.yaml", "--run-dir", f"{folder}-again"])
    parts: list[Part] = [
        Paragraph((Code(said(again)),)),
        Paragraph(
            (
                "On one number of threads and these versions the adapters come out with the same bytes. A run whose "
                "middle blocks a stage server hosted takes its kit as well.",
            ),
            "note",
        ),
    ]
    if told is None:
        parts.append(Paragraph(("Versions and hashes are not recorded: provenance.json is missing.",), "note"))
    else:
        parts.append(_pairs("Versions and machine", {**told.versions, **told.machine}, ("what", "recorded")))
        hashes = {name.removesuffix("_sha256"): own for name, own in told.hashes.items()}
        parts.append(_pairs("SHA-256 of what it was made from", hashes, ("of", "hash")))
        parts += [Paragraph((f"Cleaning: {said(note)}",), "note") for note in told.data.cleaning]
    parts.append(Listing("The whole configuration", files.config.to_yaml()))
    return Section("repeat", "How to repeat it", parts)


def _pairs(caption: str, pairs: Mapping[str, str | int], columns: Sequence[str]) -> Table:
    rows = [(said(name), said(own)) for name, own in pairs.items()]
    return Table(caption, columns, rows, texts=(columns[1],))
