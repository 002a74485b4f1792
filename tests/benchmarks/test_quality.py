from __future__ import annotations

import json
import subprocess
import sys

import numpy as np

from benchmarks.measuring import quality_parser
from benchmarks.quality import train
from benchmarks.sasrec import Scored
from pplr.data.prompts import Case


def test_a_run_that_is_there_is_read_and_not_trained_again(tmp_path, monkeypatch) -> None:
    def fake(command: list[str], *, check: bool) -> None:
        calls.append(command)
        told = {"overall": {"ndcg@10": 0.1}, "spread": {}, "clients": {"0": {}}, "seconds": {"total": 1.0}}
        (tmp_path / "metrics.json").write_text(json.dumps(told))
        (tmp_path / "rounds.jsonl").write_text("{}\n{}\n")
        (tmp_path / "provenance.json").write_text(json.dumps({"holdout_sha256": "h", "versions": {}}))

    calls: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", fake)
    first = train(tmp_path / "c.yaml", ["federation.rounds=2"], 3, tmp_path)
    assert first == train(tmp_path / "c.yaml", ["federation.rounds=2"], 3, tmp_path)
    (command,) = calls
    assert command[:4] == [sys.executable, "-m", "pplr.apps.cli", "train"]
    assert command[-4:] == ["--set", "federation.rounds=2", "--set", "run.seed=3"]
    assert first["holdout_sha256"] == "h"
    assert (first["seed"], first["rounds"]) == (3, 2)
    assert not {"clients", "versions"} & set(first)


def test_settings_add_up() -> None:
    told = quality_parser(None).parse_args(["c.yaml", "--name", "n", "--set", "a.b=1", "c.d=2", "--set", "e.f=3"])
    assert told.overrides == ["a.b=1", "c.d=2", "e.f=3"]
    assert quality_parser(None).parse_args(["c.yaml", "--name", "n"]).overrides == []


def test_scores_from_elsewhere_are_looked_up_by_user() -> None:
    table = np.arange(6, dtype=np.float32).reshape(2, 3)
    ranker = Scored(table, [7, 4])
    found = ranker.scores([Case(4, (0,), (1,), (0,)), Case(7, (0,), (1,), (0,))])
    assert found.tolist() == table[[1, 0]].tolist()
