from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pplr.apps.atomic import write_atomic_files
from pplr.config import DataConfig
from pplr.data.cleaning import RawTables, clean
from pplr.data.interactions import Dataset
from pplr.data.sources import load_dataset
from pplr.errors import DataError, StorageError

ids = st.text(st.sampled_from("aZ09 \"',;:|#é漢"), min_size=1, max_size=4).filter(lambda text: text.strip())
texts = st.text(st.sampled_from("aZ9 \"',;:|[]é漢"), max_size=8)


@st.composite
def datasets(draw: st.DrawFn) -> Dataset:
    events = draw(st.lists(st.tuples(ids, ids), min_size=1, max_size=12))
    frame = pl.DataFrame(events, schema=["user", "item"], orient="row")
    size = len(events)
    if draw(st.booleans()):
        ratings = draw(st.lists(st.none() | st.floats(-5, 5, width=32), min_size=size, max_size=size))
        frame = frame.with_columns(rating=pl.Series(ratings, dtype=pl.Float64))
    if draw(st.booleans()):
        times = draw(st.lists(st.integers(0, 3) | st.floats(-1e9, 2e9), min_size=size, max_size=size))
        frame = frame.with_columns(timestamp=pl.Series(times, dtype=pl.Float64, strict=False))
    described = {}
    for kind, column in (("item", "genre"), ("user", "town")):
        own = frame[kind].unique(maintain_order=True)
        extra = {name: draw(st.lists(texts, min_size=len(own), max_size=len(own))) for name in ("title", column)}
        described[kind] = pl.DataFrame({kind: own, **extra}).drop(*(["title"] if kind == "user" else []))
    users = described["user"] if draw(st.booleans()) else None
    return clean("drawn", RawTables(frame, described["item"], users), DataConfig())


def read_back(folder: Path) -> Dataset:
    return load_dataset(DataConfig(source="recbole", path=folder))


@settings(deadline=None)
@given(datasets())
def test_what_is_written_reads_back_the_same(dataset: Dataset) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "shop"
        write_atomic_files(dataset, folder)
        again = read_back(folder)
    assert again.user_ids == dataset.user_ids
    assert again.catalog == dataset.catalog
    assert again.user_attributes == dataset.user_attributes
    for name in ("users", "items", "ratings", "timestamps"):
        before, after = getattr(dataset.interactions, name), getattr(again.interactions, name)
        assert (before is None) == (after is None)
        if before is not None:
            np.testing.assert_array_equal(before, after)


def small(**items: list[str]) -> Dataset:
    events = pl.DataFrame({"user": ["u", "v", "u"], "item": ["1", "2", "2"]})
    return clean("small", RawTables(events, pl.DataFrame({"item": ["1", "2"], **items})), DataConfig())


def test_the_files_carry_the_folders_name(tmp_path: Path) -> None:
    written = write_atomic_files(small(title=["A", "B"]), tmp_path / "games")
    assert [path.name for path in written] == ["games.item", "games.inter"]
    assert written[1].read_text(encoding="utf-8") == "user_id:token\titem_id:token\nu\t1\nv\t2\nu\t2\n"


def test_a_folder_that_holds_data_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "games"
    (written, *_) = write_atomic_files(small(title=["A", "B"]), folder)
    before = written.read_bytes()
    with pytest.raises(StorageError, match=r"already holds games\.inter"):
        write_atomic_files(small(title=["C", "D"]), folder)
    assert written.read_bytes() == before
    with pytest.raises(StorageError, match="is a file"):
        write_atomic_files(small(title=["A", "B"]), written)


def test_attributes_named_like_the_formats_own_columns_are_renamed(tmp_path: Path) -> None:
    write_atomic_files(small(title=["A", "B"], item_id=["x", "y"]), tmp_path / "games")
    again = read_back(tmp_path / "games")
    assert again.catalog.item_ids == ("1", "2")
    assert again.catalog.attributes == {"other_item_id": ("x", "y")}


def test_an_id_that_the_format_cannot_express_is_refused(tmp_path: Path) -> None:
    events = pl.DataFrame({"user": ["u", "v\tw"], "item": ["1", "2"]})
    dataset = clean("bad", RawTables(events), DataConfig())
    with pytest.raises(DataError, match=r"the user id 'v\\tw' holds a tab"):
        write_atomic_files(dataset, tmp_path / "games")
