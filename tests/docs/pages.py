"""Every page that a reader sees, and the blocks and code spans in it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from typer.testing import CliRunner

from pplr.apps.cli import app

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted(ROOT.glob("examples/*.md")),
    *sorted(
        path for path in DOCS.rglob("*.md") if "generated" not in path.parts and not path.parent.name.endswith("_text")
    ),
)
"""Without what is generated, and without prose that a generated page holds."""
_READ = MarkdownIt("commonmark").enable("table")


@dataclass(frozen=True)
class Block:
    """A fenced block, or an indented one, whose kind is then ``indented``."""

    page: Path
    line: int
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    for token in _READ.parse(page.read_text(encoding="utf-8")):
        if token.type in ("fence", "code_block") and token.map:
            kind = token.info.strip().split(" ")[0] if token.type == "fence" else "indented"
            yield Block(page, token.map[0] + 1, kind, token.content)


def spans(page: Path) -> Iterator[str]:
    """What stands between backticks in running text and in tables."""
    for token in _READ.parse(page.read_text(encoding="utf-8")):
        for child in token.children or ():
            if child.type == "code_inline":
                yield child.content


def carried_out(words: Sequence[str]) -> str:
    """What a command of ``pplr`` prints, run in this process; it must succeed."""
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 0, f"pplr {' '.join(words)}\n{result.output}"
    return result.output


def told(page: Path, here: Mapping[str, str]) -> list[list[str]]:
    """The commands of a page's blocks of kind ``sh`` from top to bottom, some words in the place of others."""
    found = [words for block in blocks(page) if block.kind == "sh" for words in commands(block)]
    return [[here.get(word, word) for word in words] for words in found]


def commands(block: Block) -> list[list[str]]:
    """The commands of a block of kind ``sh``: a line each, longer ones with a backslash, comments left out."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]
