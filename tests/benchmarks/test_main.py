"""All benchmarks in their order: one that fails keeps no other from running, and is named at the end."""

from __future__ import annotations

import importlib.util
import subprocess

import pytest

from benchmarks import __main__ as everything


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []

    def run(command, **options):
        names.append(command[-1].removeprefix("benchmarks."))
        return subprocess.CompletedProcess(command, 3 if names[-1] == "wire" else 0)

    monkeypatch.setattr(everything.subprocess, "run", run)
    for page in ("write_summary", "write_page"):
        monkeypatch.setattr(everything, page, lambda page=page: names.append(page))
    return names


def test_a_benchmark_that_fails_is_named_after_all_have_run(ran, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(everything.sys, "argv", ["benchmarks"])
    with pytest.raises(SystemExit) as ended:
        everything.main()
    assert ran == [*everything.BENCHMARKS, "write_summary", "write_page"]
    assert str(ended.value).startswith("error: 1 failed")
    assert str(ended.value).endswith("wire (exit status 3)")
    assert "== all took 0:00 min" in capsys.readouterr().out


def test_those_that_are_named_run_alone(ran, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(everything.sys, "argv", ["benchmarks", "training", "roofline"])
    everything.main()
    assert ran == ["training", "roofline", "write_summary", "write_page"]


@pytest.mark.parametrize("name", everything.BENCHMARKS)
def test_every_benchmark_is_there(name: str) -> None:
    assert importlib.util.find_spec(f"benchmarks.{name}") is not None
