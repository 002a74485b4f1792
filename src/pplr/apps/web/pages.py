"""The two pages: one recommends, one follows the training."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from nicegui import app, run, ui
from nicegui.elements.mixins.text_element import TextElement

from pplr import __version__
from pplr.apps.reports.elements import Code, Paragraph, Part, said
from pplr.apps.reports.records import read_run
from pplr.apps.web.asking import Asking
from pplr.apps.web.desk import Desk
from pplr.apps.web.following import Following
from pplr.apps.web.rendering import render_parts, style
from pplr.apps.web.standing import Standing, Watcher
from pplr.errors import PplrError, RunError

__all__ = ["Pages"]

_EVERY_S = 1.0
_MARK = "#0b4a86"
"""The one colour of the report."""
_OPEN = (
    "This page can be opened from other machines, without a login: whoever reaches it sees the histories of this "
    "run's users."
)
_WAITS = "Recommendations wait for its end; see the training."
_ELSEWHERE = "Its adapters are with its clients: serve a client's own run folder, on that client's machine."


class Pages:
    """Makes each visitor's own page of one run.

    Args:
        desk: Answers.
        watcher: Says how the run stands.
        is_open: Whether other machines can open the page.
    """

    def __init__(self, desk: Desk, watcher: Watcher, *, is_open: bool) -> None:
        self._desk, self._watcher, self._is_open = desk, watcher, is_open
        self._name = said(desk.folder.resolve().name)

    def register(self) -> None:
        """Tell the server of both, and load the model as it starts if the run is finished."""
        ui.page("/", title=f"{self._name}: recommendations")(self._recommending)
        ui.page("/training", title=f"{self._name}: training")(self._training)
        app.on_startup(self._load)

    async def _load(self) -> None:
        if self._watcher.is_finished and self._watcher.has_adapters:
            await run.io_bound(self._load_quietly)

    def _load_quietly(self) -> str:
        """Load data and model, and say what went wrong if anything did."""
        try:
            self._desk.load()
        except PplrError as error:
            return str(error)
        return ""

    @contextmanager
    def _frame(self, here: Literal["recommendations", "training"]) -> Iterator[None]:
        ui.add_head_html(f"<style>{style()}</style>")
        ui.colors(primary=_MARK)
        with ui.element("header"):
            TextElement(tag="h1", text=f"Run {self._name}")
            if self._is_open:
                TextElement(tag="p", text=_OPEN).classes("notice").props("role=note")
            with ui.element("nav").props('aria-label="Views"'), ui.element("ul"):
                for name, target in (("recommendations", "/"), ("training", "/training")):
                    with ui.element("li"):
                        link = TextElement(tag="a", text=name.capitalize()).props(f"href={target}")
                        if name == here:
                            link.props("aria-current=page")
        with ui.element("main"):
            yield
        with ui.element("footer"):
            told = f"Made by pplr {__version__} from the files of the run. It loads nothing from elsewhere."
            TextElement(tag="p", text=told)

    # -- recommendations --------------------------------------------------------------------------------------

    async def _recommending(self) -> None:
        with self._frame("recommendations"):
            view = ui.element("div")
        if self._desk.is_ready:
            with view:
                Asking(self._desk, self._audited)
            return
        with view:
            said_now = TextElement(tag="p", text="").classes("notice").props("role=status")

        async def look() -> None:
            if not (self._watcher.is_finished and self._watcher.has_adapters):
                standing: Standing | None = await run.io_bound(self._watcher.look)
                if standing is not None and not view.is_deleted:
                    said_now.set_text(f"{standing.sentence} {_ELSEWHERE if self._watcher.is_finished else _WAITS}")
                return
            said_now.set_text("Loading the data and the model …")
            problem: str | None = await run.io_bound(self._load_quietly)
            timer.deactivate()
            if problem is None or view.is_deleted:  # the server is stopping, or the visitor left meanwhile
                return
            if problem:
                said_now.set_text(problem)
                return
            view.clear()
            with view:
                Asking(self._desk, self._audited)

        timer = ui.timer(_EVERY_S, look)

    def _audited(self) -> str:
        """Say what the run's audit found over its users, or how to measure that."""
        try:
            audit = read_run(self._desk.folder).audit
        except RunError as error:
            return render_parts([Paragraph((said(error),), "notice")], "audit")
        parts: list[Part] = []
        if audit is not None:
            told = f"Over {audit.users:,} users, the audit of this run says: {said(audit.verdict)}"
            parts.append(Paragraph((told,)))
        elif self._desk.is_audited:
            command = shlex.join(["pplr", "audit", str(self._desk.folder)])
            told = "This is one attack on one request. Measure more of both, over many users, with "
            parts.append(Paragraph((told, Code(said(command)), "."), "note"))
        return render_parts(parts, "audit")

    # -- training ---------------------------------------------------------------------------------------------

    async def _training(self) -> None:
        with self._frame("training"):
            following = Following()

        async def look() -> None:
            standing: Standing | None = await run.io_bound(self._watcher.look)
            if standing is not None:
                following.show(standing)

        ui.timer(_EVERY_S, look)
