import gzip
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pplr.data.sources.reading import find_file, json_lines, numbers, pick, read_bytes, read_delimited, seconds
from pplr.errors import DataError, SourceError

HERE = Path("some.csv")


@given(st.lists(st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.none()), min_size=1))
def test_numbers_read_what_was_written(values: list[float | None]) -> None:
    series = pl.Series("x", [None if value is None else f" {value!r} " for value in values], dtype=pl.String)
    assert numbers(series, "rating", HERE).to_list() == values


@pytest.mark.parametrize("wrong", ["five", "nan", "inf", "1,5", "4 stars"])
def test_what_is_no_number_is_named_with_its_row(wrong: str) -> None:
    with pytest.raises(DataError, match=r"some\.csv: row 2: the rating .* is not a number \(and 1 more\)"):
        numbers(pl.Series(["1", wrong, "x"]), "rating", HERE)


def test_a_needed_number_is_not_missing() -> None:
    assert numbers(pl.Series(["1", "", None]), "rating", HERE).to_list() == [1.0, None, None]
    with pytest.raises(DataError, match="row 2: the timestamp is missing"):
        numbers(pl.Series(["1", ""]), "timestamp", HERE, needed=True)


def test_milliseconds_become_seconds() -> None:
    times = pl.Series("timestamp", [1_500_000_000.0, 1_500_000_000_123.0, -5.0])
    assert seconds(times).to_list() == [1_500_000_000.0, 1_500_000_000.123, -5.0]


def test_tables_in_any_dress(tmp_path: Path) -> None:
    text = 'user,title\n1,"Misérables, Les"\n2,\n'
    for content in (text.encode(), text.encode("latin-1"), text.encode("utf-8-sig"), text.encode("utf-16")):
        for packed in (content, gzip.compress(content)):
            (tmp_path / "x.csv").write_bytes(packed)
            frame = read_delimited(tmp_path / "x.csv")
            assert frame.rows() == [("1", "Misérables, Les"), ("2", None)]
            assert frame.columns == ["user", "title"]


def test_files_that_are_no_table(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_text("")
    with pytest.raises(DataError, match="is empty"):
        read_delimited(file)
    file.write_text("a,b\n1,2,3\n")
    with pytest.raises(DataError, match="is not a table separated by ','"):
        read_delimited(file)
    file.write_text("1,2\n")
    with pytest.raises(DataError, match="has 2 columns separated by ',', expected 3: a, b, c"):
        read_delimited(file, names=["a", "b", "c"])
    file.write_bytes(gzip.compress(b"a,b\n" * 1000)[:-20])
    with pytest.raises(SourceError, match="truncated"):
        read_delimited(file)
    with pytest.raises(SourceError, match="cannot read"):
        read_bytes(tmp_path / "none")


def test_json_lines_and_python_literals(tmp_path: Path) -> None:
    file = tmp_path / "x.json.gz"
    file.write_bytes(gzip.compress(b"{\"a\": 1}\n\n{'a': 'it\"s', u'b': None}\n"))
    assert list(json_lines(file)) == [(1, {"a": 1}), (3, {"a": 'it"s', "b": None})]
    file.write_bytes(gzip.compress(b'{"a": 1}\n' * 10_000)[:-30])
    with pytest.raises(SourceError, match="truncated"):
        list(json_lines(file))
    for content, message in ((b'{"a": 1}\n{"a": \n', "line 2 is not JSON"), (b"[1]\n", "line 1 holds no object")):
        file.write_bytes(content)
        with pytest.raises(DataError, match=message):
            list(json_lines(file))


def test_a_missing_column_says_what_is_there() -> None:
    frame = pl.DataFrame({"uzer": ["a"], "item": ["b"]})
    assert pick(frame, "item", ["asin", "item"], HERE) == "item"
    with pytest.raises(
        DataError, match=r"no column 'user' or 'uid' for the user, only: uzer, item\. Did you mean 'uzer'"
    ):
        pick(frame, "user", ["user", "uid"], HERE)


def test_finding_one_file(tmp_path: Path) -> None:
    for name in ("a.csv", "b.csv", "c.txt"):
        (tmp_path / name).write_text("x")
    assert find_file(tmp_path, lambda name: name.endswith(".txt"), "x") == tmp_path / "c.txt"
    assert find_file(tmp_path / "a.csv", lambda name: False, "x") == tmp_path / "a.csv"
    with pytest.raises(SourceError, match=r"several files that fit: a\.csv, b\.csv"):
        find_file(tmp_path, lambda name: name.endswith(".csv"), "x")
