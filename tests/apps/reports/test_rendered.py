"""Pages in a browser, on a desk and on a phone: nothing is too wide, every picture is drawn, nothing is asked for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pplr.apps.reports.pages import write_comparison, write_report
from pplr.runtimes.run import Run
from tests.apps.conftest import Visit

pytestmark = pytest.mark.slow

DESK, PHONE = 1280, 390
NAME = "a_run_of_a_name_that_no_line_of_a_phone_is_wide_enough_to_hold <b>"


@pytest.fixture(scope="module")
def folders(finished: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two finished runs; the first has a long name and more rounds than are drawn."""
    place = tmp_path_factory.mktemp("rendered")
    first = Path(shutil.copytree(finished("evaluation.before=true").folder, place / NAME))
    other = Path(shutil.copytree(first, place / "other"))
    lines = [json.loads(line) for line in (first / "rounds.jsonl").read_text().splitlines()]
    more = [lines[number % len(lines)] | {"server_round": number + 1} for number in range(20)]
    (first / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in more))
    return first, other


def broken_pictures(own: Visit) -> list[str]:
    """Name the pictures that were not drawn."""
    found = own.page.locator("img").evaluate_all("all => all.filter(own => !own.naturalWidth).map(own => own.alt)")
    return [str(alt) for alt in found]


def look(own: Visit, keep: Callable[[Visit, str], Path], name: str) -> None:
    """Look at a whole page, with what is folded away too."""
    assert own.page.locator("img").count() > 0
    assert broken_pictures(own) == []
    assert not own.is_too_wide
    keep(own, name)
    for folded in own.page.locator("summary").all():
        folded.click()
    assert not own.is_too_wide
    clipped = "all => all.filter(own => own.scrollWidth > own.clientWidth + 1).map(own => own.outerHTML.slice(0, 80))"
    covered = "all => all.map(own => own.querySelector('th').clientWidth / own.clientWidth)"  # the column that stays
    assert max(own.page.locator(".scroll").evaluate_all(covered)) < 0.65
    assert own.page.locator("p, h1, h2, dd, figcaption, nav li").evaluate_all(clipped) == []


@pytest.mark.parametrize("width", [DESK, PHONE])
def test_a_report_is_whole_on_a_desk_and_on_a_phone(
    folders: tuple[Path, Path], visit: Callable[..., Visit], keep: Any, audit: dict[str, Any], width: int
) -> None:
    (folders[0] / "audit.json").write_text(json.dumps(audit))
    out = write_report(folders[0], samples=50)
    own = visit(out.as_uri(), "", width)
    assert own.page.title() == f"Run report: {NAME}"
    look(own, keep, f"report-{width}")


@pytest.mark.parametrize("width", [DESK, PHONE])
def test_a_comparison_is_whole_on_a_desk_and_on_a_phone(
    folders: tuple[Path, Path],
    tmp_path: Path,
    visit: Callable[..., Visit],
    keep: Any,
    audit: dict[str, Any],
    width: int,
) -> None:
    (folders[0] / "audit.json").write_text(json.dumps(audit))
    out = write_comparison(folders, [], tmp_path / "compared.html", samples=50)
    look(visit(out.as_uri(), "", width), keep, f"comparison-{width}")


def test_what_these_tests_look_for_would_be_found(tmp_path: Path, browser: Any) -> None:
    bad = tmp_path / "bad.html"
    picture = '<img src="https://example.invalid/a.png" alt="gone">'
    bad.write_text(f'<!doctype html><html lang="en"><body><div style="width: 500px">x</div>{picture}</body></html>')
    own = Visit(browser, bad.as_uri(), PHONE)
    own.page.goto(bad.as_uri())
    assert own.is_too_wide
    assert broken_pictures(own) == ["gone"]
    assert "asks https://example.invalid/a.png" in own.wrong
    own.context.close()
