"""What trackers are told, against the records that it is read from."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pplr.config import Config
from pplr.runtimes.trackers import final_points, parameters, round_points

VALUES = st.none() | st.floats(0, 10)


@given(
    st.dictionaries(
        st.sampled_from(["0", "1", "north"]), st.fixed_dictionaries({"loss": VALUES, "ndcg": VALUES}), min_size=1
    )
)
def test_the_worst_is_the_highest_loss_and_the_lowest_ndcg(told):
    clients = {
        name: {"loss": own["loss"], "validation": {"loss": own["loss"], "ndcg@5": own["ndcg"]}, "seconds": 2.0}
        for name, own in told.items()
    }
    points = round_points({"server_round": 1, "similarity": None, "clients": clients})
    assert points["seconds/total"] == 2.0 * len(told)
    for tag, key, worst in (
        ("loss", "loss", max),
        ("validation/loss", "loss", max),
        ("validation/ndcg@5", "ndcg", min),
    ):
        known = {name: own[key] for name, own in told.items() if own[key] is not None}
        assert {tag_: value for tag_, value in points.items() if tag_.startswith(f"{tag}/client/")} == {
            f"{tag}/client/{name}": value for name, value in known.items()
        }
        if known:
            assert points[f"{tag}/worst"] == worst(known.values())
            assert points[f"{tag}/gap"] == max(known.values()) - min(known.values())
            assert points[f"{tag}/mean"] == pytest.approx(math.fsum(known.values()) / len(known))
        else:
            assert not [name for name in points if name.startswith(f"{tag}/")]


def test_similarities_are_those_of_two_different_clients():
    points = round_points({"server_round": 1, "similarity": [[1.0, 0.5], [0.75, 1.0]], "clients": {}})
    assert points == {"similarity/mean": 0.625, "similarity/lowest": 0.5, "similarity/highest": 0.75}
    assert round_points({"server_round": 1, "similarity": [[1.0]], "clients": {}}) == {}


def test_a_client_that_only_validated_has_no_loss_and_what_it_spent_is_told():
    clients = {"0": {"samples": None, "loss": None, "epsilon": 1.5}, "1": {"samples": 0, "validation": {"loss": 2.0}}}
    points = round_points({"server_round": 3, "similarity": None, "clients": clients})
    assert points == {
        "validation/loss/client/1": 2.0, "validation/loss/mean": 2.0, "validation/loss/worst": 2.0,
        "validation/loss/gap": 0.0, "samples/client/1": 0.0, "samples/total": 0.0,
        "epsilon/client/0": 1.5, "epsilon/largest": 1.5,
    }  # fmt: skip


def test_the_final_points_are_all_figures_of_metrics_json_that_were_measured(finished):
    metrics = finished("evaluation.before=true").metrics
    points = final_points(metrics)
    for name, value in metrics["overall"].items():
        assert points[f"test/{name}/overall"] == value
        assert points[f"before/{name}/overall"] == metrics["before"]["overall"][name]
        assert points[f"test/{name}/gap"] == metrics["spread"][name]["gap"]
        for client, own in metrics["clients"].items():
            assert points[f"test/{name}/client/{client}"] == own[name]
    assert points["floors/popularity/ndcg@5"] == metrics["floors"]["popularity"]["ndcg@5"]
    assert points["run/cost/wire/bytes_up"] == metrics["cost"]["wire"]["bytes_up"]
    assert points["run/cost/client/train_flops"] == metrics["cost"]["client"]["train_flops"]
    assert "run/cost/client/peak_rss_bytes" not in points


def test_what_a_federation_does_not_measure_has_no_point():
    nothing = {"stored_bytes": None, "peak_rss_bytes": None}
    metrics = {
        "method": "pplr",
        "overall": {"mrr": 0.25},
        "clients": {"north": {"users": 3, "mrr": None}},
        "spread": {"mrr": {"worst": None, "best": None, "std": None, "gap": None}},
        "floors": {},
        "cost": {"client": nothing, "server": nothing, "wire": {"bytes_up": 7, "bytes_down": None}},
        "seconds": {"total": None, "train": 2.5, "evaluate": None},
        "samples_per_second": None,
    }
    assert final_points(metrics) == {
        "test/mrr/overall": 0.25,
        "test/users/client/north": 3.0,
        "run/cost/wire/bytes_up": 7.0,
        "run/seconds/train": 2.5,
    }


def test_a_round_and_the_end_of_a_run_have_no_tag_in_common(finished):
    run = finished("evaluation.before=true")
    assert not set(round_points(run.rounds[-1])) & set(final_points(run.metrics))


def test_a_path_goes_by_its_last_part():
    config = Config.model_validate({"data": {"path": "/home/alice/orders.csv", "columns": {"user": "who"}}})
    told = parameters(config)
    assert told["data.path"] == "orders.csv"
    assert told["data.columns.user"] == "who"
    assert told["cut.input_layers"] == "2"
    assert told["data.min_rating"] == "null"
    assert "alice" not in str(told)
