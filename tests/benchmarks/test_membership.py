"""The membership audit as a benchmark: every seed is kept, and the table says beside what its figures stand."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import benchmarks.membership as membership
from benchmarks.membership_tables import membership_section
from benchmarks.results import sections_of


def content(value: float) -> dict[str, Any]:
    area = {"value": value, "low": value - 0.1, "high": value + 0.1}
    attack = {"attacker": "server", "attack": "loss_difference", "auc": area, "tpr@0.01": area, "tpr@0.001": None}
    return {
        "unit": "user", "rounds": 2, "trainings": 6, "shadows": 4, "users": 50, "members": 150, "non_members": 150,
        "loss": {"base": 5.0, "members": 1.0, "non_members": 2.0},
        "baseline": {"auc": 0.5, "tpr@0.01": 0.01, "tpr@0.001": 0.001},
        "attacks": [attack],
    }  # fmt: skip


def test_the_table_is_of_all_seeds_and_leaves_out_what_cannot_be_told() -> None:
    told = {
        "machine": {"processor": "CPU", "threads": 1},
        "command": "python -m benchmarks.membership c.yaml --name x",
        "membership": [content(0.8), content(0.6)],
    }
    lines = membership_section("x", told).body.splitlines()
    assert lines[2] == "| the server | loss difference | 0.700 (0.500 to 0.900) | 0.700 (0.500 to 0.900) |  |"
    assert lines[3] == "| anyone | no information | 0.5 | 0.01 | 0.001 |"
    assert "150 times a user that was in, 150 times one that was left out, of 50 users" in lines[-1]
    assert "for each of 2 seeds" in lines[-1]


def test_a_small_audit_is_trained_kept_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(membership, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["m", str(tiny_config), "--name", "x", "--seeds", "4", "--lists", "1"])
    membership.main()
    kept = json.loads((tmp_path / "results" / "privacy" / "x.json").read_text())
    (seed,) = kept["membership"]
    assert seed["seed"] == 4
    assert seed["trainings"] == 6
    assert seed["members"] == seed["non_members"] == 3 * 24
    assert {own["attacker"] for own in seed["attacks"]} == {"server", "client", "outsider"}
    assert kept["command"].startswith("python -m benchmarks.membership ")
    assert "training 6 of 6" in capsys.readouterr().out
    (section,) = sections_of(tmp_path / "results")
    assert section.slug == "privacy-x"
