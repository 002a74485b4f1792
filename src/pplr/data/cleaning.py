"""From a source's raw tables to a dataset: rows filtered, text repaired, users and items numbered.

The steps, in this order; each that did something leaves one line in ``Dataset.notes``:

1. Events without a user or an item are dropped, and so are rows that repeat another in every column (the first
   stays). A user who takes an item again at another time keeps both events.
2. ``min_rating`` drops events rated below it or not rated.
3. Text is repaired (:func:`pplr.data.text.repair_text`). An item without a title is shown by its id or dropped with
   its events, as ``empty_titles`` says.
4. ``user_core`` and ``item_core`` drop users and items with fewer events, again and again until both hold.
5. The catalog holds the items that still have an event, or with ``catalog: all`` every described item, ordered by
   id: whole numbers by value, then other ids as text. The order says nothing about popularity. Users are numbered in
   the order of their first event in the input that is left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl

from pplr.config import DataConfig
from pplr.data.interactions import Catalog, Dataset, Interactions
from pplr.data.text import repair_text
from pplr.errors import DataError

__all__ = ["RawTables", "clean"]


@dataclass(frozen=True)
class RawTables:
    """What a source hands over: text as it stands in the files, numbers checked.

    Args:
        interactions: A row for each event, in the order of the input: ``user`` and ``item`` (text), and where the
            source has them ``rating``, ``timestamp`` (seconds) or ``position`` (an order for each user) as floats.
        items: A row for each item: ``item``, ``title`` and attributes, all text; the first row of an item counts.
        users: A row for each user: ``user`` and attributes, all text; the first row of a user counts.
        notes: What reading did, one line each.
    """

    interactions: pl.DataFrame
    items: pl.DataFrame | None = None
    users: pl.DataFrame | None = None
    notes: tuple[str, ...] = ()


def clean(name: str, raw: RawTables, config: DataConfig) -> Dataset:
    """Filter, repair and number what a source handed over.

    Args:
        name: The source's name.
        raw: Its tables.
        config: ``min_rating``, ``catalog``, ``empty_titles``, ``user_core`` and ``item_core``.

    Raises:
        DataError: A step leaves nothing, or asks for a rating that the data does not have.
    """
    notes = list(raw.notes)
    events = raw.interactions.with_row_index("row").with_columns(pl.col("user", "item").str.strip_chars())
    if events.is_empty():
        raise DataError(f"{name} holds no interactions", cure="Check that data.path names the right files.")
    events = _complete(events, name, notes)
    events = _rated(events, name, config, notes)
    items = _items(raw.items, events, name, config, notes)
    events, items = _titled(events, items, name, config, notes)
    events = _cores(events, name, config, notes)
    return _number(name, events, items, raw, config, notes)


def _complete(events: pl.DataFrame, name: str, notes: list[str]) -> pl.DataFrame:
    kept = events.filter((pl.col("user").fill_null("") != "") & (pl.col("item").fill_null("") != ""))
    _note(notes, len(events) - len(kept), "interaction", "without a user or an item dropped")
    if kept.is_empty():
        raise DataError(f"no interaction of {name} has both a user and an item", cure="Check the columns.")
    columns = [column for column in kept.columns if column != "row"]
    unique = kept
    if "timestamp" in columns or "position" in columns:  # without an order, a row may well be meant twice
        unique = kept.unique(columns, keep="first", maintain_order=True)
    _note(notes, len(kept) - len(unique), "repetition", "of a whole row dropped")
    return unique


def _rated(events: pl.DataFrame, name: str, config: DataConfig, notes: list[str]) -> pl.DataFrame:
    if config.min_rating is None:
        return events
    if "rating" not in events.columns:
        raise DataError(
            f"data.min_rating is {config.min_rating:g}, but {name} has no ratings",
            cure="Remove data.min_rating, or name the column of ratings.",
        )
    kept = events.filter(pl.col("rating") >= config.min_rating)
    if kept.is_empty():
        highest = np.nanmax(events["rating"].to_numpy(), initial=-np.inf)
        seen = f"rated at most {highest:g}" if np.isfinite(highest) else "not rated"
        raise DataError(
            f"data.min_rating {config.min_rating:g} leaves none of {len(events)} interactions of {name}, {seen}",
            cure="Lower data.min_rating.",
        )
    _note(notes, len(events) - len(kept), "interaction", f"rated below {config.min_rating:g} or not rated dropped")
    return kept


def _items(
    raw: pl.DataFrame | None, events: pl.DataFrame, name: str, config: DataConfig, notes: list[str]
) -> pl.DataFrame:
    """Make a row for each item of the catalog: its id, title ("" when there is none) and attributes, repaired."""
    taken = events.select(pl.col("item").unique(maintain_order=True))
    everything = config.catalog == "all"
    if everything and (raw is None or config.item_core > 1):
        what = "has no file of items" if raw is None else f"is cleaned with data.item_core {config.item_core}"
        raise DataError(
            f"data.catalog is 'all', and {name} {what}", cure="Set data.catalog to taken, or data.item_core to 1."
        )
    if raw is None:
        return taken.with_columns(title=pl.lit(""))
    raw = raw.with_columns(pl.col("item").str.strip_chars()).filter(pl.col("item").fill_null("") != "")
    if "title" not in raw.columns:
        raw = raw.with_columns(title=pl.lit(""))
    first = raw.unique("item", keep="first", maintain_order=True)
    _note(notes, len(raw) - len(first), "further row", "of items that were described before left out")
    unused = len(first) - len(first.join(taken, on="item", how="semi"))
    _note(notes, unused, "item", f"of the items' file {'kept' if everything else 'left out'}, never taken")
    items = taken.join(first, on="item", how="left", maintain_order="left")
    if everything:
        items = pl.concat([items, first.join(taken, on="item", how="anti", maintain_order="left")], how="diagonal")
    texts = [column for column in items.columns if column != "item"]
    repaired = [pl.Series(column, _repair(items[column]), dtype=pl.String) for column in texts]
    changed = int((repaired[texts.index("title")] != items["title"].fill_null("")).sum())
    _note(notes, changed, "title", "repaired (encoding, HTML entities, whitespace)")
    return items.with_columns(repaired)


def _titled(
    events: pl.DataFrame, items: pl.DataFrame, name: str, config: DataConfig, notes: list[str]
) -> tuple[pl.DataFrame, pl.DataFrame]:
    empty = items.filter(pl.col("title") == "")
    if empty.is_empty():
        return events, items
    if config.empty_titles == "item_id":
        _note(notes, len(empty), "item", "without a title shown by id")
        named = pl.Series("title", _repair(items["item"]), dtype=pl.String)  # a title, so written as titles are
        return events, items.with_columns(title=pl.when(pl.col("title") == "").then(named).otherwise(pl.col("title")))
    kept = events.join(empty, on="item", how="anti", maintain_order="left")
    if kept.is_empty():
        raise DataError(
            f"no item of {name} has a title, and data.empty_titles is 'drop'",
            cure="Give the file of titles, or set data.empty_titles to item_id.",
        )
    _note(
        notes, len(empty), "item", f"without a title dropped, with {_counted(len(events) - len(kept), 'interaction')}"
    )
    return kept, items.filter(pl.col("title") != "")


def _cores(events: pl.DataFrame, name: str, config: DataConfig, notes: list[str]) -> pl.DataFrame:
    if config.user_core == 1 and config.item_core == 1:
        return events
    kept = events
    while True:
        fewer = kept.filter(pl.len().over("user") >= config.user_core)
        fewer = fewer.filter(pl.len().over("item") >= config.item_core)
        if len(fewer) == len(kept):
            break
        kept = fewer
    if kept.is_empty():
        raise DataError(
            f"user_core {config.user_core} and item_core {config.item_core} leave none of {len(events)} interactions "
            f"of {name}",
            cure="Lower data.user_core or data.item_core.",
        )
    if len(kept) < len(events):
        users, items = (events[key].n_unique() - kept[key].n_unique() for key in ("user", "item"))
        notes.append(
            f"user_core {config.user_core} and item_core {config.item_core}: "
            f"{_counted(len(events) - len(kept), 'interaction')}, {_counted(users, 'user')} and "
            f"{_counted(items, 'item')} dropped"
        )
    return kept


def _number(
    name: str, events: pl.DataFrame, items: pl.DataFrame, raw: RawTables, config: DataConfig, notes: list[str]
) -> Dataset:
    """Number users and items, and sort by user, then time or position, then input order."""
    if config.catalog == "taken":
        items = items.join(events, on="item", how="semi", maintain_order="left")
    item_ids = items["item"].to_list()
    order = sorted(range(len(item_ids)), key=lambda row: _id_order(item_ids[row]))
    items = items[order].with_row_index("item_number")
    users = events.sort("row").select(pl.col("user").unique(maintain_order=True)).with_row_index("user_number")
    events = events.join(users, on="user", how="left").join(items.select("item", "item_number"), on="item", how="left")
    clock = [column for column in ("timestamp", "position") if column in events.columns][:1]
    events = events.sort(["user_number", *clock, "row"])
    interactions = Interactions(
        users=events["user_number"].to_numpy().astype(np.int32),
        items=events["item_number"].to_numpy().astype(np.int32),
        ratings=events["rating"].to_numpy().astype(np.float32) if "rating" in events.columns else None,
        timestamps=events["timestamp"].to_numpy().astype(np.float64) if "timestamp" in events.columns else None,
        rows=events["row"].to_numpy().astype(np.int64),
    )
    texts = {column: tuple(items[column].to_list()) for column in items.columns if column != "item_number"}
    catalog = Catalog(texts.pop("item"), texts.pop("title"), texts)
    return Dataset(
        name=name,
        user_ids=tuple(users["user"].to_list()),
        catalog=catalog,
        interactions=interactions,
        user_attributes=_user_attributes(users, raw.users),
        notes=tuple(notes),
    )


def _user_attributes(users: pl.DataFrame, raw: pl.DataFrame | None) -> Mapping[str, tuple[str, ...]]:
    if raw is None:
        return {}
    first = raw.with_columns(pl.col("user").str.strip_chars()).unique("user", keep="first", maintain_order=True)
    joined = users.join(first, on="user", how="left", maintain_order="left")
    return {column: tuple(_repair(joined[column])) for column in first.columns if column != "user"}


def _repair(texts: pl.Series) -> list[str]:
    return [repair_text(text) if text else "" for text in texts.to_list()]


def _id_order(item_id: str) -> tuple[bool, int, str, str]:
    """Order whole numbers by value and before other ids."""
    number = item_id.isascii() and item_id.isdigit()
    digits = item_id.lstrip("0") if number else ""
    return not number, len(digits), digits, item_id


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _note(notes: list[str], count: int, noun: str, done: str) -> None:
    if count:
        notes.append(f"{_counted(count, noun)} {done}")
