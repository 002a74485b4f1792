"""Training beside a busy program, at tiny size."""

from __future__ import annotations

import time
from contextlib import suppress
from types import SimpleNamespace

import pytest

from benchmarks import measuring, shared_cores


def test_steps_are_taken_and_timed(small_place: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "quickstart", small_place.quickstart)
    begun = time.perf_counter()
    rate = shared_cores.take_steps(3)
    assert rate >= 3 * shared_cores.SAMPLES / (time.perf_counter() - begun)


def test_company_is_busy_and_goes_whatever_happens() -> None:
    with shared_cores.busy_beside("alone") as other:
        assert other is None
    with suppress(InterruptedError), shared_cores.busy_beside("in company") as other:
        assert other is not None
        assert other.poll() is None
        raise InterruptedError
    assert other is not None
    assert other.poll() is not None


def test_rows_are_ratios_of_medians() -> None:
    rates = {"briefly": (4.0, 3.0), "by default": (5.0, 0.5), "not at all": (2.0, 2.5)}
    told = {}
    for way, (alone, crowded) in rates.items():
        told[way, "alone"] = [alone, 0.1, 99.0]
        told[way, "in company"] = [crowded]
    found = shared_cores.summed_up(told)
    assert [(row["ratio"], row["met"]) for row in found["rows"]] == [(0.8, None), (2.0, None), (6.0, None), (1.2, None)]
    assert ["busy" in row["name"] for row in found["rows"]] == [False, False, True, True]
    assert found["notes"][0] == "briefly: 4.00 samples/s alone, 3.00 beside a busy program"
