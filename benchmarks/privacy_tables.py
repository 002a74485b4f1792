"""Tables of what a server reads, over the seeds of an audit."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.tables import Section, table, where

SHOWN = ("token_recovery", "rouge_l", "item_f1", "target_hit@1")


def privacy_section(name: str, told: dict[str, Any]) -> Section:
    """Make the section of one audited run.

    Args:
        name: The audit's.
        told: What ``benchmarks.audit`` wrote.
    """
    seeds = told["seeds"]
    head = ["k, m", "noise", f"{seeds[0]['metric']}", "attack", "has", *SHOWN]
    rows: list[list[str]] = []
    before: tuple[Any, ...] = ()
    several = len({own.get("pairs") for own in seeds[0]["settings"]}) > 1
    for place, found in enumerate(seeds[0]["settings"]):
        cut = found["cut"]
        worth = statistics.fmean(own["settings"][place]["worth"]["mean"] for own in seeds)
        for number, audit in enumerate(found["audits"]):
            if audit in before:
                continue  # the same attack on the same states: only the other cut differs
            over = [own["settings"][place]["audits"][number] for own in seeds]
            where_cut = f"{cut['input_layers']}, {cut['output_layers']}"
            rows.append(
                [
                    where_cut,
                    _done_to_states(found, seeds[0].get("wire"), several),
                    f"{worth:.4f}",
                    audit["audit"],
                    audit["knowledge"],
                ]
                + [_cell([own[metric] for own in over]) for metric in SHOWN]
            )
        before = (*before, *found["audits"])
    guess = [_cell([own["baseline"][metric] for own in seeds]) for metric in SHOWN]
    rows.append(["any", "any", "", "no states", "popularity", *guess])
    users = seeds[0]["users"]
    drawn = f"{users} users" if len(seeds) == 1 else f"{users} users of each of {len(seeds)} seeds"
    started = f"`{told['command']}`; {where(told['machine'])}."
    note = (
        f"{started} Means over {drawn}; in parentheses the widest of the seeds' 95 % intervals (users resampled). "
        f"Plot: [results/privacy/{name}.png](../results/privacy/{name}.png)."
    )
    return Section(f"privacy-{name}", f"What a server reads: {name}", table(head, rows) + "\n\n" + note)


def _done_to_states(found: dict[str, Any], own_wire: str | None, several: bool) -> str:
    """Say what was done to states, and how many passes were looked at, if more than one."""
    added = f"{found['noise']:g}" if found["noise"] or not found.get("guard") else ""
    wire = f"{found['wire']} on the wire" if found.get("wire") not in (None, own_wire) else ""
    passes = f"mean of {found['passes']} passes" if found.get("passes", 1) > 1 else ""
    pairs = f"{found['pairs']} pairs" if several else ""
    return ", ".join(part for part in (found.get("guard"), added, wire, passes, pairs) if part)


def _cell(seeds: list[dict[str, float] | None]) -> str:
    known = [own for own in seeds if own is not None]
    if not known:
        return ""
    mean = statistics.fmean(own["mean"] for own in known)
    return f"{mean:.2f} ({min(own['low'] for own in known):.2f} to {max(own['high'] for own in known):.2f})"
