"""Blocks of the page as HTML. Every text in them is escaped, as in the report, whose templates and styles these are."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from pplr.apps.reports.elements import Part

__all__ = ["render", "render_parts", "style"]


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=ChoiceLoader([PackageLoader("pplr.apps.web"), PackageLoader("pplr.apps.reports")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["exactly"] = repr
    environment.filters["score"] = _score
    return environment


def render(template: str, **values: Any) -> str:
    """Fill a template."""
    return _environment().get_template(template).render(**values)


def render_parts(parts: Sequence[Part], anchor: str) -> str:
    """Write parts of a report.

    Args:
        parts: In their order.
        anchor: What the ids of this block begin with.
    """
    return render("blocks.html", parts=parts, anchor=anchor)


def style() -> str:
    """Return the style sheet: the report's, and what a page with controls needs besides."""
    return "\n".join(_environment().get_template(name).render() for name in ("page.css", "web.css"))


def _score(value: float) -> str:
    """Show a score: counts as they are, others with three digits.

    Example:
        >>> _score(412.0), _score(0.59312)
        ('412', '0.593')
    """
    return f"{value:,.0f}" if value == int(value) else f"{value:,.3f}"
