"""Ways that train for the same time, at tiny size: what is charged, and what is told where one finds nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import equal_time
from pplr.storage import cache_dir

WRITES = ("backbone.name=causal_lm", "training.shared_prefix=true", "evaluation.grounding=trie")
VECTORS = ("backbone.name=item_vectors", "backbone.item_vectors.width=8")
POOLED = ("federation.method=centralized", "training.samples=null", "evaluation.cutoffs=[10]", "cut=null")


def told(*values: float) -> list[dict[str, float]]:
    return [{"ndcg@10": value, "prepare_seconds": 1.0, "users": 6} for value in values]


@pytest.fixture
def let_pass(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A clock that moves by a second whenever it is read, and by more where something takes its time."""
    now = [0.0]

    def let_pass(seconds: float) -> None:
        now[0] += seconds

    def read() -> float:
        let_pass(1)
        return now[0]

    monkeypatch.setattr(equal_time, "time", SimpleNamespace(perf_counter=read))
    return let_pass


@pytest.mark.parametrize("own", [WRITES, VECTORS], ids=["prompts", "item vectors"])
def test_a_way_trains_until_the_time_is_up(small_config, model_folder, let_pass, own) -> None:
    found = equal_time.measure(small_config(*POOLED, *own, f"backbone.model={model_folder}"), 5)
    assert (found["prepare_seconds"], found["steps"]) == (1, 2)  # it is read before each epoch and before each step
    assert found["supervised"] > found["users"] == 6
    assert 0 <= found["ndcg@10"] <= 1
    json.dumps(found)


def test_what_comes_before_training_is_part_of_the_time(small_config, model_folder, let_pass, monkeypatch) -> None:
    right = equal_time.load_backbone

    def slow(config):
        let_pass(5)
        return right(config)

    monkeypatch.setattr(equal_time, "load_backbone", slow)
    found = equal_time.measure(small_config(*POOLED, *VECTORS, f"backbone.model={model_folder}"), 5)
    assert (found["prepare_seconds"], found["steps"]) == (6, 0)


def test_what_an_earlier_run_computed_is_not_there_and_what_was_fetched_is(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PPLR_CACHE", str(tmp_path))
    for folder in ("models", "title_embeddings"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a file").write_text("there")
    with equal_time.nothing_computed():
        assert cache_dir() != tmp_path
        assert (cache_dir() / "models" / "a file").read_text() == "there"
        assert not (cache_dir() / "title_embeddings").exists()
    assert cache_dir() == tmp_path
    assert (tmp_path / "models" / "a file").exists()


def test_one_target_a_prompt_is_measured_in_its_faster_way() -> None:
    assert equal_time.configure(equal_time.BASE, 0, 1).training.shared_prefix


def test_the_median_of_the_seeds_is_bound() -> None:
    found = equal_time.summed_up(
        {equal_time.OURS: told(0.08, 0.04, 0.01), equal_time.BASE: told(0.01, 0.01, 0.01)}, [0, 1, 2], 60
    )
    (row,) = found["rows"]
    assert row["ratio"] == pytest.approx(4)  # and not the ratio of the means, 4.33
    assert row["at_least"] == 3
    assert row["met"] is True
    assert any("ratio 8.00, 4.00, 1.00; difference +0.0700, +0.0300, +0.0000" in note for note in found["notes"])


def test_a_base_that_finds_nothing_gives_a_row_without_a_ratio_and_the_reason() -> None:
    found = equal_time.summed_up(
        {equal_time.OURS: told(0.08, 0.04, 0.01), equal_time.BASE: told(0.0, 0.0, 0.01)}, [0, 1, 2], 60
    )
    (row,) = found["rows"]
    assert row["ratio"] is row["met"] is None
    assert row["at_least"] == 3
    assert "has NDCG@10 0 with 2 of 3 seeds" in row["reason"]
    assert any("difference +0.0800, +0.0400, +0.0000" in note for note in found["notes"])
    json.dumps(found, allow_nan=False)


def test_one_seed_of_three_without_a_ratio_leaves_the_median() -> None:
    found = equal_time.summed_up(
        {equal_time.OURS: told(0.08, 0.04, 0.01), equal_time.BASE: told(0.0, 0.01, 0.01)}, [0, 1, 2], 60
    )
    assert found["rows"][0]["ratio"] == pytest.approx(4)
