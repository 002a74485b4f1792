"""Tables of the settings that were tried: what each was worth on validation, the best first."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.tables import Section, command, table, where


def tuning_section(name: str, told: dict[str, Any]) -> Section:
    """Make the section of one grid.

    Args:
        name: The grid's.
        told: What ``benchmarks.tune`` wrote.
    """
    metric = told["metric"]
    shared = _shared(told)
    order = sorted(told["trials"].items(), key=lambda pair: _mean(pair[1], metric), reverse=metric != "loss")
    rows = [
        [
            trial,
            "; ".join(f"`{setting}`" for setting in own["set"] if setting not in shared) or "as configured",
            f"{_mean(own, metric):.4f}",
            ", ".join(f"{seed[metric]:.4f}" for seed in own["seeds"].values()),
            ", ".join(f"{seed['best_round']} of {seed['rounds']}" for seed in own["seeds"].values()),
            f"{_mean(own, 'train_seconds') / 60:.1f}",
        ]
        for trial, own in order
    ]
    seeds = sorted({int(seed) for own in told["trials"].values() for seed in own["seeds"]})
    several = len(seeds) > 1
    head = ["trial", "settings", f"validation {metric}", "of each seed", "best round", "minutes of training"]
    rows = rows if several else [[*row[:3], *row[4:]] for row in rows]
    head = head if several else [*head[:3], *head[4:]]
    places = sorted({where(told["machine"] | own["machine"]) for own in told["trials"].values()})
    called = command({"config": told["config"], "set": sorted(shared)}, "pplr train")
    drawn = f"seed {seeds[0]}" if not several else f"seeds {', '.join(map(str, seeds))}"
    note = f"All: `{called}`, with {drawn}; {'; '.join(places)}."
    return Section(f"tuning-{name}", f"Tuning: {name}", table(head, rows) + "\n\n" + note)


def _mean(trial: dict[str, Any], key: str) -> float:
    """Average what the seeds of a trial say."""
    return statistics.fmean(seed[key] for seed in trial["seeds"].values())


def _shared(told: dict[str, Any]) -> set[str]:
    """Settings that all trials have."""
    return set.intersection(*(set(own["set"]) for own in told["trials"].values()))
