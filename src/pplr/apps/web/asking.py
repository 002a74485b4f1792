"""The view that recommends: controls, and under them what a request's answer is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from nicegui import run, ui
from nicegui.elements.mixins.text_element import TextElement

from pplr.apps.web import results
from pplr.apps.web.combobox import Combobox
from pplr.apps.web.desk import Desk
from pplr.apps.web.rendering import render_parts
from pplr.errors import PplrError

if TYPE_CHECKING:
    from pplr.runtimes.explaining import Answer
    from pplr.runtimes.recommending import Request

__all__ = ["Asking"]

T = TypeVar("T")
_INTRODUCTION = (
    "Ask one client's model for ten titles. Beside them stand its titles before federation, and what is popular; "
    "below, what crossed the cut between client and server for this very request, and what a server reads out of that."
)
_USER, _TYPED = "a user of the client", "a history that I type"


class Asking:
    """One visitor's controls and answer. Nothing of it is shared with another visitor.

    Args:
        desk: Answers; loaded.
        audited: Says, as HTML, what the run's audit found, or how to measure it.
    """

    def __init__(self, desk: Desk, audited: Callable[[], str]) -> None:
        self._desk, self._audited = desk, audited
        self._typed: list[str] = []
        self._turn = 0
        TextElement(tag="p", text=_INTRODUCTION)
        with ui.element("section").classes("controls").props('aria-label="For whom"'):
            clients = dict(desk.clients)
            self._client = ui.select(clients, label="Client", value=next(iter(clients)), on_change=self._new_client)
            self._client.props("outlined dense options-dense behavior=menu").classes("client")
            with ui.element("fieldset"):
                TextElement(tag="legend", text="Recommend to")
                self._how = ui.radio([_USER, _TYPED], value=_USER, on_change=self._new_way).props("inline")
            with ui.element("div") as self._of_user:
                self._user = Combobox("User", "The data's id; Enter recommends.", self._complete_user, self._ask_by)
            with ui.element("div") as self._by_title:
                self._title = Combobox(
                    "Add a title",
                    "Oldest first; Enter adds it, or recommends where nothing is typed. Several with ; between them.",
                    desk.complete_title,
                    self._add,
                )
                self._chosen = ui.element("ol").classes("chosen").props('aria-label="The history so far"')
            self._problem = TextElement(tag="p", text="").classes("problem").props("role=alert")
            self._button = ui.button("Recommend", on_click=self._ask).props("unelevated no-caps color=dark")
        self._said = TextElement(tag="p", text="").classes("said-now").props("role=status")
        self._answer = ui.element("div").classes("answer")
        self._new_client()
        self._new_way()

    # -- controls ---------------------------------------------------------------------------------------------

    def _complete_user(self, typed: str) -> list[str]:
        return self._desk.complete_user(str(self._client.value), typed)

    def _new_client(self) -> None:
        self._user.value = next(iter(self._desk.complete_user(str(self._client.value), "")), "")

    def _new_way(self) -> None:
        self._of_user.set_visibility(self._how.value == _USER)
        self._by_title.set_visibility(self._how.value == _TYPED)
        self._complain("")

    async def _ask_by(self, user: str) -> None:
        await self._ask()

    async def _add(self, typed: str) -> None:
        if not typed.strip():
            await self._ask()
            return
        try:
            self._typed += self._desk.titles_of(typed)
        except PplrError as error:
            self._complain(str(error))
            return
        self._title.value = ""
        self._complain("")
        self._draw_chosen()

    def _remove(self, place: int) -> None:
        del self._typed[place]
        self._draw_chosen()
        self._title.field.run_method("focus")

    def _draw_chosen(self) -> None:
        self._chosen.clear()
        with self._chosen:
            for place, title in enumerate(self._typed):
                with ui.element("li"):
                    TextElement(tag="span", text=title)
                    button = ui.button("Remove", on_click=lambda _, place=place: self._remove(place))
                    button.props("flat dense no-caps color=dark")
                    button.props["aria-label"] = f"Remove {title}"

    def _complain(self, text: str) -> None:
        self._problem.set_text(text)
        self._problem.set_visibility(bool(text))

    # -- the answer -------------------------------------------------------------------------------------------

    async def _ask(self) -> None:
        """Ask, and show each part as soon as it is known; a newer request of this visitor puts an end to it."""
        self._turn += 1
        turn, client = self._turn, str(self._client.value)
        user = self._user.value.strip() if self._how.value == _USER else None
        typed = list(self._typed) if self._how.value == _TYPED else None
        self._complain("")
        self._said.set_text("Asking the model …")
        self._button.disable()
        try:
            request, answer = _known(await run.io_bound(self._desk.ask, client, user, typed))
            if self._is_over(turn):
                return
            parts = self._blocks()
            desk, after = self._desk, results.after_words(self._desk.method, client)
            parts[0].set_content(results.lists(answer, None, after=after, nearness=desk.nearness))
            parts[1].set_content(results.history(request, desk.titles(request)))
            parts[2].set_content(results.crossing(answer.exchanges, is_remote=desk.is_remote))
            whom = f"user {user}" if user is not None else "the typed history"
            self._said.set_text(f"{len(answer.items)} titles for {whom}, in {answer.seconds:.2f} s.")
            beside = _known(await run.io_bound(desk.beside, request))
            if self._is_over(turn):
                return
            parts[0].set_content(results.lists(answer, beside, after=after, nearness=desk.nearness))
            attacked = _known(await run.io_bound(self._attack, request, answer))
            if not self._is_over(turn):
                parts[3].set_content(attacked)
        except PplrError as error:
            self._give_up(turn, str(error))
        except Exception:
            self._give_up(turn, "This could not be answered. The terminal of `pplr web` says why.")
            raise
        if not self._is_over(turn):
            self._button.enable()

    def _is_over(self, turn: int) -> bool:
        """Whether nobody waits for this request any more: a newer one was made, or the tab is closed."""
        return turn != self._turn or self._answer.is_deleted

    def _give_up(self, turn: int, why: str) -> None:
        if not self._is_over(turn):
            self._said.set_text("")
            self._complain(why)
            self._button.enable()

    def _attack(self, request: Request, answer: Answer) -> str:
        return results.read_back(self._desk.read_back(request, answer)) + self._audited()

    def _blocks(self) -> list[ui.html]:
        """Make the empty blocks of an answer under their headings."""
        self._answer.clear()
        waiting = render_parts([], "waiting")
        with self._answer:
            made = []
            TextElement(tag="h2", text="Ten recommendations, three ways")
            made += [ui.html(waiting, sanitize=False), ui.html(waiting, sanitize=False)]
            TextElement(tag="h2", text="What crossed the cut for this request")
            made.append(ui.html(waiting, sanitize=False))
            TextElement(tag="h2", text="What the server can read out of it")
            made.append(ui.html("<p>Attacking these very states …</p>", sanitize=False))
        return made


def _known(found: T | None) -> T:
    """Return what a thread found; it finds nothing when the server is about to stop."""
    if found is None:
        raise PplrError("the server is stopping", cure="Start it again.")
    return found
