"""The view that recommends: controls, and under them an answer."""

from __future__ import annotations

from collections.abc import Callable

from nicegui import ui
from nicegui.elements.mixins.text_element import TextElement

from pplr.apps.web.answering import Answering
from pplr.apps.web.combobox import Combobox
from pplr.apps.web.desk import Desk
from pplr.errors import PplrError

__all__ = ["Asking"]

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
        self._desk = desk
        self._typed: list[str] = []
        TextElement(tag="p", text=_INTRODUCTION)
        with ui.element("section").classes("controls").props('aria-label="For whom"'):
            clients = dict(desk.clients)
            self._client = ui.select(clients, label="Client", value=next(iter(clients)), on_change=self._new_client)
            self._client.props("outlined dense options-dense behavior=menu").classes("client")
            with ui.element("fieldset"):
                TextElement(tag="legend", text="Recommend to")
                self._how = ui.radio([_USER, _TYPED], value=_USER, on_change=self._new_way).props("inline")
            with ui.element("div") as self._of_user:
                hint, first = "The data's id; Enter recommends.", self._first_user()
                self._user = Combobox("User", hint, self._complete_user, self._ask_by, first)
            with ui.element("div") as self._by_title:
                self._title = Combobox(
                    "Add a title",
                    "Oldest first; Enter adds it, or recommends where nothing is typed. Several with ; between them.",
                    desk.complete_title,
                    self._add,
                )
                self._chosen = ui.element("ol").classes("chosen").props('aria-label="The history so far"')
            self._problem = TextElement(tag="p", text="").classes("problem").props("role=alert")
            ui.button("Recommend", on_click=self._ask).props("unelevated no-caps color=dark")
        self._answering = Answering(desk, audited, self._complain)
        self._new_way()

    # -- controls ---------------------------------------------------------------------------------------------

    def _complete_user(self, typed: str) -> list[str]:
        return self._desk.complete_user(str(self._client.value), typed)

    def _first_user(self) -> str:
        return next(iter(self._complete_user("")), "")

    def _new_client(self) -> None:
        """Propose a user of the client, unless one is typed already."""
        if not self._desk.is_user(str(self._client.value), self._user.value.strip()):
            self._user.value = self._first_user()

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

    async def _ask(self) -> None:
        """Ask for whom the controls say; the button stays as it is, and a newer request ends an older one."""
        client = str(self._client.value)
        if self._how.value == _USER:
            await self._answering.ask(client, user=self._user.value.strip())
        else:
            await self._answering.ask(client, typed=list(self._typed))
