"""The figures of a finished run, for a person: who got what, how far clients differ, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.text import Text

from pplr.apps.tables import Table, clean, figure, human_bytes, human_count, human_seconds
from pplr.runtimes.comparing import metric_names

__all__ = ["result_table"]


def result_table(metrics: Mapping[str, Any], width: int | None = None) -> list[Text]:
    """Lay out the content of ``metrics.json``.

    A row for each client (before -> after where the initial adapter was tested too), the overall row, the floors on
    the same users, the spread over the clients, and the cost. A figure that was not measured is a dash.

    Args:
        metrics: The content.
        width: Cells on a line, or ``None`` for no limit.

    Returns:
        Lines in which nothing is taken for markup.
    """
    sections = [
        [Text(_headline(metrics), style="bold")],
        _ranking_table(metrics).lines(width),
        _spread_table(metrics).lines(width) if metrics.get("spread") else [],
        _cost_table(metrics["cost"]).lines(width) if metrics.get("cost") else [],
        [Text(line) for line in _closing_lines(metrics)],
        [Text(line) for line in _privacy_lines(metrics["privacy"])] if metrics.get("privacy") else [],
        [Text(line) for line in _state_lines(metrics["states"])] if metrics.get("states") else [],
    ]
    lines: list[Text] = []
    for section in filter(None, sections):
        if lines:
            lines.append(Text())
        lines += section
    return lines


def _headline(metrics: Mapping[str, Any]) -> str:
    parts = [clean(metrics.get("method") or "-"), clean(metrics.get("backbone") or "-")]
    cut = metrics.get("cut")
    if cut:
        kept = f"{figure(cut.get('input_layers'))} + {figure(cut.get('output_layers'))}"
        parts.append(f"{kept} of {figure(cut.get('total_layers'))} blocks on the client")
    else:
        parts.append("uncut")
    return ", ".join(parts)


def _ranking_table(metrics: Mapping[str, Any]) -> Table:
    names = metric_names(metrics)
    clients: Mapping[str, Mapping[str, Any]] = metrics.get("clients") or {}
    before: Mapping[str, Any] = metrics.get("before") or {}
    users = [own.get("users") for own in clients.values()]
    counted = [count for count in users if count is not None]
    rows = [
        (f"client {client}", figure(own.get("users")), *_cells(names, own, (before.get("clients") or {}).get(client)))
        for client, own in clients.items()
    ]
    total = sum(counted) if counted and len(counted) == len(users) else None
    ruled = [len(rows)]
    rows.append(("overall", figure(total), *_cells(names, metrics.get("overall") or {}, before.get("overall"))))
    ruled.append(len(rows))
    for floor, values in (metrics.get("floors") or {}).items():
        rows.append((floor, "", *_cells(names, values or {}, None)))
    return Table(("", "users", *names), rows, texts=("",), ruled=ruled)


def _cells(names: list[str], after: Mapping[str, Any], before: Mapping[str, Any] | None) -> list[str]:
    if before is None:
        return [figure(after.get(name)) for name in names]
    return [f"{figure(before.get(name))} -> {figure(after.get(name))}" for name in names]


def _spread_table(metrics: Mapping[str, Any]) -> Table:
    keys = ("worst", "best", "gap", "std")
    spread: Mapping[str, Mapping[str, Any]] = metrics["spread"]
    rows = [(name, *(figure((values or {}).get(key)) for key in keys)) for name, values in spread.items()]
    columns = ("over clients", "worst client", "best client", "gap", "std")
    return Table(columns, rows, texts=("over clients",))


def _cost_table(cost: Mapping[str, Any]) -> Table:
    rows = []
    for party in ("client", "server", "whole"):
        own: Mapping[str, Any] = cost.get(party) or {}
        if party == "whole" and not own:  # of a run of an earlier version
            continue
        stored, peak, flops = (own.get(key) for key in ("stored_bytes", "peak_rss_bytes", "train_flops"))
        label = "whole model" if party == "whole" else party
        rows.append((label, human_bytes(stored), human_bytes(peak), human_count(flops)))
    return Table(("cost", "stored", "peak memory", "training FLOPs, worked out"), rows, texts=("cost",))


def _closing_lines(metrics: Mapping[str, Any]) -> list[str]:
    wire: Mapping[str, Any] = (metrics.get("cost") or {}).get("wire") or {}
    seconds: Mapping[str, Any] = metrics.get("seconds") or {}
    speed = metrics.get("samples_per_second")
    taken = ", ".join(f"{name} {human_seconds(value)}" for name, value in seconds.items())
    return [
        f"wire: {human_bytes(wire.get('bytes_up'))} up, {human_bytes(wire.get('bytes_down'))} down",
        f"time: {taken or '-'}; {figure(speed, digits=1)} samples/s",
    ]


def _privacy_lines(privacy: Mapping[str, Any]) -> list[str]:
    spent: Mapping[str, Any] = privacy.get("epsilon") or {}
    told = ", ".join(f"client {clean(name)} {figure(value, digits=3)}" for name, value in spent.items())
    unit, adjacency = clean(privacy.get("unit") or "-"), clean(privacy.get("adjacency") or "-")
    return [
        f"privacy: ε = {told or '-'}, at δ = {privacy.get('delta', '-')}, for each {unit} "
        f"({adjacency}); middle adapter {clean(privacy.get('middle') or '-')}",
        clean(privacy.get("note") or ""),
    ]


def _state_lines(told: Mapping[str, Any]) -> list[str]:
    return [f"what crosses the cut: {clean(told.get('summary') or '-')}", clean(told.get("note") or "")]
