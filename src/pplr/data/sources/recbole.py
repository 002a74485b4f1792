"""RecBole's atomic files: ``X.inter`` and, if they are there, ``X.item`` and ``X.user``.

Tab-separated, no quoting, and a header of ``name:type``. The user and the item are ``user_id`` and ``item_id``; the
title is ``title``, ``movie_title``, ``item_name`` or ``name``; ``data.columns`` may name others. ``timestamp`` gives
the times; without it, ``position`` gives the order within each user; without both, the order of the file counts.
Every other column of items and users becomes an attribute, the words of a ``token_seq`` joined by ``|``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from pplr.config import DataConfig
from pplr.data.cleaning import RawTables
from pplr.data.sources.reading import find_file, numbers, pick, read_delimited, seconds
from pplr.data.sources.registry import register_source
from pplr.errors import DataError

__all__ = ["read_atomic"]

_TITLES = ("title", "movie_title", "item_name", "name")


@register_source(
    "recbole",
    summary="RecBole's atomic files: X.inter with X.item and X.user, by folder or prefix.",
    needs="X.inter, X.item and X.user",
)
def read_atomic(path: Path, config: DataConfig) -> RawTables:
    """Read atomic files from a folder, a prefix (``folder/X``) or ``folder/X.inter``.

    Raises:
        SourceError: There is no ``.inter`` file, or several.
        DataError: A header is not atomic, a needed column is missing, or a rating or time is no number.
    """
    prefixed = path.with_name(f"{path.name}.inter")
    inter = prefixed if prefixed.is_file() else path
    inter = find_file(inter, lambda name: name.endswith(".inter"), "a folder with X.inter, or the prefix of one")
    events = _read(inter)
    user, item = (_named(events, key, [f"{key}_id"], config, inter) for key in ("user", "item"))
    columns = [events[user].alias("user"), events[item].alias("item")]
    for key in ("rating", "timestamp", "position"):
        name = config.columns.get(key, key)
        if name in events.columns:
            columns.append(numbers(events[name], key, inter, needed=key != "rating").alias(key))
    found = pl.DataFrame(columns)
    if "timestamp" in found.columns:
        found = found.with_columns(seconds(found["timestamp"]))
        found = found.drop("position", strict=False)
    items = _described(inter.with_suffix(".item"), "item", config)
    if items is not None and (title := _title(items, config, inter.with_suffix(".item"))):
        items = items.rename({title: "title"})
    return RawTables(found, items, _described(inter.with_suffix(".user"), "user", config))


def _read(path: Path) -> pl.DataFrame:
    """Read one file; names lose their types, and the words of a sequence are joined by ``|`` unless it is a title."""
    frame = read_delimited(path, separator="\t", quote=None)
    headers = [header.rpartition(":") for header in frame.columns]
    if any(not sign for _, sign, _ in headers):
        raise DataError(
            f"{path} begins with {' '.join(frame.columns[:6])!r}, expected tab-separated name:type such as "
            "user_id:token",
            cure="Check that it is an atomic file.",
        )
    frame.columns = [name for name, _, _ in headers]
    words = [name for name, _, kind in headers if kind == "token_seq" and name not in _TITLES]
    return frame.with_columns(pl.col(words).str.strip_chars().str.replace_all(" +", "|")) if words else frame


def _named(frame: pl.DataFrame, key: str, usual: Sequence[str], config: DataConfig, path: Path) -> str:
    return pick(frame, key, [config.columns[key]] if key in config.columns else usual, path)


def _described(path: Path, key: str, config: DataConfig) -> pl.DataFrame | None:
    if not path.is_file():
        return None
    frame = _read(path)
    return frame.rename({_named(frame, key, [f"{key}_id"], config, path): key})


def _title(items: pl.DataFrame, config: DataConfig, path: Path) -> str | None:
    if "title" in config.columns:
        return _named(items, "title", _TITLES, config, path)
    return next((name for name in _TITLES if name in items.columns), None)
