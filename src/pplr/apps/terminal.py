"""What a run looks like while it runs: bars on a terminal, plain lines in a log, a table after each server round."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import permutations
from typing import IO, Any, Final

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from pplr.apps.tables import Table, clean, figure, human_seconds

__all__ = ["Screen", "TerminalProgress", "round_table", "similarity_line"]

_EVERY_S: Final = 15.0
_ROOM_FOR_BAR: Final = 76
_ROOM_FOR_RATE: Final = 66


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to the command line, which ends quietly."""
        raise


class Screen:
    """Where lines and tables go: standard output, with a width and styles only if it is a terminal.

    Args:
        file: Another place to write to.
        interactive: Whether a person watches; found out when absent.
        width: Cells on a line; the terminal's when absent, ``$COLUMNS`` or no limit in a log.
    """

    def __init__(
        self, file: IO[str] | None = None, *, interactive: bool | None = None, width: int | None = None
    ) -> None:
        file = file or sys.stdout
        terminal = file.isatty() if interactive is None else interactive
        self.console = _Console(
            file=file, force_terminal=terminal, force_jupyter=False, width=width, highlight=False, markup=False
        )
        self.interactive = terminal and not self.console.is_dumb_terminal
        columns = os.environ.get("COLUMNS", "")
        self._width = width or (int(columns) if columns.isdigit() and int(columns) > 0 else None)

    @property
    def width(self) -> int | None:
        """Cells on a line, or ``None`` for no limit."""
        return self.console.width if self.interactive else self._width

    def line(self, text: object = "", style: str = "") -> None:
        """Write one line as it is: nothing in it is taken for markup, and only the terminal itself wraps it."""
        self.lines([Text(clean(text), style=style)])

    def lines(self, lines: Sequence[Text]) -> None:
        """Write lines that are laid out already."""
        for line in lines:
            self.console.print(line, soft_wrap=True)

    def table(self, table: Table) -> None:
        """Write a table that fits the width."""
        self.lines(table.lines(self.width))

    def busy(self, label: str) -> AbstractContextManager[Any]:
        """Show that something of unknown length goes on, on a terminal only."""
        return self.console.status(Text(clean(label))) if self.interactive else nullcontext()


class TerminalProgress:
    """Tells a person, or a log, how a run goes.

    Args:
        screen: Where to; standard output when absent.
        rounds: Most server rounds, if known, to print beside a round's number.
        clock: Seconds that never go back.
    """

    def __init__(
        self,
        screen: Screen | None = None,
        *,
        rounds: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.screen = screen or Screen()
        self._rounds = rounds
        self._clock = clock
        self._bars: Progress | None = None

    def note(self, line: str) -> None:
        """Write one finished line."""
        self.screen.line(line)

    def task(self, label: str, total: int, unit: str) -> AbstractContextManager[Callable[[int], None]]:
        """Follow a task: a bar that goes when it is done, or lines at most every 15 s and one at its end.

        In a log, a task that turned out to have nothing to do leaves no line.
        """
        return self._bar(label, total, unit) if self.screen.interactive else self._plain(label, total, unit)

    def server_round(self, record: Mapping[str, Any]) -> None:
        """Write a finished round as a table, with how alike the clients' adapters are."""
        of = f" of {self._rounds}" if self._rounds is not None else ""
        self.screen.line()
        self.screen.line(f"server round {figure(record.get('server_round'))}{of}", style="bold")
        self.screen.table(round_table(record))
        self.screen.line(similarity_line(record.get("similarity")))
        self.screen.line()

    @contextmanager
    def _bar(self, label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        outermost = self._bars is None
        if self._bars is None:
            width = self.screen.console.width
            bar = [BarColumn(bar_width=None, table_column=Column(ratio=1))]
            self._bars = Progress(
                TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=False)),
                *(bar if width >= _ROOM_FOR_BAR else []),
                _Counts(rate=width >= _ROOM_FOR_RATE),
                console=self.screen.console,
                transient=True,
                expand=True,
                refresh_per_second=4,
            )
            self._bars.start()
        bars = self._bars
        task = TaskID(-1)
        try:
            task = bars.add_task(clean(label), total=total, unit=unit)
            yield lambda count: bars.advance(task, count)
        finally:
            if task >= 0:
                bars.remove_task(task)
            if outermost:
                self._bars = None
                bars.stop()

    @contextmanager
    def _plain(self, label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        start = told = self._clock()
        done = 0

        def advance(count: int) -> None:
            nonlocal done, told
            done += count
            now = self._clock()
            if done < total and now - told >= _EVERY_S:
                told = now
                left = human_seconds((total - done) * (now - start) / done) if done else "-"
                self.screen.line(f"{label}: {_counted(done, total, unit, now - start)}, {left} left")

        ended = "stopped at "
        try:
            yield advance
            ended = ""
        finally:
            if done or ended:
                self.screen.line(f"{label}: {ended}{_counted(done, total, unit, self._clock() - start)}")


class _Counts(ProgressColumn):
    """What is done, how fast it goes and how long it will take; where there is little room, not how fast."""

    def __init__(self, *, rate: bool) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self._rate = rate

    def render(self, task: Task) -> Text:
        unit = task.fields["unit"]
        speed = task.finished_speed or task.speed
        parts = [f"{task.completed:,.0f}/{task.total or 0:,.0f} {unit}"]
        if self._rate:
            parts.append(f"{speed:.1f} {unit}/s" if speed else f"- {unit}/s")
        parts.append(f"{human_seconds(task.time_remaining)} left")
        return Text(", ".join(parts))


def round_table(record: Mapping[str, Any]) -> Table:
    """Lay out a round's record: a row for each client that trained, a dash for what the method does not have."""
    clients: Mapping[str, Mapping[str, Any]] = record.get("clients") or {}
    validations = list(dict.fromkeys(name for own in clients.values() for name in own.get("validation") or {}))
    rows = [
        (
            client,
            figure(own.get("samples")),
            figure(own.get("loss")),
            figure(own.get("loss_share")),
            figure(own.get("heating_weight")),
            *(figure((own.get("validation") or {}).get(name)) for name in validations),
            figure(own.get("seconds"), digits=1),
        )
        for client, own in clients.items()
    ]
    columns = (
        "client",
        "samples",
        "loss",
        "loss share",
        "heating",
        *(f"val. {name}" for name in validations),
        "seconds",
    )
    return Table(columns, rows, texts=("client",))


def similarity_line(similarity: Sequence[Sequence[float | None]] | None) -> str:
    """Say between which bounds the similarities of two different clients lie.

    Example:
        >>> similarity_line([[1.0, 0.7, 0.9], [0.7, 1.0, 0.8], [0.9, 0.8, 1.0]])
        'similarity between clients: 0.700000 to 0.900000, spread 0.2'
        >>> similarity_line(None)
        'similarity between clients: -'
    """
    rows = similarity or []
    pairs = [rows[i][j] for i, j in permutations(range(len(rows)), 2)]
    known = [value for value in pairs if value is not None]
    if not known:
        return "similarity between clients: -"
    low, high = min(known), max(known)
    return f"similarity between clients: {low:.6f} to {high:.6f}, spread {high - low:.1g}"


def _counted(done: int, total: int, unit: str, seconds: float) -> str:
    rate = f"{done / seconds:.1f} {unit}/s" if done and seconds > 0 else f"- {unit}/s"
    return f"{done:,}/{total:,} {unit}, {rate}"
