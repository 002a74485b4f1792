"""The federated round and the usual way, on a tiny model: they train alike, and mix alike."""

from __future__ import annotations

import statistics

import pytest

from benchmarks import federated_round
from pplr.stages.client_model import ClientModel

PLAIN = ("federation.method=pplr", "federation.rounds=1", "training.samples=null", "training.local_epochs=1")


@pytest.fixture(params=[False, True], ids=["padded", "one row"])
def tiny(request, small_config, model_folder):
    shared = f"training.shared_prefix={str(request.param).lower()}"
    config = small_config(*PLAIN, f"backbone.model={model_folder}", "training.learning_rate=0.001", shared)
    return config, federated_round.causal_lm_of(config)


def test_both_ways_end_with_the_same_losses_and_adapters(tiny) -> None:
    config, backbone = tiny
    samples = federated_round.drawn(config, backbone, 8)
    loss, apart = federated_round.check(config, backbone, samples)
    assert loss < 1e-5
    assert apart < 1e-5


def test_a_usual_way_that_trains_otherwise_is_refused(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    config, backbone = tiny
    samples = federated_round.drawn(config, backbone, 8)
    right = federated_round.train_usually

    def wrong(folder, encoded, *others, **options):
        return right(folder, encoded[:3], *others, **options)

    monkeypatch.setattr(federated_round, "train_usually", wrong)
    with pytest.raises(SystemExit, match="do not train alike"):
        federated_round.check(config, backbone, samples)


def test_a_wrong_gradient_of_one_tensor_is_refused_though_losses_agree(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    config, backbone = tiny
    samples = federated_round.drawn(config, backbone, 8)
    right = ClientModel.optimizer_step

    def wrong(model, clip_norm):
        name = next(name for name in model.input_member.parameters if "lora_B" in name)
        model.input_member.parameters[name].grad.neg_()
        return right(model, clip_norm)

    monkeypatch.setattr(ClientModel, "optimizer_step", wrong)
    monkeypatch.setattr(federated_round, "LOSS_TOLERANCE", 0.01)
    with pytest.raises(SystemExit, match="do not train alike"):
        federated_round.check(config, backbone, samples)


def test_they_are_not_compared_in_bfloat16(tiny) -> None:
    config, backbone = tiny
    with pytest.raises(SystemExit, match="in float32, not in bfloat16"):
        federated_round.check(federated_round.with_dtype(config, "bfloat16"), backbone, {})


def test_the_usual_way_says_what_loading_took_and_trains_in_the_dtype_it_is_told(tiny, monkeypatch) -> None:
    config, backbone = tiny
    made = []
    right = federated_round.train_usually

    def watched(*arguments, dtype, **options):
        told = right(*arguments, dtype=dtype, **options)
        made.append((dtype, told))
        return told

    monkeypatch.setattr(federated_round, "train_usually", watched)
    told = federated_round.a_round(
        config, backbone, federated_round.drawn(config, backbone, 4), ("float32", "bfloat16")
    )
    losses = {dtype: [own.loss for other, own in made if other == dtype] for dtype in ("float32", "bfloat16")}
    assert losses["float32"] != losses["bfloat16"]
    assert losses["float32"] == pytest.approx(losses["bfloat16"], rel=0.02)
    for dtype, own in told["load_seconds"].items():
        assert 0 < own < told["seconds"][dtype]


def test_what_is_measured_is_bound_to_the_faster_usual_way(small_config, model_folder) -> None:
    own = (f"backbone.model={model_folder}", "backbone.dtype=bfloat16", "training.shared_prefix=true")
    told = federated_round.measure(small_config(*PLAIN, *own), 4, 2)
    seconds = {way: spread["median"] for way, spread in told["seconds"].items()}
    assert set(seconds) == {"pplr", "pplr, padded", "pplr, float32", "float32", "bfloat16"}
    bound, *others = told["rows"]
    assert bound["ratio"] == pytest.approx(min(seconds["float32"], seconds["bfloat16"]) / seconds["pplr"])
    assert bound["met"] == (bound["ratio"] >= bound["at_least"] == 3)
    assert all(row["at_least"] is row["met"] is None for row in others)
    assert others[0]["ratio"] == pytest.approx(max(seconds["float32"], seconds["bfloat16"]) / seconds["pplr"])
    assert others[1]["ratio"] == pytest.approx(seconds["float32"] / seconds["pplr, float32"])
    assert told["client_ratios"]["float32"]["count"] == 2 * 3
    assert statistics.median([own["pplr"]["load_seconds"]["float32"] for own in told["rounds"]]) > 0
    assert len(told["notes"]) == 5
