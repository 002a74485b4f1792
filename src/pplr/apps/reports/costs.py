"""What a run took: bytes, memory, compute and traffic of both sides, beside holding the whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from pplr.apps.reports.elements import (
    Cell,
    Code,
    Link,
    Paragraph,
    Part,
    Section,
    Table,
    Text,
    bytes_cell,
    count_cell,
    measured,
    said,
    seconds_cell,
    share_cell,
)
from pplr.apps.reports.records import ClientRecord, RunFiles

__all__ = ["WORKED_OUT", "cost_section", "whole_bytes"]

WORKED_OUT: Final = "training FLOPs, worked out"
"""Heading of what was reckoned rather than measured."""


def whole_bytes(files: RunFiles) -> float | int | None:
    """Say what holding the whole model would store: both sides together; ``None`` where either is unknown."""
    if files.metrics is None:
        return None
    cost, cut = files.metrics.cost, files.metrics.cut
    if (told := cost.whole.get("stored_bytes")) is not None:
        return told
    if cut is not None and cut.by_client:
        return None  # each side's largest are of different cuts
    client, server = cost.client.get("stored_bytes"), cost.server.get("stored_bytes")
    return None if client is None or server is None else client + server


def cost_section(files: RunFiles) -> Section:
    """Say what the run cost either side."""
    parts: list[Part] = [_sides(files), Paragraph(_note(files), "note")]
    parts += [_time_and_wire(files), *_by_client(files)]
    return Section("cost", "What it cost", parts)


def _note(files: RunFiles) -> Text:
    """Say what the figures of the sides are, and why some are missing."""
    cost = files.metrics.cost if files.metrics else None
    told: list[str | Cell | Code | Link] = []
    if cost is not None and cost.client.get("train_flops") is not None:
        told += [
            "Training compute is worked out from the samples that were trained on, and not measured: products of "
            "matrices, two operations for each multiply-add, forward and backward, of all clients and rounds together; "
            "without padding and what is computed again. ",
        ]
    else:
        told.append("Training compute was not worked out for this run. ")
    if cost is None or cost.client.get("peak_rss_bytes") is None:
        told += [
            "Peak memory can be told apart only where client and server are two processes (",
            Code("pplr train --kit"),
            "). ",
        ]
    told += [Code(f"pplr plan {said(files.config.backbone.model)}"), " works out memory and compute of other cuts."]
    return told


def _sides(files: RunFiles) -> Table:
    cost, whole = files.metrics.cost if files.metrics else None, whole_bytes(files)
    uncut = cost.whole if cost else {}
    names = {"client": "client", "server": "server", "whole": "the whole model in one place"}
    rows: list[Sequence[Cell | str]] = []
    for party, name in names.items():
        own = getattr(cost, party) if cost else {}
        stored = whole if party == "whole" else own.get("stored_bytes")
        flops = own.get("train_flops")
        rows.append(
            (
                name,
                bytes_cell(stored),
                share_cell(_part(stored, whole)),
                bytes_cell(own.get("peak_rss_bytes")),
                count_cell(flops),
                share_cell(_part(flops, uncut.get("train_flops"))),
            )
        )
    columns = ("", "stored, frozen tensors", "of the whole", "peak memory", WORKED_OUT, "of the whole's FLOPs")
    return Table("Each side, beside holding the whole model", columns, rows, ruled=[2])


def _part(own: float | int | None, whole: float | int | None) -> float | None:
    return None if own is None or not whole else own / whole


def _time_and_wire(files: RunFiles) -> Table:
    metrics = files.metrics
    told = [own for one in files.rounds for own in one.clients.values() if own.seconds is not None]
    up, down = _total(told, lambda own: own.bytes_up), _total(told, lambda own: own.bytes_down)
    if metrics is not None:
        up, down = metrics.cost.wire.get("bytes_up"), metrics.cost.wire.get("bytes_down")
    samples = _total(told, lambda own: own.samples)
    each = None if not samples or up is None or down is None else (up + down) / samples
    rows: list[Sequence[Cell | str]] = [
        ("client to server, training", bytes_cell(up)),
        ("server to client, training", bytes_cell(down)),
        ("both ways, each training sample", bytes_cell(each)),
        *((f"time: {said(name)}", seconds_cell(own)) for name, own in (metrics.seconds if metrics else {}).items()),
        ("training samples a second", measured(metrics.samples_per_second if metrics else None, 1)),
    ]
    return Table("Wire and time, of all clients and rounds", ("", "figure"), rows)


def _by_client(files: RunFiles) -> list[Part]:
    rows: list[Sequence[Cell | str]] = []
    for name in files.clients:
        own = [one.clients[name] for one in files.rounds if name in one.clients and one.clients[name].mixed_from]
        if own:
            rows.append(
                (
                    said(name),
                    measured(len(own)),
                    measured(_total(own, lambda one: one.samples)),
                    seconds_cell(_total(own, lambda one: one.seconds)),
                    bytes_cell(_total(own, lambda one: one.bytes_up)),
                    bytes_cell(_total(own, lambda one: one.bytes_down)),
                )
            )
    columns = ("client", "rounds trained", "samples", "training", "up", "down")
    return [Table("Each client, over all rounds", columns, rows)] if rows else []


def _total(own: Iterable[ClientRecord], what: Callable[[ClientRecord], float | int | None]) -> float | int | None:
    """Add up; ``None`` where one of them is unknown, or there is none."""
    values = [what(one) for one in own]
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None
