"""Tables of the settings that were tried: what each was worth on validation, the best first."""

from __future__ import annotations

from typing import Any

from benchmarks.tables import Section, command, table, where


def tuning_section(name: str, told: dict[str, Any]) -> Section:
    """Make the section of one grid.

    Args:
        name: The grid's.
        told: What ``benchmarks.tune`` wrote.
    """
    metric = told["metric"]
    order = sorted(told["trials"].items(), key=lambda pair: pair[1][metric], reverse=metric != "loss")
    rows = [
        [
            trial,
            "; ".join(f"`{setting}`" for setting in own["set"] if setting not in _shared(told)) or "as configured",
            f"{own[metric]:.4f}",
            f"{own['best_round']} of {own['rounds']}",
            f"{own['train_seconds'] / 60:.1f}",
        ]
        for trial, own in order
    ]
    head = ["trial", "settings", f"validation {metric}", "best round", "minutes of training"]
    shared = sorted(_shared(told))
    places = sorted({where(told["machine"] | own["machine"]) for own in told["trials"].values()})
    note = f"All: `{command({'config': told['config'], 'set': shared}, 'pplr train')}`; {'; '.join(places)}."
    return Section(f"tuning-{name}", f"Tuning: {name}", table(head, rows) + "\n\n" + note)


def _shared(told: dict[str, Any]) -> set[str]:
    """Settings that all trials have."""
    return set.intersection(*(set(own["set"]) for own in told["trials"].values()))
