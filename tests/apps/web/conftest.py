"""A run on titles that hold markup, a server process that shows it, and a browser."""

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
from typing import Any, NoReturn

import pytest

from pplr.config import Config
from pplr.progress import Silent
from pplr.runtimes.in_process import train
from pplr.runtimes.run import Run

ROOT = Path(__file__).parents[3]
MARKUP = "<img src=x onerror=\"alert('run')\"> <script>alert('run')</script> Elm"
_MAIN = "from pplr.apps.cli import main\nmain()"
LIMIT_S = 240  # for a machine with much else to do; nothing waits that long elsewhere


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
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", f"{before}\n{_MAIN}", "web", str(folder), "--port", str(port)],
        cwd=folder.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    lines: list[str] = []
    told = threading.Event()

    def read() -> None:
        for line in process.stdout or ():
            lines.append(line)
            if "open http" in line:
                told.set()
        told.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert told.wait(LIMIT_S), "the server did not start"
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


def chromium() -> str:
    """Find a Chromium of this machine; without one a test is skipped, and fails where browsers are required."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    return found or lacking("there is no Chromium here: install Debian's chromium")


def lacking(what: str) -> NoReturn:
    """Skip a test that needs a browser, or fail where CI would otherwise be green without it."""
    if any(os.environ.get(name, "").lower() not in ("", "0", "false") for name in ("PPLR_REQUIRE_BROWSER", "CI")):
        pytest.fail(f"{what}; PPLR_REQUIRE_BROWSER or CI is set, so that tests in a browser may not be left out")
    pytest.skip(what)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium of this machine."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        lacking("playwright is not installed: install pplr[dev]")
    found = chromium()
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


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


class Visit:
    """One visitor's tab, which notes what must not happen."""

    def __init__(self, browser: Any, address: str, width: int = 1280) -> None:
        self.address = address
        self.context = browser.new_context(viewport={"width": width, "height": 900}, reduced_motion="reduce")
        self.page = self.context.new_page()
        self.page.set_default_timeout(LIMIT_S * 1_000)
        self.wrong: list[str] = []
        self.page.on("dialog", lambda dialog: (self.wrong.append(f"dialog {dialog.message}"), dialog.dismiss()))
        self.page.on("pageerror", lambda error: self.wrong.append(f"error {error}"))
        self.page.on("console", lambda told: told.type == "error" and self.wrong.append(told.text))
        self.page.on("request", self._note)

    def _note(self, request: Any) -> None:
        if not request.url.startswith((self.address, self.address.replace("http", "ws"), "data:", "blob:")):
            self.wrong.append(f"asks {request.url}")

    @property
    def is_too_wide(self) -> bool:
        return bool(self.page.evaluate("document.documentElement.scrollWidth > innerWidth"))


@pytest.fixture
def visit(browser: Any, request: pytest.FixtureRequest) -> Iterator[Callable[..., Visit]]:
    """Open tabs; at the end nothing may have gone wrong in any of them."""
    visits: list[Visit] = []

    def open_tab(address: str, path: str = "/", width: int = 1280) -> Visit:
        visits.append(Visit(browser, address, width))
        visits[-1].page.goto(address + path)
        return visits[-1]

    yield open_tab
    wrong = [told for own in visits for told in own.wrong]
    for own in visits:
        own.context.close()
    assert not wrong


@pytest.fixture
def keep(tmp_path: Path) -> Callable[[Visit, str], Path]:
    """Keep a picture of a page as an artefact: in the folder PPLR_ARTEFACTS, or pytest's own."""

    def picture(own: Visit, name: str) -> Path:
        folder = Path(os.environ.get("PPLR_ARTEFACTS", tmp_path))
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.png"
        own.page.screenshot(path=path, full_page=True)
        return path

    return picture
