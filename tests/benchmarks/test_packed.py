"""Lists beside one target for each prompt, on a tiny model: what they are compared with."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks import packed
from pplr.config import Config


@pytest.fixture
def configs(small_config, model_folder) -> dict[str, Config]:
    own = (f"backbone.model={model_folder}", "backbone.name=causal_lm", "training.samples=null")
    return {name: small_config(*own, *settings) for name, settings in {**packed.BASES, **packed.LISTS}.items()}


def test_lists_hold_the_same_targets_in_fewer_tokens(configs) -> None:
    told = packed.measure(configs, 2, 2048)
    measured = told["measured"]
    padded, row = (measured[name] for name in packed.BASES)
    lists = measured["lists of 512 tokens"]
    assert padded["targets"] == row["targets"] == lists["targets"] > 0
    assert padded["tokens_per_target"] == row["tokens_per_target"] > lists["tokens_per_target"]
    assert row["places_per_token"] < 1 <= padded["places_per_token"]
    for own in measured.values():
        assert own["tokens_per_second"]["count"] == 2
        assert own["targets_per_second"]["median"] * own["tokens_per_target"] == pytest.approx(
            own["tokens_per_second"]["median"]
        )
    assert len(told["notes"]) == 4
    json.dumps(told)


@pytest.mark.parametrize("faster", list(packed.BASES))
def test_the_faster_way_of_one_target_is_bound(faster: str) -> None:
    def way(rate: float) -> dict[str, Any]:
        numbers = dict.fromkeys(("samples", "targets", "tokens_per_target", "places_per_token"), 1)
        return {name: {"median": rate} for name in ("targets_per_second", "supervised_tokens_per_second")} | numbers

    rates = {name: 4.0 if name == faster else 2.0 for name in packed.BASES}
    rates |= dict(zip(packed.LISTS, (36.0, 30.0), strict=True))
    bound, other, short = packed.summed_up({name: way(rate) for name, rate in rates.items()})["rows"]
    assert (bound["ratio"], bound["at_least"], bound["met"]) == (9, 10, False)
    assert faster in bound["against"]
    assert (other["ratio"], other["met"]) == (18, None)
    assert (short["ratio"], short["met"]) == (7.5, None)
