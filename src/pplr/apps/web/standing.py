"""How a run stands, read from its folder again and again, and what the training view shows of it."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Literal

from pplr.apps.reports.elements import Cell, Code, Facts, Gallery, Paragraph, Part, Table, measured, said, seconds_cell
from pplr.apps.reports.learning import learning_section
from pplr.apps.reports.mixing import mixing_section
from pplr.apps.reports.quality import headline_metric
from pplr.apps.reports.records import RunFiles, read_run
from pplr.apps.web.rendering import render, render_parts
from pplr.errors import RunError
from pplr.runtimes.claiming import is_claimed
from pplr.runtimes.run import OWN

__all__ = ["Block", "Standing", "Watcher"]

State = Literal["running", "stopped", "finished"]
_FILES = ("config.yaml", "rounds.jsonl", "metrics.json", "provenance.json", "audit.json")


@dataclass(frozen=True)
class Block:
    """A piece of the training view, which is replaced only where it says something else.

    Args:
        key: What it is of; the same from one standing to the next.
        html: What is shown.
        named_by: The id of its name within, if it is a table, which scrolls sideways and can be focused for that.
    """

    key: str
    html: str
    named_by: str = ""


@dataclass(frozen=True)
class Standing:
    """How a run stands.

    Args:
        state: ``running`` while a process trains it, ``finished`` once it is tested, else ``stopped``.
        sentence: The same for people.
        blocks: What the training view is made of, from above.
        changed: Differs from that of another standing if anything in the folder does.
    """

    state: State
    sentence: str
    blocks: tuple[Block, ...]
    changed: object


class Watcher:
    """Watches a run folder for all visitors together, and draws only what has changed.

    Args:
        folder: The run's.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = Lock()
        self._last: Standing | None = None

    def look(self) -> Standing:
        """Read the folder; where a file cannot be read, the view says so until it can."""
        with self._lock:
            changed = self._changed()
            if self._last is None or self._last.changed != changed:
                self._last = self._drawn(changed)
            return self._last

    @property
    def is_finished(self) -> bool:
        """Whether the run is tested, or this is a client's own folder and its adapter is there."""
        own = (self.folder / OWN).exists() and self.has_adapters
        return own or (self.folder / "metrics.json").exists()

    @property
    def has_adapters(self) -> bool:
        """Whether adapters are in the folder, by which it can be asked; some stay on clients' machines."""
        return (self.folder / "clients").is_dir()

    def _changed(self) -> object:
        stamps = []
        for name in _FILES:
            try:
                found = (self.folder / name).stat()
                stamps.append((found.st_mtime_ns, found.st_size))
            except OSError:
                stamps.append((0, 0))
        return self._state(), tuple(stamps)

    def _state(self) -> State:
        if is_claimed(self.folder):
            return "running"
        return "finished" if self.is_finished else "stopped"

    def _drawn(self, changed: object) -> Standing:
        state = self._state()
        try:
            files = read_run(self.folder)
        except RunError as error:
            parts: list[Part] = [Paragraph((said(error),), "notice")]
            return Standing(state, f"This run is {state}.", _blocks("training", parts), changed)
        blocks = _blocks("facts", _facts(files, state))
        for section in (learning_section(files), mixing_section(files, lambda rounds: rounds[-1:])):
            blocks += (Block(section.anchor, render("heading.html", section=section)),)
            blocks += _blocks(section.anchor, _joined(section.parts))
        return Standing(state, _sentence(files, state), blocks, changed)


def _blocks(anchor: str, parts: Sequence[Part]) -> tuple[Block, ...]:
    """Make a block of each part, named by how many of its kind came before; tables without what they scroll in."""
    blocks, counts = [], Counter[str]()
    for part in parts:
        kind = "table" if isinstance(part, Table) else part.kind
        counts[kind] += 1
        key = f"{anchor}-{kind}-{counts[kind]}"
        if isinstance(part, Table):
            blocks.append(Block(key, render("bare_table.html", own=part, name=key), f"table-{key}"))
        else:
            blocks.append(Block(key, render_parts([part], key)))
    return tuple(blocks)


def _joined(parts: Sequence[Part]) -> list[Part]:
    """Put galleries of the same kind that follow each other into one, since each here is of one round."""
    joined: list[Part] = []
    for own in parts:
        last = joined[-1] if joined else None
        if isinstance(own, Gallery) and isinstance(last, Gallery) and own.broad == last.broad:
            joined[-1] = Gallery([*last.charts, *own.charts], broad=own.broad)
        else:
            joined.append(own)
    return joined


def _sentence(files: RunFiles, state: State) -> str:
    done, most = len(files.rounds), files.config.federation.rounds
    rounds = f"{done:,} of at most {most:,} server rounds are done"
    return {
        "running": f"This run is under way: {rounds}.",
        "stopped": f"This run has stopped before its end: {rounds}, and no process trains it.",
        "finished": f"This run is finished: {rounds}"
        + (", and its recommendations are tested." if files.metrics is not None else "."),
    }[state]


def _facts(files: RunFiles, state: State) -> list[Part]:
    config, last = files.config, files.rounds[-1] if files.rounds else None
    took = [own.seconds for own in last.clients.values() if own.seconds is not None] if last else []
    rows: dict[str, list[str | Cell | Code]] = {
        "method": [said(config.federation.method)],
        "model": [f"{said(config.backbone.name)} on {said(config.backbone.model)}"],
        "clients": [measured(len(files.clients) or config.federation.clients)],
        "server rounds": [measured(len(files.rounds)), f" of at most {config.federation.rounds:,}"],
        "last round": [seconds_cell(sum(took) if took else None), " of training, all clients together"],
    }
    if files.metrics is not None and (metric := headline_metric(files.metrics)) is not None:
        rows[f"tested {said(metric)}"] = [measured(files.metrics.overall.get(metric))]
    parts: list[Part] = [Facts(rows)]
    if state == "stopped":
        folder = str(files.folder)
        again = shlex.join(["pplr", "train", f"{folder}/config.yaml", "--run-dir", folder, "--resume"])
        parts.append(Paragraph(("Go on with ", Code(said(again)), "."), "notice"))
    return parts
