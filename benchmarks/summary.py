"""The results as one list and one page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.measuring import RESULTS

MET = {True: "yes", False: "no", None: ""}
PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"


def _bound(row: dict[str, Any]) -> str:
    if row.get("at_least", 0) is None:
        return ""
    word, bound = ("least", row["at_least"]) if "at_least" in row else ("most", row["at_most"])
    return f"at {word} {round(bound, 2)}"


def write_summary() -> None:
    """Write ``benchmarks/results/summary.json`` and ``docs/benchmarks.md`` from the results that are there."""
    rows: list[dict[str, Any]] = []
    sections: list[str] = []
    for path in sorted(RESULTS.glob("*.json")):
        if path.name == "summary.json":
            continue
        content = json.loads(path.read_text(encoding="utf-8"))
        rows += content["rows"]
        table = ["| what | against | ratio | bound | met |", "| --- | --- | --- | --- | --- |"]
        table += [
            f"| {r['name']} | {r['against']} | {r['ratio']:.2f} | {_bound(r)} | {MET[r['met']]} |"
            for r in content["rows"]
        ]
        machine = content["machine"]
        where = f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}"
        if "device" in content:
            where = f"{content['device']}; {where}"
        detail = [f"Measured on {where}, transformers {machine['transformers']}, peft {machine['peft']}."]
        detail += [f"- {note}" for note in content.get("notes", [])]
        for name, rate in content.get("samples_per_second", {}).items():
            detail.append(
                f"- {name}: median {rate['median']:.2f} samples/s, {rate['lowest']:.2f} to {rate['highest']:.2f} "
                f"over {rate['count']} steps"
            )
        if "added_bytes" in content:
            detail.append(
                f"- {content['clients']} clients: {content['added_bytes'] / 1e6:.1f} MB added, "
                f"{content['adapter_and_optimizer_bytes'] / 1e6:.1f} MB of adapters and optimizer states"
            )
        command = content.get("command", f"python -m benchmarks.{path.stem}")
        parts = [f"## {path.stem}", f"`{command}`", *(["\n".join(table)] if content["rows"] else []), "\n".join(detail)]
        sections.append("\n\n".join(parts))
    (RESULTS / "summary.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    head = (
        "# Benchmarks\n\nWritten by `make bench` from `benchmarks/results/*.json`. "
        "Ratios of times are of medians, taken in turns.\n\n"
    )
    PAGE.write_text(head + "\n\n".join(sections) + "\n", encoding="utf-8")
    print("wrote benchmarks/results/summary.json and docs/benchmarks.md")


if __name__ == "__main__":
    write_summary()
