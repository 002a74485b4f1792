"""``docs/performance.md``, from the profiles and the share of the matmul rate, and from prose written by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.measuring import RESULTS
from benchmarks.origins import LABELS, origins_of, place, said
from benchmarks.tables import table

__all__ = ["write_page"]

DOCS = Path(__file__).parent.parent / "docs"
TITLES = {
    "roofline": "How near training is to the machine's limit",
    "train": "Train: the next title, cut",
    "train_item_vectors": "Train: item vectors, cut",
    "evaluate": "Evaluate: titles written and grounded",
    "evaluate_item_vectors": "Evaluate: item vectors",
    "recommend": "Recommend: one user, titles written and grounded",
    "recommend_item_vectors": "Recommend: one user, item vectors",
    "aggregate": "Aggregate: weigh and mix adapters on disk",
    "compare_products": "Aggregate: compare the products BA",
}
"""Sections in their order; one that has neither figures nor prose is left out."""


def compared(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Say how many times as fast a job has become, where it is the same job on the same machine."""
    if before["counts"] != after["counts"]:
        return "before and after do not compare: they do not do as much"
    if place(before["origin"]) != place(after["origin"]):
        return "before and after do not compare: they are of different machines"
    return f"{before['seconds']['median'] / after['seconds']['median']:.2f} times as fast as before"


def job_body(name: str, content: Mapping[str, Any]) -> str:
    """Show where a job's time and bytes go, before and after where both are there."""
    told = {label: content[label][name] for label in LABELS if name in content.get(label, {})}
    if not told:
        return ""
    newest = told.get("after") or told["before"]
    lines = []
    for label, own in told.items():
        counts = ", ".join(f"{count:,} {what}" for what, count in own["counts"].items())
        seconds = own["seconds"]
        crossed = f"; {own['crossed_bytes'] / 1e6:.2f} MB crossed the cut" if own["crossed_bytes"] else ""
        lines.append(
            f"- {label}: {counts} in {seconds['median']:.3g} s ({seconds['lowest']:.3g} to {seconds['highest']:.3g} "
            f"over {seconds['count']} runs){crossed}"
        )
    if len(told) == 2:
        lines.append(f"- {compared(told['before'], newest)}")
    head = ["kind of operation", *(f"time, {own}" for own in told), *(f"memory asked for, {own}" for own in told)]
    rows = []
    for kind in newest["kinds"]:
        parts = [own["kinds"].get(kind, {"seconds": 0.0, "bytes": 0.0}) for own in told.values()]
        rows.append(
            [kind, *(f"{part['seconds']:.1%}" for part in parts), *(f"{part['bytes'] / 1e6:,.1f} MB" for part in parts)]
        )
    return "\n".join(lines) + "\n\n" + table(head, rows)


def _prose(docs: Path, name: str) -> list[str]:
    path = docs / "performance_text" / f"{name}.md"
    return [path.read_text(encoding="utf-8").strip()] if path.exists() else []


def write_page(results: Path = RESULTS, docs: Path = DOCS) -> None:
    """Write the page from whatever is there."""
    found = {
        name: json.loads((results / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("profiles", "roofline")
        if (results / f"{name}.json").exists()
    }
    parts = ["# Performance", *_prose(docs, "index")]
    if "profiles" in found:
        lines = [f"- {of}: `{own['command']}`. {said(own)}" for of, own in origins_of(found["profiles"])]
        parts.append("Where the profiles are from:\n\n" + "\n".join(lines))
    for name, title in TITLES.items():
        body = ""
        if name == "roofline" and name in found:
            lines = [f"- {note}" for note in found[name]["notes"]]
            body = f"`{found[name]['command']}`. {said(found[name])}\n\n" + "\n".join(lines)
        elif "profiles" in found:
            body = job_body(name, found["profiles"])
        own = [*([body] if body else []), *_prose(docs, name)]
        if own:
            parts.append("\n\n".join([f"## {title}", *own]))
    (docs / "performance.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print("wrote docs/performance.md")


if __name__ == "__main__":
    write_page()
