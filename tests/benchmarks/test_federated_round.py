"""The federated round and the usual way, on a tiny model: they train alike, and mix alike."""

from __future__ import annotations

import pytest

from benchmarks import federated_round

PLAIN = ("federation.method=pplr", "federation.rounds=1", "training.samples=null", "training.local_epochs=1")


@pytest.fixture(params=[False, True], ids=["padded", "one row"])
def tiny(request, small_config, model_folder):
    shared = f"training.shared_prefix={str(request.param).lower()}"
    config = small_config(*PLAIN, f"backbone.model={model_folder}", "training.learning_rate=0.001", shared)
    return config, federated_round.causal_lm_of(config)


def test_both_ways_end_with_the_same_losses_and_adapters(tiny) -> None:
    config, backbone = tiny
    samples = federated_round.drawn(config, backbone, 8)
    loss, adapter = federated_round.check(config, backbone, samples)
    assert loss < 1e-5
    assert adapter < 1e-5


def test_a_usual_way_that_trains_otherwise_is_refused(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    config, backbone = tiny
    samples = federated_round.drawn(config, backbone, 8)
    right = federated_round.train_usually

    def wrong(folder, encoded, *others, **options):
        return right(folder, encoded[:3], *others, **options)

    monkeypatch.setattr(federated_round, "train_usually", wrong)
    with pytest.raises(SystemExit, match="do not train alike"):
        federated_round.check(config, backbone, samples)


def test_what_is_measured_has_a_row_and_notes(tiny) -> None:
    config, backbone = tiny
    told = federated_round.measure(config, backbone, 4, 1)
    (row,) = told["rows"]
    assert row["ratio"] == pytest.approx(told["seconds"]["usual"]["median"] / told["seconds"]["pplr"]["median"])
    assert row["met"] == (row["ratio"] >= row["at_least"] == 3)
    assert told["client_ratios"]["count"] == 3
    assert len(told["notes"]) == 3
