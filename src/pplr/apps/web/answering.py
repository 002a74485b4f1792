"""One visitor's answer: blocks that fill one after the other, each saying how it stands until it is there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from nicegui import run, ui
from nicegui.elements.mixins.text_element import TextElement

from pplr.apps.web import results
from pplr.apps.web.desk import Desk
from pplr.apps.web.steps import Step
from pplr.errors import PplrError

if TYPE_CHECKING:
    from pplr.runtimes.explaining import Answer
    from pplr.runtimes.recommending import Request

__all__ = ["Answering"]

T = TypeVar("T")
_EVERY_S = 1.0
_LONG = (
    "An attack on text tries the tokens of the catalog's titles. It takes about as long as an answer does, and longer "
    "the first time, when the attacker learns what this client's states look like."
)


@dataclass(frozen=True)
class _Blocks:
    """The blocks of one answer, and where an attack is offered that takes long."""

    after: Step
    before: Step
    popular: Step
    crossing: Step
    offer: ui.element
    attack: Step


class _SupersededError(Exception):
    """Nobody waits for this request any more."""


class Answering:
    """Fills the blocks of an answer; a newer request puts an end to an older one.

    Args:
        desk: Answers; loaded.
        audited: Says, as HTML, what the run's audit found, or how to measure it.
        complain: Told why there is no answer; of nothing when a request begins.
    """

    def __init__(self, desk: Desk, audited: Callable[[], str], complain: Callable[[str], None]) -> None:
        self._desk, self._audited, self._complain = desk, audited, complain
        self._turn = 0
        self._one = asyncio.Lock()  # a visitor has the model work on one thing at a time
        self._steps: list[Step] = []
        self._said = TextElement(tag="p", text="").classes("said-now").props("role=status")
        self._view = ui.element("div").classes("answer")
        ui.timer(_EVERY_S, self._tick)

    async def ask(self, client: str, *, user: str | None = None, typed: Sequence[str] | None = None) -> None:
        """Ask for a user or for a typed history, and show each part as soon as it is known."""
        self._turn += 1
        turn = self._turn
        self._complain("")
        self._said.set_text("Asking the model …")
        with self._telling(turn):
            request = _known(await run.io_bound(self._desk.request, client, user, typed))
            self._check(turn)
            await self._answer(turn, request, f"user {user}" if user is not None else "the typed history")

    async def _answer(self, turn: int, request: Request, whom: str) -> None:
        desk, blocks = self._desk, self._blocks(request)
        answer = await self._work(turn, blocks.after, desk.after, request)
        own = results.after_words(desk.method, request.client)
        blocks.after.show(results.after_list(answer, after=own, nearness=desk.nearness))
        blocks.crossing.show(results.crossing(answer.exchanges, is_remote=desk.is_remote))
        titles = f"{len(answer.items)} titles for {whom}, in {answer.seconds:.2f} s"
        self._said.set_text(f"{titles}; what stands beside them follows.")
        if is_offered := desk.attacks_long and answer.states is not None:
            self._offer(turn, blocks, request, answer)
        popular = await self._work(turn, blocks.popular, desk.popular, request)
        blocks.popular.show(results.popular_list(popular, answer))
        what, untrained = await self._work(turn, blocks.before, desk.before, request)
        blocks.before.show(results.before_list(what, untrained, answer))
        if not is_offered:
            blocks.attack.show(await self._work(turn, blocks.attack, self._attack, request, answer))
        self._said.set_text(f"{titles}, and what stands beside them.")

    def _offer(self, turn: int, blocks: _Blocks, request: Request, answer: Answer) -> None:
        """Offer an attack that takes long; the button stays, so that whoever is on it stays there."""
        pressed: list[bool] = []

        async def attack() -> None:
            if pressed:
                return
            pressed.append(True)
            button.props("aria-disabled=true")
            blocks.attack.block.set_visibility(True)
            with self._telling(turn):
                blocks.attack.show(await self._work(turn, blocks.attack, self._attack, request, answer))
                self._said.set_text("What the server can read is there.")

        blocks.attack.block.set_visibility(False)
        with blocks.offer:
            TextElement(tag="p", text=_LONG).classes("note")
            button = ui.button("Attack this request", on_click=attack).props("outline no-caps color=dark")

    def _attack(self, request: Request, answer: Answer) -> str:
        return results.read_back(self._desk.read_back(request, answer)) + self._audited()

    # -- blocks, and the work for them ------------------------------------------------------------------------

    def _blocks(self, request: Request) -> _Blocks:
        """Lay out the blocks of an answer under their headings, none of them known but the history."""
        self._view.clear()
        self._steps.clear()
        with self._view:
            TextElement(tag="h2", text="Ten recommendations, three ways")
            with ui.element("div").classes("lists"):
                after = self._step("Finding ten titles")
                before = self._step("Finding those before federation")
                popular = self._step("Counting what is popular")
            ui.html(results.history(request, self._desk.titles(request)), sanitize=False)
            TextElement(tag="h2", text="What crossed the cut for this request")
            crossing = self._step("Noting what crosses")
            TextElement(tag="h2", text="What the server can read out of it")
            offer, attack = ui.element("div"), self._step("Attacking these very states")
        return _Blocks(after, before, popular, crossing, offer, attack)

    def _tick(self) -> None:
        for step in self._steps:
            step.tick()

    def _step(self, work: str) -> Step:
        self._steps.append(Step(work))
        return self._steps[-1]

    async def _work(self, turn: int, step: Step, call: Callable[..., T], *given: object) -> T:
        """Have a thread find out what a step shows, unless nobody waits for it by then."""
        async with self._one:
            self._check(turn)
            step.begin()
            found = await run.io_bound(call, *given)
        self._check(turn)
        return _known(found)

    def _check(self, turn: int) -> None:
        """Give up a request that nobody waits for any more: a newer one was made, or the tab is closed."""
        if turn != self._turn or self._view.is_deleted:
            raise _SupersededError

    @contextmanager
    def _telling(self, turn: int) -> Iterator[None]:
        """Tell whoever waits why there is no answer."""
        try:
            yield
        except _SupersededError:
            return
        except PplrError as error:
            self._give_up(turn, str(error))
        except Exception:
            self._give_up(turn, "This could not be answered. The terminal of `pplr web` says why.")
            raise

    def _give_up(self, turn: int, why: str) -> None:
        if turn == self._turn and not self._view.is_deleted:
            self._said.set_text("")
            self._complain(why)
            for step in self._steps:
                step.give_up()


def _known(found: T | None) -> T:
    """Return what a thread found; it finds nothing when the server is about to stop."""
    if found is None:
        raise PplrError("the server is stopping", cure="Start it again.")
    return found
