"""A run on titles that hold markup, a server process that shows it, and a browser."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pplr.config import Config
from pplr.runtimes.in_process import train
from pplr.runtimes.run import Run
from tests.docs.pages import DOCS, told

ROOT = Path(__file__).parents[3]
MARKUP = "<img src=x onerror=\"alert('run')\"> <script>alert('run')</script> Elm"
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
def serving(folder: Path) -> Iterator[str]:
    """Serve a run's page in a process of its own, and give its address."""
    port = _free_port()
    page = told(DOCS / "web.md", {"RUN_DIR": str(folder), "8900": str(port)})[1]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "pplr.apps.cli", *page[1:]],
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


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium of this machine."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("there is no Chromium here: install Debian's chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


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
