"""Item vectors train for a given time and are tested; the other side is RecTools', in an environment of its own."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import sasrec, sasrec_speed
from pplr.stages.client_model import ClientModel


@pytest.fixture
def config(small_config, model_folder):
    return small_config(
        "backbone.name=item_vectors",
        "backbone.item_vectors.width=8",
        f"backbone.model={model_folder}",
        "training.samples=null",
        "federation.method=centralized",
    )


def test_the_rate_is_that_of_the_whole_training(config, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def read() -> float:
        now[0] += 1
        return now[0]

    monkeypatch.setattr(sasrec_speed, "time", SimpleNamespace(monotonic=read))
    trained: list[int] = []
    right = ClientModel.train_batch

    def watched(model, parts, seeds):
        trained.append(sum(part.targets for part in parts))
        return right(model, parts, seeds)

    monkeypatch.setattr(ClientModel, "train_batch", watched)
    ours, assembly = sasrec_speed.item_vectors(config, 4)
    assert len(trained) == ours["seconds"] == 4  # a second each, and the batch that warms up is none of them
    assert ours["targets"] == sum(trained)
    assert ours["targets_per_second"] == sum(trained) / 4
    assert ours["epochs"] == 4 * config.training.batch_size / 24
    assert set(ours["test"]) >= {"ndcg@10", "recall@10"}
    theirs = {"targets_per_second": 50.0, "epochs": 5, "seconds": 4, "test": {"ndcg@10": 0.1, "recall@10": 0.2}}
    told = sasrec_speed.summed_up(ours, theirs)
    (row,) = told["rows"]
    assert row["ratio"] == pytest.approx(ours["targets_per_second"] / 50)
    assert row["at_least"] is row["at_most"] is row["met"] is None
    assert len(told["notes"]) == 3
    json.dumps(told)
    assembly.close()


@pytest.mark.slow
@pytest.mark.skipif(not (sasrec.ENVIRONMENT / "made").exists(), reason="benchmarks.sasrec has not made it yet")
def test_sasrec_is_fitted_once_until_the_time_is_up(tmp_path: Path) -> None:
    settings = {
        "n_factors": 8,
        "n_blocks": 1,
        "n_heads": 1,
        "session_max_len": 6,
        "batch_size": 4,
        "dataloader_num_workers": 0,
    }
    train = [[(user + step) % 9 for step in range(3 + user % 3)] for user in range(12)]
    task = {
        "items": 9, "train": train, "test_histories": {"0": [1, 2]}, "settings": [settings], "seeds": [0], "threads": 1,
        "seconds": 2.0,
    }  # fmt: skip
    source, out = tmp_path / "histories.json", tmp_path / "scores.npz"
    source.write_text(json.dumps(task))
    script = Path(sasrec_speed.__file__).with_name("rectools_sasrec.py")
    subprocess.run([sasrec.environment(), str(script), str(source), str(out)], check=True)
    with np.load(out) as tables:
        (own,) = json.loads(str(tables["summary"]))["runs"]
        assert tables["seed_0"].shape == (1, 9)
    of_an_epoch = sum(len(history) - 1 for history in train)
    assert own["seconds"] >= 2.0
    assert own["epochs"] * of_an_epoch == pytest.approx(own["targets"], abs=of_an_epoch)
