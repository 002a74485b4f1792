"""``pplr web`` before it serves: what it refuses, and what it warns of."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pplr.apps.cli import app
from tests.docs.pages import DOCS, told


def test_a_missing_extra_is_told_with_its_cure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "nicegui" or name == "pplr.apps.web.serving"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nicegui", None)
    done = CliRunner().invoke(app, ["web", str(tmp_path)])
    assert done.exit_code == 1
    assert "pip install 'pplr[web]'" in done.stderr


def test_the_commands_of_the_page_serve_where_it_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    serving = pytest.importorskip("pplr.apps.web.serving")
    served = []
    monkeypatch.setattr(serving, "serve", lambda *where, **_: served.append(where[:3]))
    for _, *words in told(DOCS / "web.md", {"RUN_DIR": str(tmp_path)}):
        assert CliRunner().invoke(app, words).exit_code == 0
    assert served == [(tmp_path, "127.0.0.1", 8765), (tmp_path, "127.0.0.1", 8900)]
    assert "<http://127.0.0.1:8765>" in (DOCS / "web.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("port", ["0", "65536", "x"])
def test_a_port_that_is_none_is_a_usage_error(port: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["web", str(tmp_path), "--port", port])
    assert done.exit_code == 2
    assert "--port" in done.stderr


def test_a_folder_without_a_run_a_taken_port_and_a_foreign_address_are_done_in_one_line(small_config, tmp_path) -> None:
    """In a process of its own, as the library is imported once and for all."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(small_config().to_yaml())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        code = f"""
import sys
from pplr.apps.cli import app
wrong = ["--port", "{port}"], ["--host", "192.0.2.1"], ["--host", "no such"]
for arguments in (["nothing"], *(["run", *own] for own in wrong)):
    try:
        app(["web", *arguments])
    except SystemExit as ended:
        print(ended.code)
"""
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["1"] * 4, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert "no config.yaml" in lines[0]
    assert f"127.0.0.1, port {port} (Address already in use)" in lines[1]
    assert "Choose another --port" in lines[1]
    assert "192.0.2.1" in lines[2]
    assert "is no address" in lines[3]
    assert done.stderr.count("warning: 192.0.2.1 can be reached from other machines") == 1
    assert "Traceback" not in done.stderr


def test_help_loads_neither_the_library_nor_torch() -> None:
    code = "import sys; from pplr.apps.cli import app; app(['web', '--help'], standalone_mode=False); "
    code += "print([name for name in ('nicegui', 'fastapi', 'torch', 'matplotlib') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
