"""The page in a browser: what a person does with it, by mouse, by keyboard, on a phone."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from pplr.runtimes.in_process import train
from tests.apps.web.conftest import MARKUP, serving

pytestmark = pytest.mark.slow


def ask(page) -> list[str]:
    """Press the button, wait for the whole answer, and read the ten titles."""
    page.get_by_role("button", name="Recommend").click()
    page.get_by_role("table", name="What the attack read").wait_for()
    return page.locator(".list.main .title").all_inner_texts()


@pytest.mark.parametrize("width", [1280, 390])
def test_a_user_gets_ten_titles_and_sees_what_crossed(marked, page_of, visit, keep, width) -> None:
    own = visit(page_of, width=width)
    page = own.page
    page.get_by_role("button", name="Recommend").wait_for()
    keep(own, f"controls-{width}")
    page.get_by_role("combobox", name="User").fill("u4")
    page.get_by_role("combobox", name="Client").click()
    page.get_by_role("option", name=re.compile("^1: ")).click()
    page.get_by_role("combobox", name="User").fill("u4")
    titles = ask(page)
    found = marked.recommend("1", user="u4", count=10)
    assert titles == [item.title for item in found]
    assert page.locator(".list").count() == 3
    assert page.locator(".list").nth(1).locator("li").count() == 10
    assert "every client starts from" in page.locator(".list").nth(1).inner_text()
    scores = page.locator(".list.main .score data").evaluate_all("all => all.map(own => own.value)")
    assert [float(value) for value in scores] == [item.score for item in found]
    assert page.locator(".list.main .why data").count() == 20  # two near items for each
    crossed = page.get_by_role("table", name=re.compile("Messages in order"))
    assert "client to server" in crossed.inner_text()
    assert "1 × 4 × 16" in crossed.inner_text()
    assert re.search(r"reads \d+% of this history's titles", page.locator(".verdict").inner_text())
    assert "pplr audit" in page.locator(".answer").inner_text()
    assert not own.is_too_wide
    keep(own, f"recommendations-{width}")


def test_a_typed_history_with_markup_is_shown_as_text(marked, page_of, visit, keep) -> None:
    own = visit(page_of)
    page = own.page
    page.get_by_text("a history that I type").click()
    field = page.get_by_role("combobox", name="Add a title")
    evil = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    field.fill(evil)
    field.press("Enter")
    page.get_by_role("alert").filter(has_text=evil).wait_for()
    assert page.locator("main img").count() == 0
    field.fill("elm")
    page.get_by_role("option", name=MARKUP).wait_for()  # a title of the catalog
    keep(own, "suggestions-1280")
    page.get_by_role("option", name=MARKUP).click()
    field.fill("oak; YEW")
    field.press("Enter")
    page.locator(".chosen li").nth(2).wait_for()
    assert page.locator(".chosen li > span").all_inner_texts() == [MARKUP, "Oak", "Yew"]
    page.get_by_role("button", name="Remove Yew").click()
    page.locator(".chosen li").nth(2).wait_for(state="detached")
    titles = ask(page)
    assert titles == [item.title for item in marked.recommend("0", history=[MARKUP, "Oak"], count=10)]
    told = page.get_by_role("table", name="What the attack read").inner_text()
    assert MARKUP in told
    assert MARKUP in page.locator(".answer").inner_text()
    assert page.locator("main img").count() == 0
    assert page.locator("h1").inner_text() == f"Run {marked.folder.name}"
    assert page.title() == f"{marked.folder.name}: recommendations"
    keep(own, "markup-1280")


def test_the_keyboard_is_enough(marked, page_of, visit) -> None:
    page = visit(page_of).page
    page.get_by_role("button", name="Recommend").wait_for()
    for _ in range(20):  # the way is: views, client, whom, user, button
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.ariaLabel") == "a history that I type":
            break
    page.keyboard.press("Space")
    page.get_by_role("combobox", name="Add a title").wait_for()
    page.keyboard.press("Tab")
    page.keyboard.type("ceda")
    page.get_by_role("option", name="Cedar").wait_for()
    page.keyboard.press("ArrowDown")
    page.locator("[role=option][aria-selected=true]").wait_for()
    page.keyboard.press("Enter")
    page.locator(".chosen li").first.wait_for()
    page.keyboard.type("pine")
    page.keyboard.press("Enter")  # what is typed, without a suggestion
    page.locator(".chosen li").nth(1).wait_for()
    page.keyboard.press("Enter")  # nothing is typed: ask
    page.get_by_role("table", name="What the attack read").wait_for()
    titles = page.locator(".list.main .title").all_inner_texts()
    assert titles == [item.title for item in marked.recommend("0", history=["Cedar", "Pine"], count=10)]
    assert page.evaluate("document.activeElement.getAttribute('role')") == "combobox"


def test_headings_labels_and_language_are_there(page_of, visit) -> None:
    page = visit(page_of).page
    ask(page)
    levels = page.locator("h1, h2, h3").evaluate_all("all => all.map(own => Number(own.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert page.locator("html").get_attribute("lang") == "en-US"
    unnamed = page.locator("input:visible, button:visible").evaluate_all(
        "all => all.filter(own => !(own.labels?.length || own.ariaLabel || own.innerText || own.title))"
        ".map(own => own.outerHTML)"
    )
    assert unnamed == []
    assert page.get_by_role("navigation", name="Views").get_by_role("link").all_inner_texts() == [
        "Recommendations",
        "Training",
    ]


def test_two_visitors_do_not_mix(marked, page_of, visit) -> None:
    one, other = (visit(page_of).page for _ in range(2))
    for page, user in ((one, "u3"), (other, "u6")):
        page.get_by_role("combobox", name="User").fill(user)
        page.get_by_role("button", name="Recommend").click()  # both at once
    for page, user in ((one, "u3"), (other, "u6")):
        page.get_by_role("table", name="What the attack read").wait_for()
        assert user in page.locator(".said-now").inner_text()
        titles = page.locator(".list.main .title").all_inner_texts()
        assert titles == [item.title for item in marked.recommend("0", user=user, count=10)]
    one.get_by_role("combobox", name="User").fill("u4")
    one.get_by_role("button", name="Recommend").click()
    one.get_by_role("alert").filter(has_text="not of client 0").wait_for()
    assert other.get_by_role("alert").count() == 0


def test_it_follows_a_training_to_its_end_and_then_recommends(
    tmp_path: Path, marked, marked_config, visit, keep
) -> None:
    folder = tmp_path / "under way"
    folder.mkdir()
    for name in ("config.yaml", "provenance.json"):
        shutil.copy(marked.folder / name, folder / name)
    lines = (marked.folder / "rounds.jsonl").read_text().splitlines()
    with serving(folder) as address:
        waiting = visit(address)
        waiting.page.get_by_text("Recommendations wait for its end").wait_for()
        own = visit(address, "/training")
        page = own.page
        page.get_by_text("No server round is finished yet").wait_for()
        (folder / "rounds.jsonl").write_text(lines[0] + "\n")
        page.get_by_text("1 of at most 2 server rounds are done").wait_for()
        page.get_by_role("img", name=re.compile("Lines of training loss")).wait_for()
        page.get_by_role("img", name=re.compile("Similarity of the clients' adapters in server round 1")).wait_for()
        keep(own, "training-1280")
        (folder / "rounds.jsonl").write_text("\n".join(lines) + "\n")
        page.get_by_text("2 of at most 2 server rounds are done").wait_for()
        shutil.rmtree(folder)
        train(marked_config, folder)  # really
        page.get_by_text("This run is finished").wait_for()
        last = json.loads(lines[-1])["clients"]["0"]["loss"]
        assert f"{last:.4f}" in page.get_by_role("table", name=re.compile("Server round 2")).inner_text()
        waiting.page.get_by_role("button", name="Recommend").wait_for()
        phone = visit(address, "/training", width=390)
        phone.page.get_by_role("img", name=re.compile("Lines of training loss")).wait_for()
        assert not phone.is_too_wide
        keep(phone, "training-390")


def test_other_sites_are_refused(page_of) -> None:
    for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}):
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(urllib.request.Request(page_of, headers=headers))
    with urllib.request.urlopen(page_of) as answer:
        assert "default-src 'self'" in answer.headers["content-security-policy"]
