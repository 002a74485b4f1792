"""Whose turn it is: one at a time, in rotation, whatever becomes of a call."""

from __future__ import annotations

import threading
import time

import pytest

from pplr.runtimes.turns import Turns


class Line:
    """Calls that wait in threads, and the order in which they were served."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.order: list[str] = []
        self.threads: list[threading.Thread] = []
        self.at_once = self.most = 0

    def join_in(self, call: str) -> None:
        """Have a call wait; its client is its first letter."""
        waiting = self.turns.waiting
        thread = threading.Thread(target=self._serve, args=(call,))
        thread.start()
        self.threads.append(thread)
        until = time.monotonic() + 5
        while self.turns.waiting == waiting:
            assert time.monotonic() < until
            time.sleep(0.001)

    def _serve(self, call: str) -> None:
        with self.turns.of(call[0]):
            self.at_once += 1
            self.most = max(self.most, self.at_once)
            self.order.append(call)
            time.sleep(0.001)
            self.at_once -= 1

    def served(self) -> list[str]:
        for thread in self.threads:
            thread.join(5)
        assert self.most == 1
        assert self.turns.waiting == 0
        return self.order


def test_calls_of_one_client_keep_their_order() -> None:
    line = Line(turns := Turns())
    with turns.of("x"):
        for call in ("a1", "a2", "a3"):
            line.join_in(call)
    assert line.served() == ["a1", "a2", "a3"]


def test_clients_take_turns() -> None:
    line = Line(turns := Turns())
    with turns.of("x"):
        for call in ("a1", "a2", "a3", "b1", "b2", "c1"):
            line.join_in(call)
    assert line.served() == ["a1", "b1", "c1", "a2", "b2", "a3"]


def test_who_has_the_turn_comes_after_who_waits() -> None:
    """A flood that began before another came does not go on before it."""
    line = Line(turns := Turns())
    with turns.of("a"):
        for call in ("a2", "a3", "b1"):
            line.join_in(call)
    assert line.served() == ["b1", "a2", "a3"]


def test_whose_last_turn_is_longest_ago_is_next() -> None:
    turns = Turns()
    for client in ("c", "b", "a"):
        with turns.of(client):
            pass
    line = Line(turns)
    with turns.of("x"):
        for call in ("a1", "a2", "b1", "c1", "d1"):
            line.join_in(call)
    assert line.served() == ["d1", "c1", "b1", "a1", "a2"]


@pytest.mark.parametrize("floods", [1, 3])
def test_however_many_calls_others_send_each_is_served_once_before(floods) -> None:
    line = Line(turns := Turns())
    with turns.of("a"):
        for client in "abc"[:floods]:
            for number in range(5):
                line.join_in(f"{client}{number}")
        line.join_in("z")
    assert line.served().index("z") <= floods


def test_an_error_passes_the_turn_on() -> None:
    line = Line(turns := Turns())

    def breaks() -> None:
        with turns.of("a"):
            line.join_in("b1")
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        breaks()
    assert line.served() == ["b1"]
    with turns.of("a"):
        assert turns.waiting == 0


def test_waiting_is_counted() -> None:
    line = Line(turns := Turns())
    assert turns.waiting == 0
    with turns.of("a"):
        line.join_in("b1")
        line.join_in("c1")
        assert turns.waiting == 2
    line.served()
    with turns.of("a"):  # and who comes alone does not wait
        assert turns.waiting == 0
