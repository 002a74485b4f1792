"""A deployment on this machine: bundles, a federation, a stage server and clients as processes, mutual TLS."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pplr.backbones.bundles import write_bundles
from pplr.backbones.causal_lm import EncodedSample
from pplr.backbones.loading import find_checkpoint
from pplr.runtimes.identity import enroll_client, init_federation

HOST = "127.0.0.1"
PATIENCE_S = 900.0


class Process:
    """A process that is told by lines and answers by lines; it ends with its context."""

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        self.log = log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, **(environment or {})},
                bufsize=1,
            )
        self.pid = self._process.pid
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._process.stdout or ():
            self._lines.put(line)
        self._lines.put("")

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(40)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def line(self, patience_s: float = PATIENCE_S) -> str:
        """Wait for its next line."""
        with suppress(queue.Empty):
            if told := self._lines.get(timeout=patience_s):
                return told
        raise SystemExit(f"{self._process.args} said nothing: {self.log.read_text()[-2000:]}")

    def answer(self, patience_s: float = PATIENCE_S) -> Any:
        """Wait for its next line of JSON."""
        return json.loads(self.line(patience_s))

    def ask(self, order: str) -> None:
        """Send it a line."""
        if self._process.stdin is not None:
            self._process.stdin.write(order + "\n")

    def end(self) -> None:
        """Let it end by itself."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait(PATIENCE_S)

    def forget_peak(self) -> None:
        """Begin to measure its peak memory (``VmHWM``) anew."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5", encoding="ascii")

    def status(self, key: str) -> int:
        """Read one of its memory figures, such as ``VmRSS``."""
        lines = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


class Deployment:
    """Everything that a server and its clients need, in a folder."""

    def __init__(self, folder: Path, cut: Any, model: str = "smollm2-135m") -> None:
        self.folder = folder
        self._source, self._cut = find_checkpoint(model, print), cut
        init_federation(folder / "federation", "bench", [HOST], address=f"{HOST}:8443")

    def bundles(self, dtype: str) -> tuple[Path, Path]:
        """Cut the model, once for each number format; return the client's bundle and the server's."""
        out = self.folder / dtype
        if not out.exists():
            write_bundles(
                self._source,
                out,
                input_layers=self._cut.input_layers,
                output_layers=self._cut.output_layers,
                dtype=dtype,
            )
        return out / "client", out / "server"

    def kit(self, name: str, role: Any = "client") -> Path:
        """Enroll a client, once."""
        out = self.folder / "kits" / name
        if not out.exists():
            enroll_client(self.folder / "federation", name, out, role=role)
        return out

    @contextmanager
    def server(
        self, dtype: str, *options: str, environment: Mapping[str, str] | None = None
    ) -> Iterator[tuple[str, Process]]:
        """Run ``pplr stage serve``; give its address and its process."""
        command = ["pplr.apps.cli", "stage", "serve", str(self.bundles(dtype)[1]), "--dtype", dtype]
        command += ["--federation", str(self.folder / "federation"), "--listen", f"{HOST}:0", *options]
        with Process(command, self.folder / "server.log", {"COLUMNS": "300", **(environment or {})}) as process:
            told = ""
            while f" on {HOST}:" not in told:
                told = process.line()
            yield f"{HOST}:" + told.split(f" on {HOST}:")[1].split(",")[0].strip(), process

    def client(
        self,
        name: str,
        overrides: Sequence[str],
        batches: Sequence[Sequence[EncodedSample]],
        *,
        address: str = "",
        warmup: int = 2,
        threads: int,
        environment: Mapping[str, str] | None = None,
    ) -> Process:
        """Start :mod:`benchmarks.one_client`; without an address it trains the uncut model alone."""
        settings = self.folder / f"{name}.json"
        told = {
            "name": name,
            "overrides": list(overrides),
            "kit": str(self.kit(name)),
            "address": address,
            "warmup": warmup,
            "threads": threads,
            "batches": [[[list(s.prompt), list(s.answer)] for s in batch] for batch in batches],
        }
        settings.write_text(json.dumps(told), encoding="utf-8")
        return Process(["benchmarks.one_client", str(settings)], self.folder / f"{name}.log", environment)


@contextmanager
def deployment(cut: Any) -> Iterator[Deployment]:
    """Make one in a folder that is gone in the end, and its processes with it, on SIGTERM too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory() as folder:
        yield Deployment(Path(folder), cut)
