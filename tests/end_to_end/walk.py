"""Carries out the commands of the deployment page: the data, model and configuration they need, and the processes."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from unittest import mock

import yaml
from typer.testing import CliRunner

import pplr
from pplr.apps.cli import app
from pplr.testing import tiny_decoder, tiny_tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "deploy.md"
TREES = ("Ash", "Birch", "Cedar", "Elm", "Fir", "Oak", "Pine", "Yew")
LIMIT_S = 600


def write_federation(folder: Path, model: Path) -> None:
    """Write the catalog that both clients have, a history for each, the page's configuration, and a tiny model."""
    items = [f"s{number},{title}" for number, title in enumerate(TREES)]
    (folder / "items.csv").write_text("\n".join(["sku,title", *items, ""]))
    for name, step in (("north", 1), ("south", 3)):
        rows = [
            f"c{customer},s{(customer + step * place) % len(TREES)},{place}"
            for customer in range(12)
            for place in range(5)
        ]
        (folder / f"{name}.csv").write_text("\n".join(["customer,sku,day", *rows, ""]))
    (told,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    config = yaml.safe_load(told)
    config["evaluation"] |= {"test_users": 3, "validation_users": 2, "beams": 2, "max_new_tokens": 4, "cutoffs": [5]}
    config["federation"]["rounds"] = 1
    (folder / "shops.yaml").write_text(yaml.safe_dump(config))
    tiny_decoder(layers=8, width=16).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)


class Walk:
    """Carries out commands in a folder; servers and clients run on, each with a log."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {
            "PPLR_CACHE": str(folder / "cache"),
            "FLWR_HOME": str(folder / "flwr"),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(pplr.__file__).parents[1]),
            "HF_HUB_OFFLINE": "1",
        }
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def start(
        self,
        name: str,
        words: list[str],
        ready: Callable[[str], bool],
        within: Path | None = None,
        more: Mapping[str, str] | None = None,
    ) -> None:
        """Start what runs on, and wait until it is ready, which may be told by its log."""
        with (self.folder / f"{name}.log").open("w") as log:
            self.running[name] = subprocess.Popen(
                [sys.executable, "-m", "pplr.apps.cli", *words],
                cwd=within or self.folder, env=self.environment | (more or {}), stdout=log, stderr=log,
            )  # fmt: skip
        until = time.monotonic() + LIMIT_S
        while not ready(self.log(name)):
            assert self.running[name].poll() is None, self.log(name)
            assert time.monotonic() < until, self.log(name)
            time.sleep(0.1)

    def carry_out(self, words: list[str], within: Path | None = None, more: Mapping[str, str] | None = None) -> None:
        """Run a command to its end: the short ones in this process, since each start of Python takes seconds."""
        within, environment = within or self.folder, self.environment | (more or {})
        if words[0] == "train":
            done = subprocess.run(
                [sys.executable, "-m", "pplr.apps.cli", *words],
                cwd=within, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False,
            )  # fmt: skip
            code, told = done.returncode, done.stdout + done.stderr
        else:
            with contextlib.chdir(within), mock.patch.dict(os.environ, environment):
                result = CliRunner().invoke(app, words)
            code, told = result.exit_code, f"{result.output}{result.exception or ''}"
        assert code == 0, f"{shlex.join(words)}\n{told}{''.join(map(self.log, self.running))}"

    def stop(self) -> None:
        for process in reversed(list(self.running.values())):
            process.kill()
            process.wait()
