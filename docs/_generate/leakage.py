"""What attacks read at the cuts that were measured, from ``results/privacy``."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["leakage_table"]

_HEAD = ("backbone", "k", "m", "blocks", "history (F1)", "target", "history, by popularity", "users", "seeds")


def leakage_table(results: Path) -> str:
    """Write a row for each cut at which an attacker had the client's adapter, without noise: the most that was read."""
    rows = [
        row for path in sorted(results.glob("*.json")) for row in _rows(json.loads(path.read_text(encoding="utf-8")))
    ]
    unique = sorted(set(rows), key=lambda row: (row[0], int(row[3]), int(row[1]), int(row[2])))
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [_HEAD, ["---"] * len(_HEAD), *unique]) + "\n"


def _rows(told: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    seeds = told.get("seeds", [])  # audits of a run; other kinds of results have none
    for place, found in enumerate(seeds[0]["settings"] if seeds else []):
        if found["noise"] or found.get("guard") or found.get("passes", 1) > 1:
            continue
        if all(own["knowledge"] != "own" for own in found["audits"]):
            continue
        over = [own["settings"][place]["audits"] for own in seeds]
        cut = found["cut"]
        yield (
            f"`{seeds[0]['backbone']}`",
            *(str(cut[name]) for name in ("input_layers", "output_layers", "total_layers")),
            f"{_strongest(over, 'item_f1'):.2f}",
            f"{_strongest(over, 'target_hit@1'):.2f}",
            f"{statistics.fmean(own['baseline']['item_f1']['mean'] for own in seeds):.2f}",
            str(seeds[0]["users"]),
            str(len(seeds)),
        )


def _strongest(over: list[list[dict[str, Any]]], metric: str) -> float:
    """Take the attack that reads most on the mean of the seeds, of those with the client's adapter."""
    means = [
        statistics.fmean(own[metric]["mean"] for own in same)
        for same in zip(*over, strict=True)
        if same[0]["knowledge"] == "own" and same[0][metric] is not None
    ]
    return max(means)
