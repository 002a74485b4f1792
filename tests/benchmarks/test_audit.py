"""The audit as a benchmark: every seed is kept, and the table shows each attack once for each cut that it looks at."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import benchmarks.audit as audit
from benchmarks.privacy_tables import privacy_section
from pplr.privacy.scoring import METRICS
from pplr.runtimes.audit_settings import make_settings


def told(value: float) -> dict[str, dict[str, float] | None]:
    return {name: None if name == "rouge_l" else {"mean": value, "low": value - 0.1, "high": value} for name in METRICS}


def content(value: float) -> dict[str, Any]:
    first = {"audit": "walk", "knowledge": "own", **told(value), "seconds": 1.0}
    second = {"audit": "lens", "knowledge": "own", **told(0.5), "seconds": 1.0}

    def setting(m: int, audits: list[dict[str, Any]]) -> dict[str, Any]:
        cut = {"input_layers": 1, "output_layers": m, "total_layers": 4}
        return {"cut": cut, "noise": 0.0, "worth": {"mean": value / 10, "users": 3}, "audits": audits}

    return {
        "backbone": "item_vectors",
        "metric": "ndcg@10",
        "users": 3,
        "baseline": told(0.2),
        "settings": [setting(0, [first, second]), setting(1, [first, {**second, "seconds": 2.0}])],
        "verdict": "So it is.",
    }


def test_the_table_is_of_all_seeds() -> None:
    kept = {
        "machine": {"processor": "CPU", "threads": 1},
        "command": "python -m benchmarks.audit c.yaml --name x",
        "seeds": [content(0.8), content(0.6)],
    }
    body = privacy_section("x", kept).body
    rows = [line for line in body.splitlines() if line.startswith("| ")]
    assert rows[2].startswith("| 1, 0 | 0 | 0.0700 | walk | own | 0.70 (0.50 to 0.80) |  |")
    assert sum("walk" in row for row in rows) == 1
    assert sum("lens" in row for row in rows) == 2
    assert "| any | any |  | no states | popularity | 0.20 (0.10 to 0.20) |" in rows[-1]
    assert "`python -m benchmarks.audit c.yaml --name x`" in body


def test_the_plot_is_of_all_seeds() -> None:
    kept = audit.pooled([content(0.8), content(0.6)])
    own = kept["settings"][0]["audits"][0]
    assert own["item_f1"] == pytest.approx({"mean": 0.7, "low": 0.5, "high": 0.8})
    assert own["rouge_l"] is None
    assert kept["settings"][1]["worth"] == pytest.approx({"mean": 0.07, "users": 3, "low": 0.06, "high": 0.08})


def test_what_was_done_to_states_is_in_the_row() -> None:
    guarded = content(0.8)
    guarded["settings"][0] |= {"guard": "metric noise η 4", "passes": 12}
    kept = {"machine": {"processor": "CPU", "threads": 1}, "command": "python -m x", "seeds": [guarded]}
    body = privacy_section("x", kept).body
    assert "| 1, 0 | metric noise η 4, mean of 12 passes | 0.0800 | walk |" in body
    assert "| 1, 1 | 0 | 0.0800 | lens |" in body


def test_every_seed_is_audited_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def fake(**words: Any) -> dict[str, Any]:
        seeds.append(words["seed"])
        assert make_settings(**words).cuts == ((1, 0), (1, 1))
        return content(0.5)

    monkeypatch.setattr(audit, "ROOT", tmp_path)
    monkeypatch.setattr(audit, "finish", lambda *arguments: None)
    monkeypatch.setattr(audit, "open_run", lambda folder: SimpleNamespace(audit=fake))
    run = tmp_path / "runs" / "privacy" / "x"
    run.mkdir(parents=True)
    (run / "metrics.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["audit", "c.yaml", "--name", "x", "--cut", "1,0", "1,1", "--seeds", "3", "4"])
    audit.main()
    kept = json.loads((tmp_path / "results" / "privacy" / "x.json").read_text())
    assert seeds == [3, 4]
    assert len(kept["seeds"]) == 2
    assert kept["command"] == "python -m benchmarks.audit c.yaml --name x --cut 1,0 1,1 --seeds 3 4"
    assert (tmp_path / "results" / "privacy" / "x.png").read_bytes().startswith(b"\x89PNG")

    audit.main()
    assert seeds == [3, 4]  # both were kept
    (run / "metrics.json").write_text('{"another": "run"}')
    audit.main()
    assert seeds == [3, 4, 3, 4]
    monkeypatch.setattr(sys, "argv", ["audit", "c.yaml", "--name", "x", "--cut", "1,0", "1,1", "--users", "9"])
    audit.main()
    assert seeds == [3, 4, 3, 4, 0, 1, 2]
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--seeds", "0", "3"])
    audit.main()
    assert seeds == [3, 4, 3, 4, 0, 1, 2, 3]  # 3 was of other users
