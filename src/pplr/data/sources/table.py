"""Any CSV, TSV or Parquet file, by a mapping of columns.

``data.columns`` says what the file calls ``user``, ``item``, ``title``, ``rating`` and ``timestamp``; a name that is
not given is taken as it is, if the file has such a column. Times are Unix seconds or milliseconds, dates, or ISO 8601
text. Every other key of ``data.columns``, and ``data.partition.column``, names an attribute. Of the second file,
``data.items_path``, every column is an attribute of its item.

An attribute in the file of events belongs to the items if each item has one value but users have several; otherwise
to the users, each of whom gets the value that they have most often (of equals, the first).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import polars as pl

from pplr.config import DataConfig
from pplr.data.cleaning import RawTables
from pplr.data.sources.reading import find_file, numbers, pick, read_bytes, read_delimited, seconds
from pplr.data.sources.registry import register_source
from pplr.errors import DataError, SourceError

__all__ = ["read_table"]

_ENDS: Final = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet")
_OWN: Final = ("user", "item", "title", "rating", "timestamp")


@register_source(
    "table",
    summary="Any CSV, TSV or Parquet file, by data.columns, with a second file of items if you like.",
    needs="one .csv, .tsv or .parquet file",
)
def read_table(path: Path, config: DataConfig) -> RawTables:
    """Read a table of events and, with ``data.items_path``, one of items.

    Raises:
        SourceError: A file is missing.
        DataError: A column is missing, or a rating or time cannot be read.
    """
    file = find_file(path, lambda name: name.lower().endswith(_ENDS), f"one file ({', '.join(_ENDS)})")
    frame = _read(file)
    names = _names(frame, config)
    for key in ("user", "item"):
        names[key] = pick(frame, key, [names.get(key, key)], file)
    columns = [_text(frame[names["user"]]).alias("user"), _text(frame[names["item"]]).alias("item")]
    if "rating" in names:
        columns.append(numbers(frame[pick(frame, "rating", [names["rating"]], file)], "rating", file).alias("rating"))
    if "timestamp" in names:
        columns.append(_times(frame[pick(frame, "timestamp", [names["timestamp"]], file)], file))
    events = pl.DataFrame(columns)
    items = _items(config)
    known = set(items.columns) if items is not None else set()
    extra = {key: name for key, name in names.items() if key not in (*_OWN, *known)}
    if "title" in names and "title" not in known:
        extra["title"] = names["title"]
    users, described = _attributes(frame, events, extra, file)
    if described is not None:
        items = described if items is None else items.join(described, on="item", how="left", maintain_order="left")
    return RawTables(events, items, users)


def _names(frame: pl.DataFrame, config: DataConfig) -> dict[str, str]:
    """Say which column each key names: as configured, else by the key's own name where there is such a column."""
    names: dict[str, str] = {key: key for key in _OWN if key in frame.columns}
    column = config.partition.column
    if config.partition.by == "column" and column is not None and column in frame.columns:
        names[column] = column
    return names | config.columns


def _read(path: Path) -> pl.DataFrame:
    if path.suffix.lower() != ".parquet":
        first = read_bytes(path)[: 1 << 16].partition(b"\n")[0].decode("utf-8", errors="replace")
        return read_delimited(path, separator=max(",\t;|", key=first.count))
    try:
        return pl.read_parquet(path)
    except (pl.exceptions.PolarsError, OSError) as error:
        problem = " ".join(str(error).split())[:200]
        raise DataError(f"{path} is not a Parquet file: {problem}", cure="Check the file.") from error


def _text(values: pl.Series) -> pl.Series:
    """Write ids as text; whole numbers that a missing value turned into floats lose their '.0'."""
    if values.dtype.is_float() and (values.drop_nulls().drop_nans() % 1 == 0).all():
        values = values.fill_nan(None).cast(pl.Int64)
    return values.cast(pl.String)


def _times(values: pl.Series, path: Path) -> pl.Series:
    """Bring times to Unix seconds; dates without a zone count as UTC."""
    if values.dtype == pl.String:
        text = values.str.strip_chars()
        text = text.set(text == "", None)
        if text.cast(pl.Float64, strict=False).null_count() > text.null_count():
            values = text.str.to_datetime(strict=False, time_zone="UTC", time_unit="us")
            wrong = values.is_null() & text.is_not_null()
            if wrong.any():
                row = int(wrong.arg_max() or 0)
                raise DataError(
                    f"{path}: row {row + 1}: the timestamp {text[row]!r} is neither a number nor a date",
                    cure="Write all times as Unix seconds, or all as ISO 8601 such as 2020-01-31 23:59:59.",
                )
    if values.dtype.is_temporal():
        values = values.cast(pl.Datetime("us")).dt.timestamp("us") / 1e6
        return numbers(values, "timestamp", path, needed=True).alias("timestamp")
    return seconds(numbers(values, "timestamp", path, needed=True).alias("timestamp"))


def _items(config: DataConfig) -> pl.DataFrame | None:
    if config.items_path is None:
        return None
    path = config.items_path.expanduser()
    if not path.is_file():
        raise SourceError(f"there is no file {path}", cure="Correct data.items_path.")
    frame = _read(path)
    back = {
        name: key for key, name in config.columns.items() if name in frame.columns and key not in ("user", "rating")
    }
    back[pick(frame, "item", [config.columns.get("item", "item"), "item", "item_id", "id"], path)] = "item"
    return frame.select(_text(frame[name]).alias(back.get(name, name)) for name in frame.columns)


def _attributes(
    frame: pl.DataFrame, events: pl.DataFrame, extra: Mapping[str, str], path: Path
) -> tuple[pl.DataFrame | None, pl.DataFrame | None]:
    """Share further columns of the events out: (attributes of users, attributes of items)."""
    found: dict[str, list[pl.DataFrame]] = {"user": [], "item": []}
    for key, name in extra.items():
        values = _text(frame[pick(frame, key, [name], path)]).fill_null("").alias(key)
        pairs = events.select("user", "item").with_columns(values)
        of_items = key == "title" or (_varies(pairs, "user", key) and not _varies(pairs, "item", key))
        found["item" if of_items else "user"].append(_most_frequent(pairs, "item" if of_items else "user", key))
    return _joined(found["user"], "user"), _joined(found["item"], "item")


def _varies(pairs: pl.DataFrame, owner: str, key: str) -> bool:
    return pairs.select(owner, key).unique().get_column(owner).is_duplicated().any()


def _most_frequent(pairs: pl.DataFrame, owner: str, key: str) -> pl.DataFrame:
    counted = pairs.filter(pl.col(key) != "").group_by(owner, key, maintain_order=True).len("events")
    return (
        counted.sort("events", descending=True, maintain_order=True)
        .unique(owner, keep="first", maintain_order=True)
        .select(owner, key)
    )


def _joined(frames: list[pl.DataFrame], owner: str) -> pl.DataFrame | None:
    if not frames:
        return None
    joined = frames[0]
    for frame in frames[1:]:
        joined = joined.join(frame, on=owner, how="full", coalesce=True, maintain_order="left_right")
    return joined
