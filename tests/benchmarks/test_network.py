"""Across TLS on loopback, with processes, at tiny size: what is measured, and that each part has its row."""

from __future__ import annotations

import json

import pytest

from benchmarks import network

pytestmark = pytest.mark.slow


@pytest.fixture
def place(small_place, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(network, "quickstart", small_place.quickstart)
    return small_place.place


def test_a_step_is_divided_into_what_it_is_made_of(place) -> None:
    told = network.training(place, 4, 2)
    assert {name: len(own) for name, own in told["samples_per_second"].items()} == {"across": 2, "uncut": 2}
    assert set(told["seconds_per_step"]) == {"encode", "decode", "server", "wire"}
    assert all(own > 0 for own in told["seconds_per_step"].values())
    assert told["row"]["at_least"] == 0.9
    json.dumps(told)


def test_clients_at_once_are_compared_with_one_alone(place) -> None:
    told = network.at_once(place, 2, 1, 0.2, 1)
    alone, together = told["samples_per_second"].values()
    assert told["row"]["ratio"] == pytest.approx(together[0] / alone[0])
    assert told["peak_bytes_of_all"] > 0


def test_titles_written_across_are_those_of_the_whole_model(place) -> None:
    told = network.generation(place, 3, 2, 4, 1)
    assert told["answers_same_as_hf"] == {"across": 3, "uncut": 3}
    assert [row["at_most"] for row in told["rows"]] == [1.3, 1.3]
