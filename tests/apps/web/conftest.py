"""A run on titles that hold markup, and a server process that shows it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pplr.config import Config
from pplr.progress import Silent
from pplr.runtimes.in_process import train
from pplr.runtimes.run import Run
from tests.apps.conftest import LIMIT_S
from tests.docs.pages import DOCS, told

ROOT = Path(__file__).parents[3]
MARKUP = "<img src=x onerror=\"alert('run')\"> <script>alert('run')</script> Elm"
_MAIN = "from pplr.apps.cli import main\nmain()"


@pytest.fixture(scope="session")
def marked_config(
    tmp_path_factory: pytest.TempPathFactory, data_folder: Path, model_folder: Path, small_config: Callable[..., Config]
) -> Config:
    """The configuration of a run of a second, which reads items; one title is made of markup."""
    data = tmp_path_factory.mktemp("marked") / "tiny"
    shutil.copytree(data_folder, data)
    items = data / "tiny.item"
    items.write_text(items.read_text().replace("\tElm\n", f"\t{MARKUP}\n"))
    return small_config(
        f"data.path={data}", f"backbone.model={model_folder}", "backbone.name=item_vectors",
        "backbone.item_vectors.width=8", "data.history_items=4", "evaluation.validation_metric=loss",
        "federation.rounds=2",
    )  # fmt: skip


@pytest.fixture(scope="session")
def marked(tmp_path_factory: pytest.TempPathFactory, marked_config: Config) -> Run:
    """That run, finished."""
    return train(marked_config, tmp_path_factory.mktemp("page") / "run <b>one")


@contextmanager
def serving(folder: Path, before: str = "") -> Iterator[str]:
    """Serve a run's page in a process of its own, and give its address; ``before`` is code that it runs first."""
    port = _free_port()
    page = told(DOCS / "web.md", {"RUN_DIR": str(folder), "8900": str(port)})[1]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", f"{before}\n{_MAIN}", *page[1:]],
        cwd=folder.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    lines: list[str] = []
    ready = threading.Event()

    def read() -> None:
        for line in process.stdout or ():
            lines.append(line)
            if "open http" in line:
                ready.set()
        ready.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert ready.wait(LIMIT_S), "the server did not start"
        found = re.search(r"open (http://\S+)", "".join(lines))
        assert found, "".join(lines)
        yield found[1]
    finally:
        process.terminate()
        process.wait(30)
        reader.join(30)
        if process.stdout is not None:
            process.stdout.close()
    assert "Traceback" not in "".join(lines), "".join(lines)
    assert "Warning" not in "".join(lines), "".join(lines)


def _free_port() -> int:
    import socket

    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return int(own.getsockname()[1])


@pytest.fixture(scope="session")
def page_of(marked: Run) -> Iterator[str]:
    """Address of the finished run's page."""
    with serving(marked.folder) as address:
        yield address


class Paced(Silent):
    """Holds a training before its first server round and after each, until it may go on."""

    def __init__(self) -> None:
        self._may = threading.Semaphore(0)
        self.is_ready = threading.Event()

    def task(self, label: str, total: int, unit: str) -> Any:
        if label.startswith("server round") and not self.is_ready.is_set():
            self.is_ready.set()
            self._wait()
        return super().task(label, total, unit)

    def server_round(self, record: Any) -> None:
        self._wait()

    def _wait(self) -> None:
        if not self._may.acquire(timeout=LIMIT_S):
            raise TimeoutError("nobody let the training go on")

    def go_on(self) -> None:
        self._may.release()


@contextmanager
def training(config: Config, folder: Path) -> Iterator[Paced]:
    """Train a run beside the test, as far as it is let, to its end."""
    paced = Paced()
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(train, config, folder, progress=paced)
        try:
            assert paced.is_ready.wait(LIMIT_S), "the training did not begin"
            yield paced
        finally:
            for _ in range(config.federation.rounds + 1):
                paced.go_on()
        running.result(LIMIT_S)
