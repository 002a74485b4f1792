"""Client and server at work at the same time, at tiny size: what clients together are compared with."""

from __future__ import annotations

import json

import pytest

from benchmarks import overlap


@pytest.fixture
def place(small_place, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(overlap, "quickstart", small_place.quickstart)
    return small_place.place


@pytest.mark.slow
def test_clients_train_together_each_by_itself_and_alone(place) -> None:
    told = overlap.clients(place, 2, [1, 2], 0.3, 1)
    assert list(told["clients"]) == ["1", "2"]
    assert all(len(rate) == 1 and rate[0] > 0 for own in told["clients"].values() for rate in own.values())
    assert 1 <= told["clients_of_a_pass"] <= 2
    assert len(told["rows"]) == 4
    json.dumps(told)


@pytest.mark.slow
def test_micro_batches_in_flight_are_compared_with_the_uncut_model(place) -> None:
    told = overlap.in_flight(place, 4, 2, 1)
    (row,) = told["rows"]
    assert (row["at_least"], row["met"]) == (0.95, row["ratio"] >= 0.95)
    assert any("2 in flight" in name for name in told["seconds"])


def test_a_pass_of_several_is_timed_beside_one_after_another(small_place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "quickstart", small_place.quickstart)
    told = overlap.ceiling(2, [1], 1)
    assert [own["dtype"] for own in told["passes"]] == ["float32", "bfloat16"]
    assert all(own["ratio"] > 0 for own in told["passes"])


def test_one_at_a_time_is_bound_and_each_by_itself_stands_beside() -> None:
    def rates(alone: float, apart: float, together: float) -> dict[str, list[float]]:
        return {"alone": [alone], "each by itself": [apart], "together": [together]}

    told = overlap.compared({4: rates(2, 2.5, 3), 8: rates(2, 3, 3)}, 4.2, 5)
    assert [row["ratio"] for row in told["rows"]] == pytest.approx([1.5, 1.2, 1.5, 1.0])
    assert [row["at_least"] for row in told["rows"]] == [1.3, None, None, None]
    assert [row["met"] for row in told["rows"]] == [True, None, None, None]
    assert told["rows"][0]["against"] == "one client at a time"
    assert "each by itself" in told["rows"][1]["against"]
    assert "batches of 4" in told["rows"][0]["name"]
    assert "batches of 8" in told["rows"][2]["name"]
