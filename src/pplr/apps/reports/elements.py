"""What a page is made of. Text is kept as it was read: the templates escape it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from pplr.apps.tables import clean, figure, human_bytes, human_count, human_seconds

__all__ = [
    "MISSING",
    "Cell",
    "Chart",
    "Code",
    "Drawing",
    "Facts",
    "Gallery",
    "Link",
    "Listing",
    "Page",
    "Paragraph",
    "Part",
    "Section",
    "Span",
    "Table",
    "Text",
    "between",
    "bytes_cell",
    "count_cell",
    "measured",
    "said",
    "seconds_cell",
    "share_cell",
]

MISSING = "not measured"


@dataclass(frozen=True)
class Cell:
    """A figure as it is shown, with its exact value beside it for whoever reads the page by program.

    Args:
        text: What is shown.
        value: The exact figure; ``None`` for text, and where nothing was measured.
    """

    kind: ClassVar = "cell"
    text: str
    value: float | int | None = None


@dataclass(frozen=True)
class Code:
    """A command or a name, to be typed as it stands."""

    kind: ClassVar = "code"
    text: str


@dataclass(frozen=True)
class Link:
    """A link to a section of the same page.

    Args:
        anchor: The section's.
        text: What is shown.
    """

    kind: ClassVar = "link"
    anchor: str
    text: str


Text = Sequence[str | Cell | Code | Link]


@dataclass(frozen=True)
class Paragraph:
    """Running text.

    Args:
        text: Its pieces.
        role: ``plain``, ``note`` for what limits a figure, or ``summary``.
    """

    kind: ClassVar = "paragraph"
    text: Text
    role: str = "plain"


@dataclass(frozen=True)
class Facts:
    """Names and what they stand for."""

    kind: ClassVar = "facts"
    rows: Mapping[str, Text]


@dataclass(frozen=True)
class Table:
    """Rows of figures; the first cell of each names the row.

    Args:
        caption: What it shows, with the unit.
        columns: Headings.
        rows: Cells, one for each column.
        texts: Headings of columns that hold text.
        ruled: Rows that a rule stands above.
    """

    kind: ClassVar = "table"
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    texts: Sequence[str] = ()
    ruled: Sequence[int] = ()


@dataclass(frozen=True)
class Chart:
    """A picture.

    Args:
        source: A data URI.
        description: What it shows, for those who do not see it.
        caption: What it shows, for all.
        wide: Whether it takes the whole width of the page.
        size: Its width and height, by which a page keeps room before it is drawn; unknown when absent.
    """

    kind: ClassVar = "chart"
    source: str
    description: str
    caption: str
    wide: bool = False
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Gallery:
    """Charts beside each other, as many as fit.

    Args:
        charts: In their order.
        broad: Whether they are broader than high.
    """

    kind: ClassVar = "gallery"
    charts: Sequence[Chart]
    broad: bool = False


@dataclass(frozen=True)
class Span:
    """One part of the model in the drawing of a cut.

    Args:
        party: ``client`` or ``server``.
        name: Such as ``input stage``.
        holds: What is in it.
        crossing: What goes from here to the next; empty for the last.
    """

    party: str
    name: str
    holds: Sequence[str]
    crossing: str = ""


@dataclass(frozen=True)
class Drawing:
    """Where the model is cut."""

    kind: ClassVar = "drawing"
    spans: Sequence[Span]
    caption: str


@dataclass(frozen=True)
class Listing:
    """A file as it is, folded away until it is asked for."""

    kind: ClassVar = "listing"
    title: str
    text: str


Part = Paragraph | Facts | Table | Chart | Gallery | Drawing | Listing


@dataclass(frozen=True)
class Section:
    """A part of a page under its own heading."""

    anchor: str
    title: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Page:
    """A whole page.

    Args:
        title: What it is of.
        summary: The first paragraph.
        sections: The rest.
        made_by: Program and version.
        notices: What a reader has to know before any figure.
    """

    title: str
    summary: Text
    sections: Sequence[Section]
    made_by: str
    notices: Sequence[Text] = field(default=())


def said(text: object) -> str:
    """Write anything as text on one line."""
    return clean(text)


def measured(value: float | int | None, digits: int = 4) -> Cell:
    """Show a figure; one that was not measured says so.

    Example:
        >>> measured(0.08445).text, measured(943).text, measured(None).text
        ('0.0844', '943', 'not measured')
    """
    return _shown(value, lambda own: figure(own, digits))


def bytes_cell(value: float | int | None) -> Cell:
    """Show a number of bytes."""
    return _shown(value, human_bytes)


def count_cell(value: float | int | None) -> Cell:
    """Show a large count."""
    return _shown(value, human_count)


def seconds_cell(value: float | int | None) -> Cell:
    """Show a duration."""
    return _shown(value, human_seconds)


def share_cell(value: float | None) -> Cell:
    """Show a share in percent."""
    return _shown(value, lambda own: f"{own:.0%}")


def between(mean: float, low: float, high: float, digits: int = 2) -> Cell:
    """Show a mean with its interval."""
    return Cell(f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})", mean)


def _shown(value: float | int | None, show: Callable[[float | int], str]) -> Cell:
    return Cell(MISSING) if value is None else Cell(show(value), value)
