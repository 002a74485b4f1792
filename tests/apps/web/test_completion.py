from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pplr.apps.web.completion import Completion

TITLES = ["Heat (1995)", "Wheat", "Red Heat (1988)", "heat", "Toy Story (1995)", "Heathers (1989)"]


def test_texts_that_begin_so_come_first_then_words_then_the_rest() -> None:
    assert Completion(TITLES).of("heat") == ["Heat (1995)", "heat", "Heathers (1989)", "Red Heat (1988)", "Wheat"]
    assert Completion(TITLES).of("  HEAT  (19 ") == ["Heat (1995)", "Red Heat (1988)"]
    assert Completion(TITLES).of("heat", most=2) == ["Heat (1995)", "heat"]
    assert Completion(TITLES).of("zzz") == []


def test_no_more_than_asked_for_however_many_there_are() -> None:
    many = Completion(f"Film {number}" for number in range(50_000))
    assert many.of("film 4999") == ["Film 4999", *(f"Film 4999{digit}" for digit in range(7))]


@given(st.lists(st.text("ab ", max_size=6), max_size=8), st.text("ab ", max_size=3))
def test_it_finds_what_a_loop_over_all_finds(texts: list[str], typed: str) -> None:
    def folded(text: str) -> str:
        return " ".join(text.casefold().split())

    wanted = {text for text in texts if folded(typed) in folded(text)}
    found = Completion(texts).of(typed, most=100)
    assert set(found) == wanted
    assert len(found) == len(wanted)
