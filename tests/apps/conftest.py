"""Stand-ins for runs, and a browser that opens pages."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import pytest

from pplr.config import Config

LIMIT_S = 240  # for a machine with much else to do; nothing waits that long elsewhere


def _metrics(method: str = "pplr", clients: int = 2) -> dict[str, Any]:
    names = ("recall@10", "ndcg@10", "recall@20", "ndcg@20", "mrr")
    return {
        "method": method,
        "backbone": "causal_lm",
        "cut": {"input_layers": 2, "output_layers": 1, "total_layers": 30},
        "overall": {name: 0.11 + place / 100 for place, name in enumerate(names)},
        "clients": {
            str(client): {"users": 190 + client, **dict.fromkeys(names, 0.25 + client / 100)}
            for client in range(clients)
        },
        "spread": {"ndcg@10": {"worst": 0.0301, "best": 0.0702, "std": 0.0103, "gap": 0.0404}},
        "floors": {"popularity": {"recall@10": 0.0505, "ndcg@10": 0.0206}},
        "cost": {
            "client": {"stored_bytes": 412_345_678, "peak_rss_bytes": None, "train_flops": 3.4e12},
            "server": {"stored_bytes": 1_212_345_678, "peak_rss_bytes": None, "train_flops": None},
            "wire": {"bytes_up": 12_300_000, "bytes_down": None},
        },
        "seconds": {"total": 3700.0, "train": 3000.0, "evaluate": None},
        "samples_per_second": 2.34,
    }


@pytest.fixture
def metrics() -> Callable[..., dict[str, Any]]:
    return _metrics


@pytest.fixture
def evaluation() -> Callable[..., Any]:
    def make(values: Any, users: Any = None, metric: str = "ndcg@10") -> Any:
        from pplr.recommend.evaluation import Evaluation

        values = np.asarray(values, dtype=np.float64)
        users = np.arange(len(values)) if users is None else np.asarray(users)
        return Evaluation(users, tuple("0" for _ in values), {metric: values, "recall@10": values})

    return make


@pytest.fixture
def fake_run(evaluation: Callable[..., Any]) -> Callable[..., Any]:
    """Make something with the surface of a run."""

    def make(folder: str = "runs/a", **parts: Any) -> Any:
        found = parts.pop("tested", None) or evaluation([0.0, 0.5, 1.0])
        defaults: dict[str, Any] = {
            "folder": Path(folder),
            "config": Config(),
            "metrics": _metrics(),
            "rounds": [],
            "provenance": {"holdout_sha256": "aa"},
            "evaluation": lambda part="test": found,
            "close": lambda: None,
        }
        return SimpleNamespace(**(defaults | parts))

    return make


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stand in for the runtimes, which load torch: set ``train`` and ``open_run``."""
    launch, run = ModuleType("pplr.runtimes.launch"), ModuleType("pplr.runtimes.run")
    fakes = SimpleNamespace(train=None, open_run=None, servers=[])
    launch.train = lambda *args, **options: fakes.train(*args, **options)  # type: ignore[attr-defined]
    run.open_run = lambda folder, server=None: (fakes.servers.append(server), fakes.open_run(folder))[1]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, launch.__name__, launch)
    monkeypatch.setitem(sys.modules, run.__name__, run)
    return fakes


@pytest.fixture
def round_record() -> dict[str, Any]:
    line = """{"server_round": 1, "similarity": [[1.0, 0.7], [0.8, 1.0]],
        "clients": {"0": {"samples": 120, "loss": 2.1, "loss_share": 0.4, "heating_weight": 0.8,
            "mixed_from": {"0": 0.6, "1": 0.4}, "validation": {"ndcg@10": 0.05}, "seconds": 12.0, "bytes_up": 0,
            "bytes_down": 0}, "1": {"samples": 64, "loss": null, "validation": {"loss": 3.25}}}}"""
    return dict(json.loads(line))


def chromium() -> str:
    """Find a Chromium of this machine; without one a test is skipped, and fails where browsers are required."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    return found or lacking("there is no Chromium here: install Debian's chromium")


def lacking(what: str) -> NoReturn:
    """Skip a test that needs a browser, or fail where CI would otherwise be green without it."""
    if any(os.environ.get(name, "").lower() not in ("", "0", "false") for name in ("PPLR_REQUIRE_BROWSER", "CI")):
        pytest.fail(f"{what}; PPLR_REQUIRE_BROWSER or CI is set, so that tests in a browser may not be left out")
    pytest.skip(what)


@pytest.fixture(scope="module")  # while it is open, nothing else here may run an event loop
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
