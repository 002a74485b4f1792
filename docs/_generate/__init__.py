"""Pages that are made from the code and from results: commands, configuration, Python's modules, the bibliography."""

from __future__ import annotations

from pathlib import Path

from _generate.bibliography import bibliography_page
from _generate.commands import command_pages
from _generate.docstrings import after_napoleon, before_napoleon
from _generate.fields import fields_page
from _generate.leakage import leakage_table
from _generate.links import link_names, move_links
from _generate.modules import module_pages

__all__ = ["after_napoleon", "before_napoleon", "generated_pages", "link_names", "move_links", "write_pages"]


def generated_pages(docs: Path) -> dict[str, str]:
    """Make every generated page, by its place below ``docs/generated``; those in ``included`` are parts of others."""
    pages = {f"commands/{name}.md": page for name, page in command_pages().items()}
    pages |= {f"modules/{name}.rst": page for name, page in module_pages().items()}
    pages["included/fields.md"] = fields_page()
    pages["included/leakage.md"] = leakage_table(docs.parent / "results" / "privacy")
    pages["included/bibliography.md"] = bibliography_page((docs / "references.bib").read_text(encoding="utf-8"))
    return pages


def write_pages(docs: Path) -> None:
    """Write what changed, so that Sphinx reads no page again without need, and remove what is made no more."""
    folder = docs / "generated"
    pages = {folder / name: text for name, text in generated_pages(docs).items()}
    for path in folder.rglob("*.*"):
        if path not in pages:
            path.unlink()
    for path, text in pages.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
