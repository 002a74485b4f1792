from __future__ import annotations

import json
import subprocess
import sys

import numpy as np

from benchmarks.measuring import quality_parser
from benchmarks.quality import finish, train
from benchmarks.sasrec import Scored
from pplr.config_files import load_config
from pplr.data.prompts import Case
from pplr.errors import RunError
from pplr.testing import refuses


def test_a_run_that_is_there_is_read_and_not_trained_again(tmp_path, monkeypatch) -> None:
    def fake(command: list[str], *, check: bool) -> subprocess.CompletedProcess[bytes]:
        calls.append(command)
        if "broken" in command[-1]:
            return subprocess.CompletedProcess(command, 1)
        (tmp_path / "config.yaml").write_text(load_config(config, command[8::2]).to_yaml())
        told = {"overall": {"ndcg@10": 0.1}, "spread": {}, "clients": {"0": {}}, "seconds": {"total": 1.0}}
        (tmp_path / "metrics.json").write_text(json.dumps(told))
        rounds = [{"a": {"validation": {"loss": 0.25, "mrr": 1}}, "b": {}}, {"a": {"validation": None}}]
        (tmp_path / "rounds.jsonl").write_text("".join(json.dumps({"clients": own}) + "\n" for own in rounds))
        (tmp_path / "provenance.json").write_text(
            json.dumps({"holdout_sha256": "h", "versions": {}, "machine": {"threads": 1}})
        )
        return subprocess.CompletedProcess(command, 0)

    config = tmp_path / "c.yaml"
    config.write_text("{}")
    calls: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", fake)
    first = train(config, ["federation.rounds=2"], 3, tmp_path)
    assert first == train(config, ["federation.rounds=2"], 3, tmp_path)
    (command,) = calls
    assert command[:4] == [sys.executable, "-m", "pplr.apps.cli", "train"]
    assert command[-4:] == ["--set", "federation.rounds=2", "--set", "run.seed=3"]
    assert first["holdout_sha256"] == "h"
    assert (first["seed"], first["rounds"]) == (3, 2)
    assert not {"clients", "versions"} & set(first)
    assert first["validation"] == {"metric": "loss", "clients": {"a": [0.25, None], "b": [None, None]}}
    with refuses(RunError, "federation.rounds is 2 there and 4 here"):
        train(config, ["federation.rounds=4"], 3, tmp_path)
    (tmp_path / "metrics.json").unlink()
    train(config, ["federation.rounds=2"], 3, tmp_path)
    assert calls[-1][-1] == "--resume"
    with refuses(RunError, "ended with 1"):
        finish(config, ["backbone.model=broken"], tmp_path / "other")


def test_settings_add_up() -> None:
    told = quality_parser(None).parse_args(["c.yaml", "--name", "n", "--set", "a.b=1", "c.d=2", "--set", "e.f=3"])
    assert told.overrides == ["a.b=1", "c.d=2", "e.f=3"]
    assert quality_parser(None).parse_args(["c.yaml", "--name", "n"]).overrides == []


def test_scores_from_elsewhere_are_looked_up_by_user() -> None:
    table = np.arange(6, dtype=np.float32).reshape(2, 3)
    ranker = Scored(table, [7, 4])
    found = ranker.scores([Case(4, (0,), (1,), (0,)), Case(7, (0,), (1,), (0,))])
    assert found.tolist() == table[[1, 0]].tolist()
