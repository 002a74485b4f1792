"""A block of an answer, which says how it stands until it is there."""

from __future__ import annotations

import time

from nicegui import ui
from nicegui.elements.mixins.text_element import TextElement

__all__ = ["Step"]


class Step:
    """One block: it waits for others, then is worked on, then shows what came of it.

    Args:
        work: What is done for it, such as ``Writing ten titles``.
        classes: Of the block.
    """

    def __init__(self, work: str, classes: str = "") -> None:
        self._work = work
        self._began: float | None = None
        self.is_open = True
        with ui.element("div").classes(f"step {classes}") as self.block:
            with ui.element("p").classes("waiting") as self._state:
                self._bar = ui.element("progress").props(f'aria-label="{work}"')
                self._told = TextElement(tag="span", text=f"{work} waits for its turn.")
            self._shown = ui.html("", sanitize=False)
        self._bar.set_visibility(False)
        self._shown.set_visibility(False)

    def begin(self) -> None:
        """Say that it is worked on."""
        self._began = time.monotonic()
        self.block.props("aria-busy=true")
        self._bar.set_visibility(True)
        self.tick()

    def tick(self) -> None:
        """Say for how long it has been worked on."""
        if self._began is not None and self.is_open:
            self._told.set_text(f"{self._work} … {time.monotonic() - self._began:.0f} s")

    def show(self, html: str) -> None:
        """Show what came of it.

        Args:
            html: Escaped already.
        """
        self.is_open = False
        self.block.props(remove="aria-busy")
        self._state.set_visibility(False)
        self._shown.set_content(html)
        self._shown.set_visibility(True)

    def give_up(self) -> None:
        """Say that nothing comes of it any more; what is shown stays."""
        if self.is_open:
            self.is_open = False
            self.block.props(remove="aria-busy")
            self._bar.set_visibility(False)
            self._told.set_text(f"{self._work} has stopped.")
