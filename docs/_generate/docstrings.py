"""Docstrings on their way through Napoleon, which reads Google's style."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from _generate.bibliography import entries, short_name

__all__ = ["after_napoleon", "before_napoleon"]

_COLON = "\ue000"
"""Stands for a colon meanwhile: Napoleon takes what comes before one in an attribute's sentence for its type."""
_ATTRIBUTES = ("attribute", "data", "property")


def before_napoleon(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Hide an attribute's colons, and turn the keys below ``Cites:`` into links to the bibliography."""
    if what in _ATTRIBUTES:
        lines[:] = [line.replace(": ", f"{_COLON} ") for line in lines]
    if "Cites:" not in (line.strip() for line in lines):
        return
    known = entries((Path(app.srcdir) / "references.bib").read_text(encoding="utf-8"))
    place = next(number for number, line in enumerate(lines) if line.strip() == "Cites:") + 1
    while place < len(lines) and (key := lines[place].strip()):
        indent = lines[place][: len(lines[place]) - len(lines[place].lstrip())]
        lines[place] = f"{indent}| :ref:`{short_name(known[key])} <bib-{key}>`"
        place += 1


def after_napoleon(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Show the colons again."""
    if what in _ATTRIBUTES:
        lines[:] = [line.replace(_COLON, ":") for line in lines]
