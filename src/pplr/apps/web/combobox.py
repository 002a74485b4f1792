"""A field with suggestions under it, for keyboard, mouse and screen readers alike (the ARIA combobox pattern)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from nicegui import ui
from nicegui.elements.mixins.text_element import TextElement

__all__ = ["Combobox"]


class Combobox:
    """A text field whose suggestions are found on the server as it is typed into.

    Arrow keys walk through the suggestions, Enter takes the marked one or else what is typed, Escape closes them. How
    many there are is said to screen readers, and that there are none to everybody.

    Args:
        label: Of the field.
        hint: What can be typed, under the field.
        complete: Lists suggestions for what is typed.
        take: Told of what was chosen or typed, when Enter is pressed or a suggestion is picked.
        value: What stands in it at first. Set afterwards, it could overwrite what a visitor types as the page arrives.
    """

    def __init__(
        self,
        label: str,
        hint: str,
        complete: Callable[[str], list[str]],
        take: Callable[[str], Awaitable[None]],
        value: str = "",
    ) -> None:
        self._complete, self._take = complete, take
        self._found: list[str] = []
        self._marked: int | None = None
        with ui.element("div").classes("combobox"):
            self.field = ui.input(label, value=value, on_change=self._show)
            self._list = ui.element("ul").props(f'role=listbox aria-label="{label}: suggestions"')
            self._list.classes("suggestions")
            self._count = TextElement(tag="p", text="").classes("note said").props("role=status")
            self._hint = TextElement(tag="p", text=hint).classes("note")
        self.field.props("outlined dense role=combobox aria-autocomplete=list autocomplete=off spellcheck=false")
        self.field.props(f"aria-controls={self._list.html_id} aria-describedby={self._hint.html_id}")
        self.field.on("focus", self._show, args=[])
        self.field.on("blur", self._close, args=[])
        self.field.on("keydown.down.prevent", lambda: self._mark(1), args=[])
        self.field.on("keydown.up.prevent", lambda: self._mark(-1), args=[])
        self.field.on("keydown.esc", self._close, args=[])
        self.field.on("keydown.enter.prevent", self._enter, args=[])
        self._close()

    @property
    def value(self) -> str:
        """What is typed."""
        return self.field.value or ""

    @value.setter
    def value(self, text: str) -> None:
        self.field.value = text
        self._close()

    def _show(self) -> None:
        self._found, self._marked = self._complete(self.value), None
        self._draw()
        self._tell(_counted(len(self._found)) if self._found or self.value.strip() else "")

    def _close(self) -> None:
        self._found, self._marked = [], None
        self._draw()
        self._tell("")

    def _tell(self, text: str) -> None:
        self._count.set_text(text)
        self._count.classes(**{"add" if self._found or not text else "remove": "said"})

    def _mark(self, step: int) -> None:
        if not self._found:
            self._show()
        if self._found:
            start = -1 if self._marked is None and step > 0 else 0 if self._marked is None else self._marked
            self._marked = (start + step) % len(self._found)
            self._draw()

    async def _enter(self) -> None:
        await self._choose(self.value if self._marked is None else self._found[self._marked])

    async def _choose(self, text: str) -> None:
        self.value = text
        await self._take(text)

    def _draw(self) -> None:
        self._list.clear()
        self._list.set_visibility(bool(self._found))
        self.field.props(f"aria-expanded={'true' if self._found else 'false'}")
        self.field.props(remove="aria-activedescendant")
        with self._list:
            for place, text in enumerate(self._found):
                option = TextElement(tag="li", text=text)
                option.props(f"role=option aria-selected={'true' if place == self._marked else 'false'}")
                option.on("mousedown.prevent", lambda: None, args=[])  # keeps the field in focus
                option.on("click", lambda _, text=text: self._choose(text), args=[])
                if place == self._marked:
                    self.field.props(f"aria-activedescendant={option.html_id}")


def _counted(found: int) -> str:
    """Say how many suggestions there are.

    Example:
        >>> _counted(0), _counted(1)
        ('Nothing here matches what is typed.', '1 suggestion; the arrow keys choose.')
    """
    if not found:
        return "Nothing here matches what is typed."
    return f"{found} suggestion{'s' if found > 1 else ''}; the arrow keys choose."
