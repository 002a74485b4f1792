"""The results as one list and one page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measuring import RESULTS, complete
from benchmarks.origins import ages, machines, origins_of, said
from benchmarks.required import BENCHMARKS, REQUIRED, missing

MET = {True: "yes", False: "no", None: ""}
PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
NOT_MEASURED = "not measured"
HEAD = """# Benchmarks

Written by `make bench` from `benchmarks/results/*.json`. A benchmark that repeats itself tells medians, both sides of a
ratio taking turns; what ran once, and what is worked out from a part of it, is told in its notes. The plain loops that
aggregation is measured against make a few of the mixtures, and the time of all is worked out from these.

`benchmarks/results/summary.json` has every row with `name`, `against`, `ratio`, `at_least`, `at_most` and `met`. A row
has one bound or none, and null for what it has not. What was not measured has null for `ratio` and `met` too. Where no
commit is told of a result, its day is the one on which it was committed."""


def _bound(row: Mapping[str, Any]) -> str:
    bounds = [f"at {word} {round(row[f'at_{word}'], 2)}" for word in ("least", "most") if row[f"at_{word}"] is not None]
    return " and ".join(bounds)


def _row(row: Mapping[str, Any]) -> str:
    ratio = row.get("reason", NOT_MEASURED) if row["ratio"] is None else f"{row['ratio']:.2f}"
    return f"| {row['name']} | {row['against']} | {ratio} | {_bound(row)} | {MET[row['met']]} |"


def _notes(content: Mapping[str, Any]) -> list[str]:
    lines = [f"- {note}" for note in content.get("notes", [])]
    for name, rate in content.get("samples_per_second", {}).items():
        lines.append(
            f"- {name}: median {rate['median']:.2f} samples/s, {rate['lowest']:.2f} to {rate['highest']:.2f} "
            f"over {rate['count']} steps"
        )
    if "added_bytes" in content:
        lines.append(
            f"- {content['clients']} clients: {content['added_bytes'] / 1e6:.1f} MB added, "
            f"{content['adapter_and_optimizer_bytes'] / 1e6:.1f} MB of adapters and optimizer states"
        )
    return lines


def section(name: str, content: Mapping[str, Any] | None, rows: Sequence[Mapping[str, Any]]) -> str:
    """Write a benchmark's part of the page.

    Args:
        name: Of the benchmark.
        content: Its result, where there is one.
        rows: Measured, and owed.
    """
    command = f"python -m benchmarks.{name}"
    own = origins_of(content) if content is not None else []
    commands = dict.fromkeys(origin.get("command", command) for _, origin in own) or [command]
    parts = [f"## {name}", "\n".join(f"`{told}`" for told in commands)]
    if rows:
        parts.append(
            "\n".join(["| what | against | ratio | bound | met |", "| --- | --- | --- | --- | --- |", *map(_row, rows)])
        )
    if content is None:
        parts.append("Not measured.")
    else:
        where = [f"{said(origin)}" if not of else f"- {of}. {said(origin)}" for of, origin in own]
        parts.append("\n".join([*where, *_notes(content)]))
    return "\n\n".join(parts)


def write_summary() -> None:
    """Write ``benchmarks/results/summary.json`` and ``docs/benchmarks.md``: what is there, and what is owed."""
    found = {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(RESULTS.glob("*.json"))
        if path.name != "summary.json"
    }
    rows: list[dict[str, Any]] = []
    sections: list[str] = []
    unmeasured: list[str] = []
    for name in sorted({*found, *BENCHMARKS, *(own.benchmark for own in REQUIRED)}):
        measured = [complete(row) for row in found.get(name, {}).get("rows", [])]
        own = measured + missing(name, measured)
        rows += [{key: value for key, value in row.items() if key != "reason"} for row in own]
        sections.append(section(name, found.get(name), own))
        if name not in found or len(own) > len(measured):
            unmeasured.append(f"`{name}`" if name not in found else f"rows of `{name}`")
    named = [(name, origin) for name, content in found.items() for _, origin in origins_of(content)]
    told = [ages(named), machines(named)] if named else []
    if unmeasured:
        told.append(f"Not measured: {', '.join(unmeasured)}.")
    (RESULTS / "summary.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    PAGE.write_text("\n\n".join([HEAD, "\n".join(told), *sections]) + "\n", encoding="utf-8")
    print("wrote benchmarks/results/summary.json and docs/benchmarks.md")


if __name__ == "__main__":
    write_summary()
