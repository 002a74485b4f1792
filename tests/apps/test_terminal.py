from __future__ import annotations

import io
from contextlib import suppress
from typing import Any

import pytest

from pplr.apps.terminal import Screen, TerminalProgress, round_table, similarity_line

MARKUP = "[bold]x[/bold] :smile: [/oops] (1999)"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def plain() -> tuple[io.StringIO, Clock, TerminalProgress]:
    file, clock = io.StringIO(), Clock()
    return file, clock, TerminalProgress(Screen(file), rounds=5, clock=clock)


def test_a_log_gets_a_line_at_the_end_of_a_task_and_one_every_15_s() -> None:
    file, clock, progress = plain()
    with progress.task("training client 2", 64, "samples") as advance:
        for _ in range(8):
            clock.now += 4
            advance(8)
    assert file.getvalue().splitlines() == [
        "training client 2: 32/64 samples, 2.0 samples/s, 16.0 s left",
        "training client 2: 64/64 samples, 2.0 samples/s",
    ]


def test_a_task_that_fails_is_not_told_as_done() -> None:
    file, clock, progress = plain()
    with suppress(KeyboardInterrupt), progress.task("training", 64, "samples") as advance:
        clock.now += 1
        advance(8)
        raise KeyboardInterrupt
    assert file.getvalue() == "training: stopped at 8/64 samples, 8.0 samples/s\n"


def test_a_task_that_takes_no_time_has_no_rate_and_one_that_does_nothing_no_line() -> None:
    file, clock, progress = plain()
    with progress.task("nothing", 9, "titles"):
        clock.now += 1
    with progress.task("fast", 3, "titles") as advance:
        advance(3)
    assert file.getvalue().splitlines() == ["fast: 3/3 titles, - titles/s"]


@pytest.mark.parametrize("interactive", [False, True])
def test_markup_is_printed_as_it_is(interactive: bool) -> None:
    file = io.StringIO()
    progress = TerminalProgress(Screen(file, interactive=interactive, width=100))
    progress.note(MARKUP)
    with progress.task(MARKUP, 2, "samples") as advance:
        advance(2)
    assert file.getvalue().count(MARKUP) >= 2


def test_a_terminal_shows_bars_that_go_and_may_be_nested() -> None:
    file = io.StringIO()
    progress = TerminalProgress(Screen(file, interactive=True, width=100))
    with progress.task("outer", 2, "users") as outer:
        with progress.task("inner", 4, "titles") as inner:
            inner(4)
        outer(2)
        progress.note("between")
    with pytest.raises(ValueError, match="boom"), progress.task("again", 2, "users"):
        raise ValueError("boom")
    with progress.task("after", 2, "users") as after:
        after(1)
    shown = file.getvalue()
    assert "inner" in shown
    assert "0/4 titles" in shown
    assert "between\n" in shown
    assert "after" in shown
    assert shown.count("\x1b[?25h") == shown.count("\x1b[?25l") == 3  # the cursor comes back each time


def test_a_dumb_terminal_and_forced_colour_in_a_pipe_get_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert not Screen(io.StringIO(), interactive=True).interactive
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    file = io.StringIO()
    screen = Screen(file)
    screen.line("bold", style="bold")
    assert not screen.interactive
    assert file.getvalue() == "bold\n"


def test_the_width_of_a_log_is_open_unless_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    file = io.StringIO()
    assert Screen(file).width is None
    Screen(file).line("x" * 300)
    assert file.getvalue() == "x" * 300 + "\n"
    monkeypatch.setenv("COLUMNS", "80")
    assert Screen(file).width == 80
    monkeypatch.setenv("COLUMNS", "wide")
    assert Screen(file).width is None


def test_a_round_is_a_table_with_dashes_for_what_is_not_there(round_record: dict[str, Any]) -> None:
    file, _, progress = plain()
    progress.server_round(round_record)
    lines = file.getvalue().splitlines()
    assert lines[1] == "server round 1 of 5"
    assert lines[4].split() == ["0", "120", "2.1000", "0.4000", "0.8000", "0.0500", "-", "12.0"]
    assert lines[5].split() == ["1", "64", "-", "-", "-", "-", "3.2500", "-"]
    assert lines[6] == "similarity between clients: 0.700000 to 0.800000, spread 0.1"


def test_a_round_without_clients_or_similarity_is_still_told() -> None:
    file, _, progress = plain()
    progress.server_round({"server_round": 2, "similarity": None, "clients": {}})
    assert "similarity between clients: -" in file.getvalue()
    assert round_table({}).rows == []


def test_the_spread_of_similarity_leaves_out_the_diagonal_and_what_is_unknown() -> None:
    assert similarity_line([[9.0, 0.25], [None, 9.0]]) == "similarity between clients: 0.250000 to 0.250000, spread 0"
    assert similarity_line([[1.0]]) == "similarity between clients: -"
