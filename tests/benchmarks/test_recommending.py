"""How long recommendations take, on small runs: each number is there, and the run that is loaded is bound."""

from __future__ import annotations

import json

import pytest

from benchmarks import recommending

KINDS = {
    "causal_lm": ("evaluation.grounding=trie",),
    "item_vectors": ("backbone.item_vectors.width=8",),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_a_run_is_measured_loaded_and_by_the_command(small_config, model_folder, tmp_path, name: str) -> None:
    own = (f"backbone.name={name}", f"backbone.model={model_folder}", "federation.rounds=1", *KINDS[name])
    (run,) = recommending.finished({"x": small_config(*own)}, [], tmp_path).values()
    told = recommending.measure(run, 2, 1)
    assert told["users"] == len(recommending.smallest(run)[1]) == 8
    assert told["warm_seconds"]["count"] == 2
    assert told["command_seconds"]["median"] > told["warm_seconds"]["median"] > 0
    assert told["all_users_per_second"] * told["all_seconds"] == pytest.approx(8)
    assert told["all_command_seconds"] > told["all_seconds"]
    assert ("beams" in told) == (name == "causal_lm")
    json.dumps(told)
    (again,) = recommending.finished({}, [run.folder], tmp_path).values()
    assert again.folder == run.folder


def test_a_command_that_fails_is_no_measurement(tmp_path) -> None:
    with pytest.raises(SystemExit, match="pplr recommend ended with"):
        recommending.command(tmp_path, "--user", "1")


def test_one_user_of_a_run_that_is_loaded_has_a_second() -> None:
    def way(seconds: float, **more: int) -> dict:
        spread = {"median": seconds, "lowest": seconds, "highest": seconds, "count": 3}
        numbers = dict.fromkeys(("all_users_per_second", "all_command_seconds", "all_command_users_per_second"), 1.0)
        return {"users": 8, "warm_seconds": spread, "command_seconds": spread, **numbers, **more}

    told = recommending.summed_up({"a": way(0.2), "b": way(1.5, beams=10)})
    assert [(row["ratio"], row["at_most"], row["met"]) for row in told["rows"]] == [(0.2, 1, True), (1.5, 1, False)]
    assert "b, 10 beams" in told["rows"][1]["name"]
    assert len(told["notes"]) == 6
