"""The view that follows a training. What has not changed stays as it is, with whatever is focused or scrolled in it."""

from __future__ import annotations

from nicegui import ui
from nicegui.elements.mixins.text_element import TextElement

from pplr.apps.web.standing import Block, Standing

__all__ = ["Following"]


class Following:
    """One visitor's view of how the run stands."""

    def __init__(self) -> None:
        self._sentence = TextElement(tag="p", text="").classes("summary").props("role=status")
        self._view = ui.element("div")
        self._places: dict[str, ui.element] = {}
        self._shown: dict[str, ui.html] = {}
        self._standing: Standing | None = None

    def show(self, standing: Standing) -> None:
        """Show how the run stands by now, and touch nothing that is shown already."""
        if self._view.is_deleted:  # the visitor left while it was read
            return
        if self._standing is not None and standing.changed == self._standing.changed:
            return
        self._standing = standing
        self._sentence.set_text(standing.sentence)
        for key in self._places.keys() - {block.key for block in standing.blocks}:
            self._places.pop(key).delete()
            del self._shown[key]
        for place, block in enumerate(standing.blocks):
            if block.key not in self._shown:
                self._add(block, place)
            elif self._shown[block.key].content != block.html:
                self._shown[block.key].set_content(block.html)

    def _add(self, block: Block, place: int) -> None:
        with self._view, ui.element("div") as own:
            self._shown[block.key] = ui.html(block.html, sanitize=False)
        if block.named_by:
            own.classes("scroll").props(f"role=region tabindex=0 aria-labelledby={block.named_by}")
        own.move(target_index=place)
        self._places[block.key] = own
