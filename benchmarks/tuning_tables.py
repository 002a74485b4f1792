"""Tables of the settings that were tried: what each was worth on validation, the best first."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
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
            _worth([seed[metric] for seed in own["seeds"].values()]),
            ", ".join(f"{seed['best_round']} of {seed['rounds']}" for seed in own["seeds"].values()),
            f"{_mean(own, 'train_seconds') / 60:.1f}",
        ]
        for trial, own in order
    ]
    head = ["trial", "settings", f"validation {metric}", "best round", "minutes of training"]
    runs = [seed for own in told["trials"].values() for seed in own["seeds"].items()]
    seeds = sorted({int(seed) for seed, _ in runs})
    places = sorted({where(told["machine"] | run["machine"]) for _, run in runs})
    called = command({"config": told["config"], "set": sorted(shared)}, "pplr train")
    drawn = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
    note = f"All: `{called}`, with {drawn}; {'; '.join(places)}."
    return Section(f"tuning-{name}", f"Tuning: {name}", table(head, rows) + "\n\n" + note)


def _worth(values: Sequence[float]) -> str:
    """Write the mean, and where there are several seeds each one's value."""
    each = f" ({', '.join(f'{value:.4f}' for value in values)})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{each}"


def _mean(trial: dict[str, Any], key: str) -> float:
    """Average what the seeds of a trial say."""
    return statistics.fmean(seed[key] for seed in trial["seeds"].values())


def _shared(told: dict[str, Any]) -> set[str]:
    """Settings that all trials have."""
    return set.intersection(*(set(own["set"]) for own in told["trials"].values()))
