from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from pplr.apps.tables import Table, clean, figure, human_bytes, human_count, human_seconds

words = st.text(st.sampled_from("ab [](/)漢字é\x1b\t\n"), max_size=40)
numbers = st.floats(-1e6, 1e6).map(figure)


@st.composite
def tables(draw: st.DrawFn) -> Table:
    count = draw(st.integers(1, 9))
    columns = ["run", "title", *(f"metric {number}" for number in range(count))]
    row = st.tuples(words, words, *[numbers] * count)
    return Table(columns, draw(st.lists(row, max_size=5)), texts=("run", "title"))


def test_a_table_without_a_limit_is_one_line_for_each_row() -> None:
    table = Table(("client", "loss"), [("0", "2.0900"), ("long name", "-")], texts=("client",), ruled=(1,))
    assert [line.plain for line in table.lines()] == [
        "client       loss",
        "-----------------",
        "0          2.0900",
        "-----------------",
        "long name       -",
    ]


@given(tables(), st.integers(40, 120))
def test_every_figure_is_whole_and_every_line_fits(table: Table, width: int) -> None:
    lines = [line.plain for line in table.lines(width)]
    assert all(cell_len(line) <= width for line in lines)
    shown = " ".join(lines).split()
    for row in table.rows:
        for cell in row[2:]:
            assert cell in shown
    for heading in table.columns[2:]:
        assert any(heading in line for line in lines)


@given(tables(), st.integers(40, 120))
def test_no_letter_of_a_text_is_lost_when_it_is_folded(table: Table, width: int) -> None:
    def letters(texts: list[str]) -> list[str]:
        return sorted("".join(texts).replace(" ", ""))

    narrow = Table(table.columns[:2], [row[:2] for row in table.rows], texts=table.texts)
    body = [line.plain for line in narrow.lines(width)][2:]
    assert letters(body) == letters([clean(cell) for row in narrow.rows for cell in row])


def test_a_line_break_or_an_escape_in_a_cell_stays_in_its_cell() -> None:
    lines = Table(("title",), [("a\nb\x1b[31mc",)], texts=("title",)).lines()
    assert lines[-1].plain == "a b [31mc"


def test_a_table_that_cannot_fit_overflows_rather_than_cut() -> None:
    lines = Table(("", "figure"), [("x", "1234567890123456")]).lines(10)
    assert "1234567890123456" in lines[-1].plain


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "-"), (0, "0"), (0.0, "0.0000"), (1682, "1,682"), (float("nan"), "nan"), ("pplr", "pplr"), (True, "True")],
)
def test_figure(value: object, shown: str) -> None:
    assert figure(value) == shown


@given(st.integers(0, 10**17))
def test_human_bytes_is_right_to_three_digits_and_never_shows_1000(count: int) -> None:
    number, unit = human_bytes(count).split(" ")
    scale = 1000 ** ("B", "kB", "MB", "GB", "TB", "PB").index(unit)
    assert float(number) * scale == pytest.approx(count, rel=0.051, abs=0.5)
    assert len(number.split(".")[0]) <= 3


def test_human_count_and_seconds() -> None:
    assert (human_count(None), human_count(3.4e12), human_count(12)) == ("-", "3.4T", "12")
    assert human_seconds(float("inf")) == "-"
    assert [human_seconds(s) for s in (0, 59.94, 59.96, 3599.6)] == ["0.0 s", "59.9 s", "1 min 00 s", "1 h 00 min"]
