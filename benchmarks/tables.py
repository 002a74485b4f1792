"""Markdown tables of figures over seeds, and the prose that stands beside them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import t as student

from pplr.errors import RunError


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Args:
        slug: Name of the file, without its ending, that holds what was written by hand for it.
        title: Its heading.
        body: What was made from figures.
        level: Depth of the heading.
    """

    slug: str
    title: str
    body: str
    level: int = 2


def interval(values: Sequence[float]) -> str:
    """Tell a mean, with its 95 % interval over seeds (Student's t) where there is more than one."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.4f}"
    half = float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.4f} ± {half:.4f}"


def known_interval(values: Iterable[float | None]) -> str:
    """Tell the interval of what was measured; nothing where nothing was."""
    known = [value for value in values if value is not None]
    return interval(known) if known else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def where(machine: dict[str, Any]) -> str:
    """Name what was measured on."""
    device = f"{machine['device']} beside " if "device" in machine else ""
    return f"{device}{machine['processor']}, {machine['threads']} threads"


def command(told: dict[str, Any], start: str) -> str:
    """Write a command with its configuration and settings."""
    return " ".join([start, told["config"], *(f"--set {own}" for own in told["set"])])


def page(title: str, opening: str, sections: Sequence[Section], texts: Path) -> str:
    """Put sections together, each with its prose below its heading.

    Args:
        title: The page's heading.
        opening: What stands below it; ``index.md`` follows.
        sections: In order.
        texts: Folder of the prose, a file ``SLUG.md`` for a section; there need be none.

    Raises:
        RunError: A file belongs to no section, so it would be lost.
    """
    prose = {path.stem: path.read_text(encoding="utf-8").strip() for path in sorted(texts.glob("*.md"))}
    known = {"index", *(section.slug for section in sections)}
    if lost := sorted(prose.keys() - known):
        raise RunError(
            f"{texts.name}/{lost[0]}.md belongs to no section of {title}", cure=f"Name it one of: {sorted(known)}."
        )
    parts = [f"# {title}", opening, prose.get("index", "")]
    for section in sections:
        parts += [f"{'#' * section.level} {section.title}", prose.get(section.slug, ""), section.body]
    return "\n\n".join(part for part in parts if part) + "\n"
