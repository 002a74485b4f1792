"""Commands of pplr as processes of their own, forked from one that has loaded the libraries.

Loading torch, transformers and peft takes most of what a short command takes. A fork is a process like any other: it
has a number, a folder, an environment, signals and streams of its own. Commands that pages tell are started anew from
the interpreter all the same, by the tests that carry out those pages.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pplr

LIMIT_S = 60.0
Fault = dict[str, Any]


class Command:
    """A command that was started.

    Args:
        driver: Its parent.
        arguments: What follows ``pplr``.
        out: File that its output is added to.
        err: The same for errors; may be the same file.
        folder: Where it runs; the driver's when absent.
        environment: What is set in it besides the driver's own.
        program: A script to run instead of ``pplr``.
        faults: Those of ``command_driver.py``.
    """

    def __init__(
        self,
        driver: Driver,
        arguments: Sequence[str],
        out: Path,
        err: Path,
        *,
        folder: Path | None = None,
        environment: Mapping[str, str] | None = None,
        program: Path | None = None,
        faults: Sequence[Fault] = (),
    ) -> None:
        self._driver = driver
        self.out, self.err = out, err
        self.out.touch(), self.err.touch()
        self.pid: int = driver.ask(
            arguments=list(arguments),
            folder=str(folder or driver.folder),
            out=str(out),
            err=str(err),
            environment=dict(environment or {}),
            program=None if program is None else str(program),
            faults=list(faults),
        )
        self.code: int | None = None

    def poll(self, seconds: float = 0.0) -> int | None:
        """Return its exit code, or the negative number of the signal that killed it; ``None`` while it runs."""
        if self.code is None:
            self.code = self._driver.ask(wait=self.pid, seconds=seconds)
        return self.code

    def wait(self, seconds: float = LIMIT_S) -> int:
        """Wait for its end."""
        code = self.poll(seconds)
        assert code is not None, f"still there after {seconds} s: {self.text()}"
        return code

    def send(self, number: signal.Signals) -> None:
        assert self.code is None  # while nobody waited for it, its number is its own
        os.kill(self.pid, number)

    def kill(self) -> None:
        if self.code is None:
            self.send(signal.SIGKILL)
            self.wait()

    def text(self) -> str:
        """What it wrote."""
        return "".join(path.read_text(errors="replace") for path in dict.fromkeys((self.out, self.err)))

    def until(self, found: Any, seconds: float = LIMIT_S) -> Any:
        """Wait until something is there, and fail when the process ends before it."""
        limit = time.monotonic() + seconds
        while not (result := found()):
            assert time.monotonic() < limit, self.text()
            if self.code is None and self.poll(0.01) is not None:
                result = found()
                assert result, f"ended with {self.code}: {self.text()}"
                break
        return result


class Driver:
    """A process that has loaded the libraries, and forks commands.

    Args:
        folder: Where commands run, unless told otherwise.
        environment: What is set in it and in every command, besides what is set already.
        threads: Compute threads of every command, unless its configuration says otherwise.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str], threads: int | None = None) -> None:
        self.folder, self.count = folder, 0
        told = {"PYTHONPATH": str(Path(pplr.__file__).parents[1]), "COLUMNS": "200"}
        self._process = subprocess.Popen(
            [
                sys.executable,
                str(Path(__file__).with_name("command_driver.py")),
                *([] if threads is None else [str(threads)]),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | told | dict(environment),
        )

    def ask(self, **job: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def fresh(self, name: str) -> Path:
        """Name a file that nobody has."""
        self.count += 1
        return self.folder / f"{self.count}-{name}"

    def start(self, *arguments: str, faults: Sequence[Fault] = (), **how: Any) -> Command:
        """Start a command, its output in files of its own."""
        return Command(self, arguments, self.fresh("out"), self.fresh("err"), faults=faults, **how)

    def close(self) -> None:
        """End it, and what is still running."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            assert self._process.wait(30) == 0
        finally:
            self._process.kill()
            self._process.wait()
            self._process.stdout.close()
