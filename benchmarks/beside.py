"""A row that stands beside those that are bound."""

from __future__ import annotations

from typing import Any


def beside(name: str, against: str, ratio: float | None) -> dict[str, Any]:
    """Make a row without a bound; its ratio is ``None`` where there is none."""
    return {"name": name, "against": against, "ratio": ratio, "at_least": None, "at_most": None, "met": None}
