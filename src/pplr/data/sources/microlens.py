"""MicroLens (Westlake University): ``*_pairs.csv`` of user, item and time, and a file of titles.

The file of titles is ``*_titles.csv`` or ``*_title_en.csv``, with or without a header; older ones leave commas in
titles unquoted, so everything after the first comma of a line is the title. Times come in milliseconds.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Final

import polars as pl

from pplr.config import DataConfig
from pplr.data.cleaning import RawTables
from pplr.data.sources.reading import find_file, numbers, pick, read_bytes, read_delimited, seconds
from pplr.data.sources.registry import register_source
from pplr.data.text import decode_text
from pplr.errors import DataError

__all__ = ["read_microlens"]

_USERS: Final = ("user", "userID", "user_id", "userId")
_ITEMS: Final = ("item", "videoID", "item_id", "video_id", "videoId")
_TIMES: Final = ("timestamp", "time")


@register_source(
    "microlens",
    summary="MicroLens: short videos, *_pairs.csv with a csv of titles.",
    needs="X_pairs.csv and X_titles.csv",
)
def read_microlens(path: Path, config: DataConfig) -> RawTables:
    """Read pairs and, when there is a file of them, titles.

    Raises:
        SourceError: There is no ``*_pairs.csv``, or several.
        DataError: A column is missing, a time is no number, or several files of titles fit.
    """
    pairs = find_file(path, lambda name: name.endswith("_pairs.csv"), "a folder with X_pairs.csv and X_titles.csv")
    frame = read_delimited(pairs)
    wanted = {"user": _USERS, "item": _ITEMS, "timestamp": _TIMES}
    events = frame.select(pl.col(pick(frame, key, names, pairs)).alias(key) for key, names in wanted.items())
    events = events.with_columns(seconds(numbers(events["timestamp"], "timestamp", pairs, needed=True)))
    found = sorted(entry for entry in pairs.parent.glob("*title*.csv") if entry.is_file())
    own = [entry for entry in found if entry.name.startswith(pairs.name.removesuffix("_pairs.csv"))]
    if len(own or found) > 1:
        names = ", ".join(entry.name for entry in own or found)
        raise DataError(f"several files of titles lie beside {pairs.name}: {names}", cure="Keep one of them there.")
    if not found:
        return RawTables(events, notes=(f"no file of titles beside {pairs.name}, so no item has a title",))
    return RawTables(events, _titles((own or found)[0]))


def _titles(path: Path) -> pl.DataFrame:
    items: list[str] = []
    titles: list[str] = []
    for row in csv.reader(decode_text(read_bytes(path)).splitlines(keepends=True), skipinitialspace=True):
        if len(row) >= 2 and not (not items and row[0].strip() in _ITEMS):
            items.append(row[0].strip())
            titles.append(",".join(row[1:]))
    if not items:
        raise DataError(f"{path} holds no line of an item and its title", cure="Check that it is the file of titles.")
    return pl.DataFrame({"item": items, "title": titles})
