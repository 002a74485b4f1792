"""Tables and figures as lines of text, laid out so that no figure is ever cut.

A table that is too wide for the terminal first folds its columns of text; if that is not enough, it goes on below
with its first column repeated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from rich.cells import cell_len, chop_cells
from rich.text import Text

__all__ = ["Table", "clean", "figure", "human_bytes", "human_count", "human_seconds"]

_GAP: Final = 2
_NARROWEST: Final = 16
_UNPRINTABLE: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]+")


def clean(text: object) -> str:
    r"""Write anything on one line: control characters, which could steer a terminal, become a space.

    Example:
        >>> clean("a\x1b[2Jb\nc")
        'a [2Jb c'
    """
    return _UNPRINTABLE.sub(" ", str(text))


def figure(value: Any, digits: int = 4) -> str:
    """Write a figure for a table; one that was not measured is a dash, never 0.

    Example:
        >>> figure(None), figure(1682), figure(0.05)
        ('-', '1,682', '0.0500')
    """
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return clean(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"


def human_bytes(count: float | None) -> str:
    """Write a number of bytes with three or four digits, in powers of 1,000.

    Example:
        >>> human_bytes(None), human_bytes(999), human_bytes(999_999), human_bytes(1_234_000_000)
        ('-', '999 B', '1.0 MB', '1.2 GB')
    """
    return "-" if count is None else _scaled(count, ("B", "kB", "MB", "GB", "TB", "PB"), " ")


def human_count(count: float | None) -> str:
    """Write a large count, such as of operations, in powers of 1,000."""
    return "-" if count is None else _scaled(count, ("", "k", "M", "G", "T", "P", "E"), "")


def human_seconds(seconds: float | None) -> str:
    """Write a duration.

    Example:
        >>> [human_seconds(seconds) for seconds in (None, 2.25, 59.99, 3700)]
        ['-', '2.2 s', '1 min 00 s', '1 h 01 min']
    """
    if seconds is None or not math.isfinite(seconds):
        return "-"
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


@dataclass(frozen=True)
class Table:
    r"""Rows of cells under headings.

    Args:
        columns: The headings. The first column names the row.
        rows: Cells as text, one for each column.
        texts: Headings of the columns that hold text: left-aligned, and folded where the terminal is narrow. All
            others hold figures: right-aligned, never folded.
        ruled: Rows that a rule stands above.

    Example:
        >>> table = Table(("client", "loss"), [("0", "2.0900"), ("1", "2.1000")], texts=("client",))
        >>> print("\n".join(line.plain for line in table.lines()))
        client    loss
        --------------
        0       2.0900
        1       2.1000
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: Sequence[str] = ()
    ruled: Sequence[int] = ()

    def lines(self, width: int | None = None) -> list[Text]:
        """Lay the table out.

        Args:
            width: Cells on a line of the terminal; ``None`` when lines may be as long as they like.
        """
        head = [clean(name) for name in self.columns]
        body = [[clean(cell) for cell in row] for row in self.rows]
        widths = [max(map(cell_len, column)) for column in zip(head, *body, strict=True)]
        is_text = [name in self.texts for name in self.columns]
        lines: list[Text] = []
        for block in _blocks(widths, is_text, width):
            fitted = _fitted(block, widths, is_text, width)
            rule = Text("-" * (sum(fitted) + _GAP * (len(block) - 1)), style="dim")
            if lines:
                lines.append(Text())
            lines += _row([head[column] for column in block], fitted, [is_text[column] for column in block], "bold")
            lines.append(rule)
            for number, row in enumerate(body):
                if number in self.ruled:
                    lines.append(rule)
                lines += _row([row[column] for column in block], fitted, [is_text[column] for column in block], "")
        return lines


def _blocks(widths: Sequence[int], is_text: Sequence[bool], width: int | None) -> list[list[int]]:
    """Share columns out among blocks that fit, the first column in each."""
    if width is None:
        return [list(range(len(widths)))]
    least = [min(own, _NARROWEST) if text else own for own, text in zip(widths, is_text, strict=True)]
    blocks = [[0]]
    for column in range(1, len(widths)):
        taken = sum(least[other] + _GAP for other in blocks[-1])
        if taken + least[column] > width and len(blocks[-1]) > 1:
            blocks.append([0])
        blocks[-1].append(column)
    return blocks


def _fitted(block: Sequence[int], widths: Sequence[int], is_text: Sequence[bool], width: int | None) -> list[int]:
    """Narrow the columns of text, the widest first, until the block fits or they cannot be narrower."""
    fitted = [widths[column] for column in block]
    while width is not None and sum(fitted) + _GAP * (len(block) - 1) > width:
        places = [place for place, column in enumerate(block) if is_text[column] and fitted[place] > _NARROWEST]
        if not places:
            break
        fitted[max(places, key=fitted.__getitem__)] -= 1
    return fitted


def _row(cells: Sequence[str], widths: Sequence[int], is_text: Sequence[bool], style: str) -> list[Text]:
    folded = [_fold(cell, width) if text else [cell] for cell, width, text in zip(cells, widths, is_text, strict=True)]
    lines: list[Text] = []
    for number in range(max(map(len, folded))):
        parts: list[str] = []
        for column, width, text in zip(folded, widths, is_text, strict=True):
            part = column[number] if number < len(column) else ""
            blank = " " * (width - cell_len(part))
            parts.append(part + blank if text else blank + part)
        lines.append(Text((" " * _GAP).join(parts).rstrip(), style=style))
    return lines


def _fold(text: str, width: int) -> list[str]:
    """Break a text between words, and a word that is too long wherever it must be."""
    if cell_len(text) <= width:
        return [text]
    lines = [""]
    for word in text.split(" "):
        joined = f"{lines[-1]} {word}" if lines[-1] else word
        if cell_len(joined) <= width:
            lines[-1] = joined
        else:
            lines += chop_cells(word, width) or [""]
    return [line for line in lines if line]


def _scaled(count: float, units: Iterable[str], gap: str) -> str:
    first, *larger = units
    if abs(count) < 1000:
        return f"{count:.0f}{gap}{first}"
    for unit in larger:  # noqa: B007
        count /= 1000
        if abs(count) < 999.95:
            break
    return f"{count:,.1f}{gap}{unit}"
