"""Trained defences as a benchmark: each is trained and attacked once, and the table tells the strongest attack."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import benchmarks.state_defence as defence
from benchmarks.defence_tables import defence_section
from pplr.privacy.scoring import METRICS
from tests.runtimes.test_item_vector_runs import config  # noqa: F401


def told(value: float) -> dict[str, dict[str, float]]:
    return {name: {"mean": value, "low": value - 0.1, "high": value + 0.1} for name in METRICS}


def row(name: str, value: float, *, under: bool) -> dict[str, Any]:
    audits = [{"audit": "a", **told(value - 0.2)}, {"audit": "b", **told(value)}]
    settings = [{"passes": passes, "guard": name, "audits": audits} for passes in (1, 12)]
    return {
        "defence": name,
        "trained_under_it": under,
        "metric": "ndcg@10",
        "worth": {"mean": 0.05, "low": 0.04, "high": 0.06},
        "bits": 1.5 if under else None,
        "users": 3,
        "baseline": told(0.2),
        "settings": settings,
    }


CONTENT = {
    "command": "python -m x",
    "machine": {"processor": "CPU", "threads": 1},
    "bits": 9.5,
    "defences": [row("noise", 0.5, under=True), row("noise", 0.8, under=False)],
    "differences": {"defence": "gaussian", "users": 3, **told(0.9)},
}


def test_the_table_tells_the_strongest_attack_and_what_bounds_it() -> None:
    body = defence_section("x", CONTENT).body
    rows = [line for line in body.splitlines() if line.startswith("| ")]
    assert rows[2].startswith("| noise | under it | 0.0500 (0.0400 to 0.0600) | 1.50 | 0.50 (0.40 to 0.60) |")
    assert rows[3].startswith("| noise | without it | 0.0500 (0.0400 to 0.0600) |  | 0.80 (0.70 to 0.90) |")
    assert "| no states, popularity |  |  |  | 0.20 (0.10 to 0.30) |" in rows[-1]
    assert "item F1 of 0.90 (0.80 to 1.00)" in body


def test_what_no_attack_tells_has_no_column() -> None:
    content = json.loads(json.dumps(CONTENT))
    for own in content["defences"]:
        for audit in (audit for setting in own["settings"] for audit in setting["audits"]):
            audit["target_hit@1"] = None
    head, _, first, *_ = defence_section("x", content).body.splitlines()
    assert "target" in defence_section("x", CONTENT).body.splitlines()[0]
    assert "target" not in head
    assert len(head.split("|")) == len(first.split("|"))


def test_each_is_trained_and_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, attacked = [], []

    def fake(name: str, run: Any, guard: Any, arguments: Any) -> dict[str, Any]:
        attacked.append(name)
        return row(name, 0.5, under=True)

    def finish(path: Path, overrides: list[str], folder: Path) -> None:
        trained.append(folder.name)
        folder.mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(defence, "ROOT", tmp_path)
    monkeypatch.setattr(defence, "finish", finish)
    monkeypatch.setattr(defence, "popularity_bits", lambda run: 9.5)
    monkeypatch.setattr(defence, "attack_differences", lambda run, users: CONTENT["differences"])
    monkeypatch.setattr(defence, "measured", fake)
    states = SimpleNamespace(privacy=SimpleNamespace(states=None))
    monkeypatch.setattr(defence, "open_run", lambda folder: SimpleNamespace(config=states, folder=folder))
    monkeypatch.setattr(sys, "argv", ["x", "c.yaml", "--name", "x", "--defence", "clean", "gaussian-0.08"])
    defence.main()
    assert attacked == ["clean", "gaussian-0.08", "gaussian-0.08"]
    defence.main()
    assert len(attacked) == 3
    assert trained == ["clean", "gaussian-0.08"] * 2
    kept = json.loads((tmp_path / "results" / "privacy" / "x.json").read_text())
    assert [own["defence"] for own in kept["defences"]] == attacked
    assert (tmp_path / "results" / "privacy" / "x.png").read_bytes().startswith(b"\x89PNG")


def test_every_defence_is_a_setting() -> None:
    for own in defence.DEFENCES.values():
        assert defence.settings_of(own).is_noisy == bool(own)


def test_a_run_is_measured_with_its_rate_and_two_rounds_are_told_apart(tmp_path: Path, config) -> None:  # noqa: F811
    from pplr.runtimes.in_process import train

    pooled = ("federation.method=centralized", "evaluation.cutoffs=[3, 10]")
    learned = ("privacy.states.noise=learned", "privacy.states.code_width=4", "privacy.states.rate_weight=0.01")
    run = train(config(*pooled, *learned), tmp_path / "learned")
    arguments = SimpleNamespace(attack=["posterior_matching"], users=4, passes=[1, 4])
    found = defence.measured("learned", run, run.config.privacy.states, arguments)
    assert found["trained_under_it"]
    assert found["bits"] > 0
    assert found["worth"]["low"] <= found["worth"]["mean"] <= found["worth"]["high"]
    assert found["worth"]["mean"] == pytest.approx(run.metrics["overall"]["ndcg@10"])
    gaussian = tuple(f"privacy.states.{own}" for own in ("clip_norm=36", "noise=gaussian", "noise_multiplier=2"))
    noisy = train(config(*pooled, *gaussian), tmp_path / "gaussian")
    differences = defence.attack_differences(noisy, 4)
    behind = defence.measured("gaussian", noisy, noisy.config.privacy.states, arguments)
    one_pass = behind["settings"][0]["audits"][0]["token_recovery"]["mean"]
    assert differences["token_recovery"]["mean"] > one_pass
