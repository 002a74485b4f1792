"""Links: from a name between backticks to its place, and those of pages that are shown inside others."""

from __future__ import annotations

import os.path
import re
from functools import cache
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref

from _generate.bibliography import entries
from _generate.commands import all_commands
from _generate.fields import all_fields

__all__ = ["link_names", "move_links"]

_CONFIG_PAGE, _BIBLIOGRAPHY = "reference/config", "bibliography"


def link_names(app: Any, doctree: nodes.document) -> None:
    """Link a code span that is a field (also with a value) or a key of the bibliography, or begins with a command."""
    fields, pages = _targets()
    keys = entries((Path(app.srcdir) / "references.bib").read_text(encoding="utf-8"))
    here = app.env.docname
    for node in list(doctree.findall(nodes.literal)):
        if isinstance(node.parent, nodes.title | nodes.reference | pending_xref):
            continue
        name = node.astext().split("=")[0].split(": ")[0]
        words = node.astext().split()
        command = next((own for count in (3, 2) if (own := " ".join(words[:count])) in pages), None)
        if name in fields and here != _CONFIG_PAGE:
            _link(node, here, reftype="confval", reftarget=name)
        elif name in keys and here != _BIBLIOGRAPHY:
            _link(node, here, reftype="ref", reftarget=f"bib-{name}")
        elif command and not here.endswith(f"/{pages[command]}"):
            _link(node, here, reftype="doc", reftarget=f"/generated/commands/{pages[command]}")


@cache
def _targets() -> tuple[set[str], dict[str, str]]:
    """Name every field, and the page of every command."""
    return set(all_fields()), {" ".join(words): "-".join(words[1:]) for words, _ in all_commands()}


def _link(node: nodes.literal, here: str, **target: str) -> None:
    link = pending_xref("", refdomain="std", refexplicit=True, refwarn=True, refdoc=here, **target)
    node.replace_self(link)
    link += node


def move_links(app: Any, path: Path, parent: str, content: list[str]) -> None:
    """Let links of a page outside ``docs``, such as the project's README, lead on from a page in ``docs``.

    A page outside ``docs`` is found there by name: ``CONTRIBUTING.md`` is ``contributing.md``, ``examples/README.md``
    is ``examples.md``. Where there is none, its name stays without a link.
    """
    if path.parts[0] != "..":
        return
    folder = Path(*path.parent.parts[1:])

    def moved(link: re.Match[str]) -> str:
        text, target, place = link[1], Path(os.path.normpath(folder / link[2])), link[3] or ""
        if target.parts[0] == "docs":
            return f"[{text}]({target.relative_to('docs')}{place})"
        if target.suffix != ".md":
            return f"[{text}](../{target})"
        page = f"{(target.parent.name or target.stem).lower()}.md"
        return f"[{text}]({page}{place})" if (Path(app.srcdir) / page).exists() else text

    content[0] = re.sub(r"\[([^\]]*)\]\((?!\w+:|#)([^)#\s]+)(#[^)]*)?\)", moved, content[0])
