"""The deployment page, run from top to bottom: every command on it, on one machine, with a tiny model."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import pplr
from pplr.testing import tiny_decoder, tiny_tokenizer

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "docs" / "deployment.md"
TREES = ("Ash", "Birch", "Cedar", "Elm", "Fir", "Oak", "Pine", "Yew")


def history() -> str:
    rows = [
        f"c{customer},s{(customer + 3 * place) % len(TREES)},{TREES[(customer + 3 * place) % len(TREES)]},{place}"
        for customer in range(12)
        for place in range(5)
    ]
    return "\n".join(["customer,sku,title,day", *rows, ""])


def test_the_page_leads_from_nothing_to_two_clients(tmp_path: Path) -> None:
    page = PAGE.read_text(encoding="utf-8")
    tiny_decoder(layers=8, width=16).save_pretrained(tmp_path / "whole")
    tiny_tokenizer().save_pretrained(tmp_path / "whole")
    (tmp_path / "history.csv").write_text(history())
    (north,) = re.findall(r"```yaml\n(.*?)```", page, re.S)
    config = yaml.safe_load(north)
    for name, bundle, k, m in (("north", "cut", 2, 1), ("south", "deeper", 4, 2)):
        own = config | {"cut": {"input_layers": k, "output_layers": m}}
        own["backbone"] = config["backbone"] | {"model": f"{bundle}/client"}
        own["training"] = config["training"] | {"samples": 12}
        own["evaluation"] = {"test_users": 3, "validation_users": 2, "beams": 2, "max_new_tokens": 4}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(own))
    environment = os.environ | {
        "PPLR_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(pplr.__file__).parents[1]),
        "HF_HUB_OFFLINE": "1",
    }
    here = {"stage.example.org:8443": "localhost:PORT", "stage.example.org": "localhost", "smollm2-135m": "whole"}
    here |= {"0.0.0.0:8443": "localhost:0", "127.0.0.1:9464": "127.0.0.1:0"}
    commands = [line for block in re.findall(r"```sh\n(.*?)```", page, re.S) for line in block.splitlines()]
    assert len(commands) >= 14
    server, address = None, ""
    try:
        for command in commands:
            line = command
            for there, mine in here.items():
                line = line.replace(there, mine)
            words = shlex.split(line.replace("PORT", "1"))
            assert words[0] == "pplr", command
            call = [sys.executable, "-m", "pplr.apps.cli", *words[1:]]
            if words[1:3] == ["stage", "serve"]:
                with (tmp_path / "server.log").open("w") as log:
                    server = subprocess.Popen(call, cwd=tmp_path, env=environment, stdout=log, stderr=log)
                address = listening(tmp_path / "server.log")
                continue
            if "--kit" in words:
                call += ["--stage-server", address]
            done = subprocess.run(
                call, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
            )
            assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        assert server is not None
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    finally:
        if server is not None:
            server.kill()
            server.wait()
    for name in ("north", "south"):
        assert (tmp_path / "runs" / name / "metrics.json").exists()


def listening(log: Path) -> str:
    until = time.monotonic() + 90
    while time.monotonic() < until:
        if found := re.search(r" on localhost:(\d+)", log.read_text()):
            return f"localhost:{found[1]}"
        time.sleep(0.1)
    raise AssertionError(log.read_text())
