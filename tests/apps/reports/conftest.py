"""A small run whose folder a test may change, and a reader of pages."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pplr.runtimes.run import Run

VOID = {"meta", "img", "link", "br", "hr"}


@dataclass
class Found:
    """What a reader finds in a page."""

    text: str = ""
    tables: dict[str, dict[str, dict[str, tuple[str, float | None]]]] = field(default_factory=dict)
    attributes: list[tuple[str, str, str]] = field(default_factory=list)
    images: list[dict[str, str]] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)


class _Reader(HTMLParser):
    """Reads text, tables by caption, row and column, and refuses tags that do not close."""

    def __init__(self) -> None:
        super().__init__()
        self.found, self.open = Found(), []
        self.caption = self.cell = ""
        self.value: float | None = None
        self.head: list[str] = []
        self.row: list[tuple[str, float | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = {name: value or "" for name, value in attrs}
        self.found.tags.append(tag)
        self.found.attributes += [(tag, name, value) for name, value in told.items()]
        self.found.ids += [told["id"]] if "id" in told else []
        if tag == "img":
            self.found.images.append(told)
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("th", "td", "caption"):
            self.cell, self.value = "", None
        if tag == "data":
            self.value = float(told["value"])
        if tag == "tr":
            self.row = []

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "caption":
            self.caption = self.cell
            assert self.caption not in self.found.tables, f"two tables are called {self.caption}"
            self.found.tables[self.caption] = {}
        if tag in ("th", "td"):
            self.row.append((self.cell, self.value))
        if tag == "tr" and "thead" in self.open:
            self.head = [text for text, _ in self.row]
        elif tag == "tr":
            assert len(self.row) == len(self.head)
            self.found.tables[self.caption][self.row[0][0]] = dict(zip(self.head, self.row, strict=True))

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("style", "title"):
            return
        self.cell += data
        self.found.text += data


def read_page(text: str) -> Found:
    reader = _Reader()
    reader.feed(text)
    reader.close()
    assert not reader.open
    reader.found.text = " ".join(reader.found.text.split())
    return reader.found


@pytest.fixture
def folder(finished: Callable[..., Run], tmp_path: Path) -> Path:
    """The folder of a finished run, to change as one likes."""
    return Path(shutil.copytree(finished("evaluation.before=true").folder, tmp_path / "run"))


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw nothing where a test looks at no chart: laying them out takes most of a page's time."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, file, **options: file.write("<svg></svg>"))


@pytest.fixture
def change() -> Callable[..., None]:
    """Change a JSON file in place."""

    def do(path: Path, alter: Callable[[dict[str, Any]], Any]) -> None:
        content = json.loads(path.read_text())
        alter(content)
        path.write_text(json.dumps(content))

    return do


@pytest.fixture
def audit() -> dict[str, Any]:
    """The content of an ``audit.json`` of two settings."""

    def told(mean: float) -> dict[str, float]:
        return {"mean": mean, "low": mean - 0.125, "high": mean + 0.0625}

    def setting(k: int, noise: float, f1: float) -> dict[str, Any]:
        return {
            "cut": {"input_layers": k, "output_layers": 1, "total_layers": 3},
            "noise": noise,
            "worth": told(0.5) | {"users": 6},
            "audits": [
                {"audit": "logit_lens", "knowledge": "own", "item_f1": told(f1), "token_recovery": told(0.375),
                 "target_hit@1": None, "seconds": 1.5},
                {"audit": "catalog_matching", "knowledge": "base", "item_f1": told(f1 - 0.25), "seconds": 2.0},
            ],
        }  # fmt: skip

    return {
        "backbone": "causal_lm", "method": "pplr", "cut": {"input_layers": 1, "output_layers": 1, "total_layers": 3},
        "metric": "ndcg@3", "users": 4, "seed": 0, "wire": "exact",
        "baseline": {"item_f1": told(0.25), "token_recovery": told(0.125), "target_hit@1": None},
        "settings": [setting(1, 2.0, 0.4375), setting(1, 0.0, 0.8125)],
        "verdict": "The server <reads> it.", "seconds": 9.0,
    }  # fmt: skip
