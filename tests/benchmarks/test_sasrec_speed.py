"""Item vectors train for a given time and are tested; the other side is RecTools', in an environment of its own."""

from __future__ import annotations

import pytest

from benchmarks import sasrec_speed


def test_item_vectors_train_until_the_time_is_up(small_config, model_folder) -> None:
    config = small_config(
        "backbone.name=item_vectors",
        "backbone.item_vectors.width=8",
        f"backbone.model={model_folder}",
        "training.samples=null",
        "federation.method=centralized",
    )
    ours, assembly = sasrec_speed.item_vectors(config, 0.2)
    assert ours["seconds"] >= 0.2
    assert ours["epochs"] > 0
    assert ours["targets_per_second"]["median"] > 0
    assert set(ours["test"]) >= {"ndcg@10", "recall@10"}
    theirs = {"targets_per_second": 50.0, "epochs": 5, "seconds": 0.2, "test": {"ndcg@10": 0.1, "recall@10": 0.2}}
    told = sasrec_speed.summed_up(ours, theirs)
    (row,) = told["rows"]
    assert row["ratio"] == pytest.approx(ours["targets_per_second"]["median"] / 50)
    assert row["at_least"] is row["met"] is None
    assert len(told["notes"]) == 3
    assembly.close()
