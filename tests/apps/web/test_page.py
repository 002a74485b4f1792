"""The page in a browser: what a person does with it, by mouse, by keyboard, on a phone."""

from __future__ import annotations

import itertools
import json
import re
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from pplr.runtimes.in_process import train
from tests.apps.conftest import LIMIT_S
from tests.apps.web.conftest import MARKUP, serving, training

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
    user = page.get_by_role("combobox", name="User")
    for typed, client in (("nobody", "2"), ("u4", "1")):  # of no client; of the client that is chosen then
        user.fill(typed)
        page.get_by_role("combobox", name="Client").click()
        page.get_by_role("option", name=re.compile(f"^{client}: ")).click()
        if typed == "nobody":
            page.wait_for_function("field => field.value.startsWith('u')", arg=user.element_handle())
    titles = ask(page)
    assert user.input_value() == "u4"
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


def test_nothing_is_sent_that_overwrites_what_is_typed_as_the_page_arrives(page_of, visit) -> None:
    sent: list[str] = []
    own = visit(page_of)
    own.page.on("websocket", lambda socket: socket.on("framereceived", lambda told: sent.append(str(told))))
    own.page.reload()
    own.page.get_by_role("combobox", name="User").fill("u3")
    own.page.get_by_role("option", name="u3").wait_for()
    assert any("suggestions" in told for told in sent)
    assert not any("updateValue" in told for told in sent)
    assert own.page.get_by_role("combobox", name="User").input_value() == "u3"


def test_the_button_is_asked_by_the_keyboard_and_keeps_the_focus(marked, page_of, visit) -> None:
    from playwright.sync_api import expect

    page = visit(page_of).page
    page.get_by_role("combobox", name="User").fill("u3")
    page.get_by_role("option", name="u3").wait_for()
    page.keyboard.press("Escape")
    page.keyboard.press("Tab")
    focused = "document.activeElement.innerText"
    assert page.evaluate(focused) == "Recommend"
    told = [item.title for item in marked.recommend("0", user="u3", count=10)]
    for key in ("Enter", "Space"):
        page.keyboard.press(key)
        page.get_by_role("status").filter(has_text="and what stands beside them").wait_for()
        expect(page.locator(".list.main .title")).to_have_text(told, timeout=LIMIT_S * 1_000)
        assert page.evaluate(focused) == "Recommend"


def test_whatever_has_the_focus_shows_it(page_of, visit) -> None:
    page = visit(page_of).page
    page.get_by_role("button", name="Recommend").wait_for()
    page.wait_for_function("document.querySelectorAll('[role=combobox]').length >= 2")
    seen = {}
    for _ in range(20):
        page.keyboard.press("Tab")
        name, style, width = page.evaluate(
            """() => {
                const own = document.activeElement, frame = own.closest('.q-field')?.querySelector('.q-field__control');
                const {outlineStyle, outlineWidth} = getComputedStyle(frame ?? own);
                return [own.ariaLabel || own.labels?.[0]?.innerText || own.innerText, outlineStyle, outlineWidth];
            }"""
        )
        seen[name.split("\n")[0]] = (style, width)
        if name == "Recommend":
            break
    ways = {"Recommendations", "Training", "Client", "a user of the client", "User", "Recommend"}
    assert ways <= seen.keys()
    assert set(seen.values()) == {("solid", "3px")}


def test_frames_of_fields_stand_out_from_the_page(page_of, visit) -> None:
    page = visit(page_of).page
    page.get_by_role("combobox", name="User").wait_for()
    colours = page.locator(".q-field__control:visible").evaluate_all(
        "all => all.map(own => getComputedStyle(own, '::before').borderTopColor)"
    )
    assert len(colours) == 2
    for colour in colours:
        *parts, opacity = [*map(float, re.findall(r"[\d.]+", colour)), 1.0][:4]
        shown = [(255 + opacity * (part - 255)) / 255 for part in parts]  # on white
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in shown]
        light = sum(share * part for share, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
        assert 1.05 / (light + 0.05) >= 3, colour  # WCAG 2.2, 1.4.11


def test_how_many_suggestions_there_are_is_said(page_of, visit) -> None:
    page = visit(page_of).page
    page.get_by_text("a history that I type").click()
    field = page.get_by_role("combobox", name="Add a title")
    field.fill("elm")
    page.get_by_role("status").filter(has_text="1 suggestion;").wait_for()
    field.fill("zzz")
    nothing = page.get_by_role("status").filter(has_text="Nothing here matches")
    nothing.wait_for()
    assert nothing.bounding_box()["height"] > 10  # to be seen too
    field.fill("")
    nothing.wait_for(state="detached")
    assert page.get_by_role("listbox").count() == 0


HELD = """
import time
import warnings
from pathlib import Path
from pplr.runtimes.explaining import Explainer

warnings.simplefilter("ignore", FutureWarning)  # of torch, which is loaded earlier here than the page does

def hold(name):
    real = getattr(Explainer, name)
    def held(self, *given):
        with Path({folder!r}, name).open("a") as calls:
            calls.write("x")
        while not Path({folder!r}, "go-" + name).exists():
            time.sleep(0.01)
        return real(self, *given)
    setattr(Explainer, name, held)

for name in ("after", "before"):
    hold(name)
"""


def test_each_part_is_shown_as_soon_as_it_is_there_and_a_long_attack_on_request(
    small_config, model_folder, tmp_path, visit, keep
) -> None:
    run = train(small_config(f"backbone.model={model_folder}"), tmp_path / "run")  # writes titles
    with serving(run.folder, HELD.format(folder=str(tmp_path))) as address:
        own = visit(address)
        page = own.page
        user = page.get_by_role("combobox", name="User")
        user.fill("u3")
        user.press("Enter")
        page.get_by_role("progressbar", name="Finding ten titles").wait_for()
        page.get_by_text(re.compile(r"Finding ten titles … \d s")).wait_for()
        page.get_by_text("Finding those before federation waits for its turn").wait_for()
        page.get_by_text("The history that the model reads").wait_for()
        for name in ("u6", "u9"):  # newer requests: the one in between is never worked on
            user.fill(name)
            user.press("Enter")
        page.get_by_text("Finding ten titles waits for its turn").wait_for()
        (tmp_path / "go-after").touch()
        page.get_by_role("status").filter(has_text="titles for user u9, in").wait_for()
        assert (tmp_path / "after").read_text() == "xx"
        titles = page.locator(".list.main .title").all_inner_texts()
        assert titles == [item.title for item in run.recommend("0", user="u9", count=10)]
        page.get_by_role("table", name=re.compile("Messages in order")).wait_for()
        page.get_by_role("heading", name=re.compile("^Popularity")).wait_for()
        page.get_by_role("progressbar", name="Finding those before federation").wait_for()
        assert page.locator(".list").count() == 2
        keep(own, "in-parts-1280")
        page.get_by_role("button", name="Attack this request").focus()
        page.keyboard.press("Enter")
        page.get_by_text("Attacking these very states waits for its turn").wait_for()
        page.keyboard.press("Enter")  # once is enough
        (tmp_path / "go-before").touch()
        page.get_by_role("heading", name=re.compile("^Before federation")).wait_for()
        page.get_by_role("table", name="What the attack read").wait_for()
        assert re.search(r"\d of \d titles were read", page.locator(".answer").inner_text())
        assert "in their place" not in page.locator(".answer").inner_text()
        assert page.evaluate("document.activeElement.innerText") == "Attack this request"
        assert page.get_by_role("progressbar").count() == 0


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


def test_it_follows_a_training_to_its_end_and_then_recommends(tmp_path: Path, marked_config, visit, keep) -> None:
    """Trained here and now, held after each server round until the page has shown it."""
    folder = tmp_path / "under way"
    with training(marked_config, folder) as paced, serving(folder) as address:
        waiting = visit(address)
        waiting.page.get_by_text("Recommendations wait for its end").wait_for()
        own, phone = visit(address, "/training"), visit(address, "/training", width=390)
        page = own.page
        told = page.locator(".summary")
        told.get_by_text("This run is under way: 0 of at most 2 server rounds are done.").wait_for()
        page.get_by_text("No server round is finished yet").wait_for()
        paced.go_on()
        told.get_by_text("This run is under way: 1 of at most 2 server rounds are done.").wait_for()
        page.get_by_role("img", name=re.compile("Lines of training loss")).wait_for()
        page.get_by_role("img", name=re.compile("Similarity of the clients' adapters in server round 1")).wait_for()
        keep(own, "training-1280")
        page.get_by_role("region", name=re.compile("Server round 1")).focus()
        page.wait_for_function("document.activeElement.scrollIntoView(), scrollY > 0")  # once charts have their size
        here = page.evaluate("document.activeElement.dataset.mine = 'yes', scrollY")
        sideways = phone.page.get_by_role("region", name=re.compile("Server round 1"))
        assert sideways.evaluate("own => own.scrollLeft = 60") == sideways.evaluate("own => own.scrollLeft")
        paced.go_on()
        told.get_by_text("This run is under way: 2 of at most 2 server rounds are done.").wait_for()
        loss = json.loads((folder / "rounds.jsonl").read_text().splitlines()[-1])["clients"]["0"]["loss"]
        table = page.get_by_role("region", name=re.compile("Server round 2"))
        assert f"{loss:.4f}" in table.inner_text()
        assert table.get_attribute("data-mine") == "yes"
        assert page.evaluate("document.activeElement.dataset.mine") == "yes"
        assert page.evaluate("scrollY") == here
        sideways = phone.page.get_by_role("region", name=re.compile("Server round 2"))
        assert sideways.evaluate("own => own.scrollLeft") == 60
        assert waiting.page.get_by_role("button", name="Recommend").count() == 0
        paced.go_on()
        told.get_by_text("This run is finished: 2 of at most 2 server rounds are done, and its").wait_for()
        assert page.evaluate("document.activeElement.dataset.mine") == "yes"
        waiting.page.get_by_role("button", name="Recommend").wait_for()
        assert not phone.is_too_wide
        keep(phone, "training-390")


def test_other_sites_are_refused(page_of) -> None:
    for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}):
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(urllib.request.Request(page_of, headers=headers))
    with urllib.request.urlopen(page_of) as answer:
        assert "default-src 'self'" in answer.headers["content-security-policy"]
