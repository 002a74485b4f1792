"""Recommendations for many users as one file: a row for each user and item."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from pplr.errors import StorageError
from pplr.storage import write_atomic

if TYPE_CHECKING:
    from pplr.runtimes.recommending import UserList

__all__ = ["FORMATS", "check_format", "write_lists"]

FORMATS = (".csv", ".jsonl", ".parquet")
"""Endings of the files that can be written."""


def check_format(path: Path) -> None:
    """Refuse a file whose ending says no format.

    Raises:
        StorageError: It is none of :data:`FORMATS`.
    """
    if path.suffix not in FORMATS:
        raise StorageError(f"{path} ends with no known format", cure=f"Let it end with one of: {', '.join(FORMATS)}.")


def write_lists(lists: Iterable[UserList], path: Path) -> int:
    """Write columns client, user, rank, item, title, score, in the format that the file's ending says.

    Args:
        lists: One for each user.
        path: The file; what was there before is replaced at once and whole.

    Returns:
        The number of rows.

    Raises:
        StorageError: The ending says no format, or the file cannot be written.
    """
    import polars as pl

    check_format(path)
    rows = [
        (own.client, own.user, item.rank, item.item_id, item.title, item.score) for own in lists for item in own.items
    ]
    schema = {"client": pl.String, "user": pl.String, "rank": pl.Int64, "item": pl.String, "title": pl.String}
    frame = pl.DataFrame(rows, schema=schema | {"score": pl.Float64}, orient="row")
    content = io.BytesIO()
    if path.suffix == ".csv":
        frame.write_csv(content)
    elif path.suffix == ".jsonl":
        frame.write_ndjson(content)
    else:
        frame.write_parquet(content)
    write_atomic(path, content.getvalue())
    return len(frame)
