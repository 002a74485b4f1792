"""Amazon reviews (McAuley, UCSD), in the editions of 2014, 2018 and 2023.

A folder with one file of reviews (``.json``, ``.jsonl`` or, for 2023, also ``.csv``; each may be ``.gz``) and one
file ``meta_*`` of items, or the file of reviews itself. Files are read line by line and only what is needed stays in
memory. In the edition of 2023 an item is its ``parent_asin``, and times come in milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import polars as pl

from pplr.config import DataConfig
from pplr.data.cleaning import RawTables
from pplr.data.sources.reading import find_file, json_lines, numbers, pick, read_delimited, seconds
from pplr.data.sources.registry import register_source
from pplr.errors import DataError

__all__ = ["read_amazon"]

_ENDS: Final = (".json", ".json.gz", ".jsonl", ".jsonl.gz")
_CSV_ENDS: Final = (".csv", ".csv.gz")


@dataclass(frozen=True)
class _Edition:
    """What an edition calls things."""

    user: str
    item: str
    rating: str
    timestamp: str
    brand: str
    category: str


_OLD: Final = _Edition("reviewerID", "asin", "overall", "unixReviewTime", "brand", "categories")
_EDITIONS: Final[Mapping[str, _Edition]] = {
    "amazon-2014": _OLD,
    "amazon-2018": _Edition(_OLD.user, _OLD.item, _OLD.rating, _OLD.timestamp, "brand", "category"),
    "amazon-2023": _Edition("user_id", "parent_asin", "rating", "timestamp", "store", "categories"),
}


def read_amazon(path: Path, config: DataConfig, *, edition: str) -> RawTables:
    """Read reviews and, when there is a file of them, items.

    Args:
        path: The folder, or the file of reviews.
        config: Not used beyond the path.
        edition: ``amazon-2014``, ``amazon-2018`` or ``amazon-2023``.

    Raises:
        SourceError: A file is missing or truncated.
        DataError: A line lacks what the edition has, or a rating or time is no number.
    """
    keys = _EDITIONS[edition]
    ends = _ENDS + _CSV_ENDS if edition == "amazon-2023" else _ENDS
    reviews = find_file(
        path,
        lambda name: name.lower().endswith(ends) and not name.startswith("meta_"),
        f"a file of reviews ({', '.join(ends)}) and one meta_* beside it",
    )
    table = reviews.name.lower().endswith(_CSV_ENDS)
    events = _csv(reviews, keys) if table else _reviews(reviews, keys, edition)
    events = events.with_columns(
        numbers(events["rating"], "rating", reviews),
        seconds(numbers(events["timestamp"], "timestamp", reviews, needed=True)),
    )
    meta = _meta_beside(reviews)
    if meta is None:
        return RawTables(events, notes=(f"no meta_* file beside {reviews.name}, so no item has a title",))
    return RawTables(events, _items(meta, keys, set(events["item"].to_list())))


def _register() -> None:
    for edition in _EDITIONS:
        year = edition.removeprefix("amazon-")
        register_source(
            edition,
            summary=f"Amazon reviews, {year} edition: a file of reviews with its meta_* file.",
            needs="a file of reviews and its meta_* file",
        )(partial(read_amazon, edition=edition))


_register()


def _csv(path: Path, keys: _Edition) -> pl.DataFrame:
    frame = read_delimited(path)
    names = {"user": keys.user, "item": keys.item, "rating": keys.rating, "timestamp": keys.timestamp}
    return frame.select(pl.col(pick(frame, key, [name], path)).alias(key) for key, name in names.items())


def _reviews(path: Path, keys: _Edition, edition: str) -> pl.DataFrame:
    users: list[str] = []
    items: list[str] = []
    ratings: list[str] = []
    times: list[str] = []
    known: dict[str, str] = {}  # one copy of each id
    for line, review in json_lines(path):
        try:
            user, item = str(review[keys.user]), str(review[keys.item])
            time = str(review[keys.timestamp])
        except KeyError as error:
            raise DataError(
                f"{path}: line {line} has no {error}, only: {', '.join(map(str, review))}",
                cure=f"Check that it is a file of reviews of {edition}; the editions differ.",
            ) from error
        users.append(known.setdefault(user, user))
        items.append(known.setdefault(item, item))
        rating = review.get(keys.rating)
        ratings.append("" if rating is None else str(rating))
        times.append(known.setdefault(time, time))
    columns = {"user": users, "item": items, "rating": ratings, "timestamp": times}
    return pl.DataFrame(columns, schema=dict.fromkeys(columns, pl.String))


def _meta_beside(reviews: Path) -> Path | None:
    """Find the items' file: of the same category, else the only one in the folder."""
    found = sorted(entry for entry in reviews.parent.iterdir() if entry.name.startswith("meta_") and entry.is_file())
    found = [entry for entry in found if entry.name.lower().endswith(_ENDS)]
    category = reviews.name.split(".")[0].removeprefix("reviews_").removesuffix("_5")
    same = [entry for entry in found if entry.name.split(".")[0] == f"meta_{category}"]
    if len(same or found) > 1:
        names = ", ".join(entry.name for entry in same or found)
        raise DataError(
            f"several files of items lie beside {reviews.name}: {names}", cure=f"Keep one, meta_{category}.*."
        )
    return next(iter(same or found), None)


def _items(path: Path, keys: _Edition, wanted: set[str]) -> pl.DataFrame:
    columns: dict[str, list[str]] = {"item": [], "title": [], "brand": [], "category": []}
    for _, described in json_lines(path):
        item = str(described.get(keys.item, ""))
        if item not in wanted:
            continue
        columns["item"].append(item)
        columns["title"].append(_title(described.get("title")))
        columns["brand"].append(str(described.get(keys.brand) or ""))
        columns["category"].append("|".join(dict.fromkeys(_words(described.get(keys.category)))))
    return pl.DataFrame(columns, schema=dict.fromkeys(columns, pl.String))


def _title(value: Any) -> str:
    """Take a title; pieces of script that the crawler of 2018 took for one are none."""
    text = str(value or "")
    return "" if "getTime" in text and "var " in text else text


def _words(value: Any) -> Iterable[str]:
    if isinstance(value, list):
        for inner in value:
            yield from _words(inner)
    elif value:
        yield str(value).replace("|", "/")
