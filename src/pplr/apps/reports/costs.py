"""What a run took: bytes, memory, compute and traffic of both sides, beside holding the whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from pplr.apps.reports.elements import (
    Cell,
    Code,
    Paragraph,
    Part,
    Section,
    Table,
    bytes_cell,
    count_cell,
    measured,
    said,
    seconds_cell,
    share_cell,
)
from pplr.apps.reports.records import ClientRecord, RunFiles

__all__ = ["cost_section", "whole_bytes"]


def whole_bytes(files: RunFiles) -> float | int | None:
    """Add up what both sides store; ``None`` where either is unknown, or clients have different cuts."""
    if files.metrics is None or (files.metrics.cut is not None and files.metrics.cut.by_client):
        return None
    client, server = (own.get("stored_bytes") for own in (files.metrics.cost.client, files.metrics.cost.server))
    return None if client is None or server is None else client + server


def cost_section(files: RunFiles) -> Section:
    """Say what the run cost either side."""
    parts: list[Part] = [_sides(files)]
    if files.metrics is None or files.metrics.cost.client.get("peak_rss_bytes") is None:
        parts.append(
            Paragraph(
                (
                    "Peak memory can be told apart only where client and server are two processes (",
                    Code("pplr train --kit"),
                    "); operations are not counted. ",
                    Code(f"pplr plan {said(files.config.backbone.model)}"),
                    " works out memory and compute of other cuts.",
                ),
                "note",
            )
        )
    parts += [_time_and_wire(files), *_by_client(files)]
    return Section("cost", "What it cost", parts)


def _sides(files: RunFiles) -> Table:
    cost, whole = files.metrics.cost if files.metrics else None, whole_bytes(files)
    rows: list[Sequence[Cell | str]] = []
    for party in ("client", "server"):
        own = getattr(cost, party) if cost else {}
        stored = own.get("stored_bytes")
        share = None if not whole or stored is None else stored / whole
        peak, flops = bytes_cell(own.get("peak_rss_bytes")), count_cell(own.get("train_flops"))
        rows.append((party, bytes_cell(stored), share_cell(share), peak, flops))
    nothing = bytes_cell(None)
    rows.append(
        ("the whole model in one place", bytes_cell(whole), share_cell(1.0 if whole else None), nothing, nothing)
    )
    columns = ("", "stored, frozen tensors", "of the whole", "peak memory", "training FLOPs")
    return Table("Each side, beside holding the whole model", columns, rows, ruled=[2])


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
