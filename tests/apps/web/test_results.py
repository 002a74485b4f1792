"""Blocks of an answer: whatever a title holds is text, and every figure is the one that was measured."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from pplr.apps.web import results
from pplr.data.prompts import Case
from pplr.privacy.recording import Exchange, Message
from pplr.runtimes.explaining import Answer, Near, ReadBack
from pplr.runtimes.recommending import Recommendation, Request

BAD = "<script>alert('x')</script><img src=x onerror=alert(1)>\"' & [b]"
ALLOWED = {
    "div", "section", "h3", "ol", "li", "span", "data", "p", "table", "caption", "thead", "tbody", "tr", "th", "td",
    "details", "summary", "pre", "code",
}  # fmt: skip


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


def read(html: str) -> _Reader:
    reader = _Reader()
    reader.feed(html)
    assert reader.tags <= ALLOWED
    assert not {name for name in reader.attributes if name.startswith("on")}
    return reader


def exchange(call: str = "forward", rows: int = 1, tokens: int = 3, up: int = 96, took: float = 1.5) -> Exchange:
    sent = Message((rows, tokens, 8), "float32", rows * tokens, up)
    return Exchange(call, sent, Message((rows, tokens, 8), "float32", rows * tokens, up + 1), took)  # type: ignore[arg-type]


@pytest.fixture
def answer() -> Answer:
    items = tuple(Recommendation(rank, f"t{rank}", f"{BAD} {rank}", 1 / rank) for rank in (1, 2))
    near = ((Near(BAD, 0.8765), Near("Elm", 0.5)), (Near("Elm", 0.25),))
    return Answer(items, near, (exchange(),), 0.1, None)


def test_titles_with_markup_are_text_in_every_block(answer: Answer) -> None:
    popular = (Recommendation(1, "t2", BAD, 12.0),)
    told = read(results.after_list(answer, after=BAD, nearness="cosine"))
    assert told.text.count(BAD) == 4
    assert "0.88" in told.text
    assert read(results.before_list(BAD, answer, answer)).text.count(BAD) == 3
    assert read(results.popular_list(popular, answer)).text.count(BAD) == 1
    request = Request("0", Case(-1, (0, 1), (), (0, 1)), 2)
    assert f"1. {BAD}" in read(results.history(request, [BAD, "Elm"])).text
    rows = ((BAD, BAD), ("Elm", None))
    for by_place, times in ((True, 2), (False, 1)):
        back = ReadBack("catalog_matching", "own", rows, by_place, (BAD,), 0.5, 0.25, 0.1, hurried=False)
        assert read(results.read_back(back)).text.count(BAD) == times
    assert BAD in read(results.read_back(BAD)).text


def test_lists_say_which_items_are_in_both(answer: Answer) -> None:
    popular = (Recommendation(1, "t2", "B", 12.0), Recommendation(2, "t9", "C", 7.5))
    text = read(results.popular_list(popular, answer)).text
    assert re.search(r"B\s*score 12\s*after federation too", text)
    assert re.search(r"C\s*score 7.500(?!\s*after)", text)
    assert read(results.before_list("start", answer, answer)).text.count("after federation too") == 2
    assert "after federation too" not in results.after_list(answer, after="x", nearness="y")


def test_a_history_says_how_much_of_it_is_read() -> None:
    case = Case(-1, (0, 1), (), (0, 1))
    assert "the newest 2 of 127 titles" in results.history(Request("0", case, 127), ["A", "B"])
    assert "all 2 titles" in results.history(Request("0", case, 2), ["A", "B"])


def test_messages_add_up_and_those_of_one_form_share_rows() -> None:
    many = [exchange("decode", 1, 40, 1280, 4.0), *(exchange("decode", 1, 4, 128, 0.5) for _ in range(3)), exchange()]
    html = results.crossing(many, is_remote=False)
    told = read(html)
    assert f'value="{1280 + 3 * 128 + 96}"' in html
    assert f'value="{1281 + 3 * 129 + 97}"' in html
    assert "5 exchanges" in told.text
    rows = re.findall(r'<th scope="row">(.*?)</th>', html)
    assert rows == ["1, decode", "1, decode", "2 to 4, decode", "2 to 4, decode", "5, forward", "5, forward"]
    assert "384" in told.text
    assert "1 × 4 × 8" in told.text
    assert "nothing travels" in told.text
    assert "over the network" in results.crossing(many, is_remote=True)
    assert "not cut" in results.crossing([], is_remote=False)


def test_what_was_read_is_beside_what_is_true_with_its_share() -> None:
    rows = tuple((f"T{place}", f"T{place}" if place else "X") for place in range(12))
    back = ReadBack("catalog_matching", "exchanged", rows, True, ("X",), 11 / 12, 0.25, 2.0, hurried=True)
    html = results.read_back(back)
    told = read(html)
    assert f'value="{11 / 12!r}"' in html
    assert "92%" in told.text
    assert "25%" in told.text
    assert "11 of 12 titles are in their place; 1 that it named are not" in told.text
    assert "guessed the rest" in told.text
    assert "what the client sends of its adapter" in told.text
    assert "The other 2 titles" in told.text
    assert html.count("<tr>") == 12 + 2


def test_of_text_it_says_that_a_title_was_read_and_nothing_of_its_place() -> None:
    rows = (("Elm", "Elm"), ("Oak", None), ("Yew", "Yew"))
    back = ReadBack("catalog_matching", "own", rows, False, (), 2 / 3, 0.0, 1.0, hurried=False)
    told = read(results.read_back(back)).text
    assert "2 of 3 titles were read" in told
    assert "in their place" not in told
    assert "title read" not in told
    assert re.search(r"Elm\s*yes", told)
    assert re.search(r"Oak\s*no", told)
    assert told.count("Elm") == 1


@pytest.mark.parametrize(
    ("method", "words"),
    [("pplr", "federated by pplr"), ("local", "trained alone"), ("centralized", "all clients pooled")],
)
def test_the_words_say_what_the_adapter_is(method: str, words: str) -> None:
    assert words in results.after_words(method, "0")
