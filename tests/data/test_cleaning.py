from collections import Counter

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pplr.config import DataConfig
from pplr.data.cleaning import RawTables, clean
from pplr.data.interactions import Dataset
from pplr.errors import DataError
from pplr.testing import refuses


def _events(rows: list[tuple[object, ...]], columns: str = "user item rating timestamp") -> pl.DataFrame:
    kinds = {"user": pl.String, "item": pl.String}
    return pl.DataFrame(rows, {name: kinds.get(name, pl.Float64) for name in columns.split()}, orient="row")


def _told(dataset: Dataset) -> list[tuple[str, list[str]]]:
    ids = dataset.catalog.item_ids
    return [(user, [ids[i] for i in own]) for user, own in zip(dataset.user_ids, dataset.histories, strict=True)]


pairs = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=40)


@given(pairs, st.integers(1, 4), st.integers(1, 4))
def test_cores_equal_a_naive_fixed_point(drawn: list[tuple[int, int]], user_core: int, item_core: int) -> None:
    events = _events([(f"u{user}", f"i{item}") for user, item in drawn], "user item")
    config = DataConfig(user_core=user_core, item_core=item_core)
    kept = list(drawn)
    while True:
        users, items = Counter(user for user, _ in kept), Counter(item for _, item in kept)
        fewer = [(user, item) for user, item in kept if users[user] >= user_core and items[item] >= item_core]
        if fewer == kept:
            break
        kept = fewer
    if not kept:
        with pytest.raises(DataError, match=r"leave none of \d+ interactions.*Lower"):
            clean("drawn", RawTables(events), config)
        return
    dataset = clean("drawn", RawTables(events), config)
    order = list(dict.fromkeys(user for user, _ in kept))
    assert _told(dataset) == [(f"u{user}", [f"i{item}" for other, item in kept if other == user]) for user in order]
    assert dataset.catalog.item_ids == tuple(f"i{item}" for item in sorted({item for _, item in kept}))
    assert any("core" in note for note in dataset.notes) == (len(kept) < len(drawn))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 3)), min_size=1, max_size=30))
def test_order_is_user_then_time_then_input(drawn: list[tuple[int, int, int]]) -> None:
    events = _events([(str(user), str(item), time) for user, item, time in drawn], "user item timestamp")
    dataset = clean("drawn", RawTables(events), DataConfig())
    unique = list(dict.fromkeys(drawn))
    for user, told in _told(dataset):
        own = [(time, row, item) for row, (other, item, time) in enumerate(unique) if str(other) == user]
        assert told == [str(item) for _, _, item in sorted(own, key=lambda event: event[:2])]
    rows = dataset.interactions.rows
    assert rows is not None
    assert [str(drawn[row][1]) for row in rows] == [item for _, own in _told(dataset) for item in own]


def test_position_gives_the_order_and_no_times() -> None:
    events = _events([("a", "x", 2.0), ("a", "y", 0.0), ("a", "z", 1.0)], "user item position")
    dataset = clean("drawn", RawTables(events), DataConfig())
    assert _told(dataset) == [("a", ["y", "z", "x"])]
    assert dataset.interactions.timestamps is None


def test_whole_rows_count_once_where_there_is_an_order() -> None:
    rows = [("a", "x", 5.0, 1.0), ("a", "x", 5.0, 1.0), ("a", "x", 5.0, 2.0)]
    dataset = clean("drawn", RawTables(_events(rows)), DataConfig())
    assert _told(dataset) == [("a", ["x", "x"])]
    assert dataset.notes == ("1 repetition of a whole row dropped", "1 item without a title shown by id")


def test_catalog_order_is_by_id_and_says_nothing_about_popularity() -> None:
    rows = [("a", item) for item in ("b", "10", "10", "9", "010", "B", "9")]
    dataset = clean("drawn", RawTables(_events(rows, "user item")), DataConfig())
    assert dataset.catalog.item_ids == ("9", "010", "10", "B", "b")


def test_min_rating_drops_what_is_lower_or_not_rated() -> None:
    rows = [("a", "x", 3.0, 1.0), ("a", "y", 4.0, 2.0), ("b", "x", None, 1.0), ("b", "y", 5.0, 3.0)]
    dataset = clean("drawn", RawTables(_events(rows)), DataConfig(min_rating=4))
    assert _told(dataset) == [("a", ["y"]), ("b", ["y"])]
    assert dataset.notes[0] == "2 interactions rated below 4 or not rated dropped"
    with pytest.raises(DataError, match="leaves none of 4 interactions of drawn, rated at most 5"):
        clean("drawn", RawTables(_events(rows)), DataConfig(min_rating=6))
    with pytest.raises(DataError, match="has no ratings"):
        clean("drawn", RawTables(_events([("a", "x")], "user item")), DataConfig(min_rating=1))


def _with_titles(**config: object) -> Dataset:
    items = pl.DataFrame(
        {
            "item": ["2", "1", "1", "3", "7"],
            "title": ["Tom &amp; Jerry", "PokÃ©mon", "again", "  ", "never taken"],
            "genre": ["A|B &amp; C", None, "x", "D", "E"],
        }
    )
    events = _events([("a", "1"), ("a", "2"), ("a", "3"), ("b", "4"), ("b", "1"), ("", "1"), ("b", None)], "user item")
    users = pl.DataFrame({"user": ["b", "c"], "age": ["30", "40"]})
    return clean("drawn", RawTables(events, items, users, ("read",)), DataConfig(**config))


def test_titles_are_repaired_and_empty_ones_shown_by_id() -> None:
    dataset = _with_titles()
    assert dataset.catalog.item_ids == ("1", "2", "3", "4")
    assert dataset.catalog.titles == ("Pokémon", "Tom & Jerry", "3", "4")
    assert dataset.catalog.attributes == {"genre": ("", "A|B & C", "D", "")}
    assert dataset.user_attributes == {"age": ("", "30")}
    assert dataset.notes == (
        "read",
        "2 interactions without a user or an item dropped",
        "1 further row of items that were described before left out",
        "1 item of the items' file left out, never taken",
        "3 titles repaired (encoding, HTML entities, whitespace)",
        "2 items without a title shown by id",
    )


def test_a_catalog_may_hold_items_that_nobody_took() -> None:
    dataset = _with_titles(catalog="all")
    assert dataset.catalog.item_ids == ("1", "2", "3", "4", "7")
    assert dataset.catalog.titles[-1] == "never taken"
    assert dataset.catalog.attributes["genre"][-1] == "E"
    assert "1 item of the items' file kept, never taken" in dataset.notes
    assert _told(dataset) == _told(_with_titles())


def test_owners_of_parts_of_the_users_have_the_catalog_of_the_whole() -> None:
    events = _events([("a", "1"), ("a", "2"), ("b", "4"), ("b", "1"), ("c", "3")], "user item")
    items = pl.DataFrame({"item": ["2", "1", "4", "3"], "title": ["Two", "One", "Four", "Three"]})
    parts = [events.filter(pl.col("user") == user) for user in ("a", "b", "c")]
    whole, *own = [clean("d", RawTables(part, items), DataConfig(catalog="all")) for part in (events, *parts)]
    assert {part.catalog.sha256 for part in own} == {whole.catalog.sha256}
    assert [_told(part) for part in own] == [[told] for told in _told(whole)]
    taken = [clean("d", RawTables(part, items), DataConfig()).catalog.sha256 for part in parts]
    assert whole.catalog.sha256 not in taken


def test_a_whole_catalog_needs_a_file_of_items_and_no_core_of_items() -> None:
    events = _events([("a", "1"), ("a", "2")], "user item")
    with refuses(DataError, "data.catalog is 'all', and d has no file of items"):
        clean("d", RawTables(events), DataConfig(catalog="all"))
    with refuses(DataError, "is cleaned with data.item_core 2"):
        _with_titles(catalog="all", item_core=2)


def test_items_without_a_title_can_be_dropped_before_cores_count() -> None:
    dataset = _with_titles(empty_titles="drop", user_core=2)
    assert _told(dataset) == [("a", ["1", "2"])]
    assert "2 items without a title dropped, with 2 interactions" in dataset.notes
    with pytest.raises(DataError, match=r"no item of drawn has a title.*item_id"):
        clean("drawn", RawTables(_events([("a", "x")], "user item")), DataConfig(empty_titles="drop"))


def test_nothing_in_nothing_out() -> None:
    with pytest.raises(DataError, match="holds no interactions"):
        clean("drawn", RawTables(_events([], "user item")), DataConfig())
    with pytest.raises(DataError, match="both a user and an item"):
        clean("drawn", RawTables(_events([("", "x")], "user item")), DataConfig())
