"""Evaluating one user at a time against batches, at tiny size."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks import evaluating
from benchmarks.reference.one_at_a_time import OneAtATime
from pplr.backbones.causal_lm import CausalLM
from pplr.config import AdapterConfig, Config, EvaluationConfig, TrainingConfig
from pplr.data.prompts import Case
from pplr.recommend.generative import GenerativeRanker, TitleSpace
from pplr.stages.cut import CutPlan
from pplr.stages.model import CutModel
from pplr.testing import random_adapter, tiny_catalog, tiny_decoder, tiny_tokenizer

CASES = [Case(0, (0, 1), (2,), (0, 1)), Case(1, (5,), (3,), (5, 4)), Case(2, (7, 2, 3, 1, 0), (4,), (7, 2, 3, 1, 0))]


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PPLR_CACHE", str(tmp_path / "cache"))


def test_one_user_at_a_time_ranks_as_a_batch_does() -> None:
    catalog, adapter = tiny_catalog(), AdapterConfig(rank=4)
    first, second = (CausalLM(tiny_decoder(), tiny_tokenizer(), max_tokens=512) for _ in range(2))
    cut = CutModel(first, CutPlan(1, 1, 4), adapter, TrainingConfig())
    state = random_adapter(cut.shapes)
    model = cut.client("one", state)
    space = TitleSpace.build(model, catalog)
    ranker = GenerativeRanker(model, space, EvaluationConfig(beams=3, max_new_tokens=6), history_items=4)
    usual = OneAtATime(second, adapter, state, beams=3, max_new_tokens=6)
    titles = usual.titles(catalog)
    np.testing.assert_allclose(titles, space.embeddings[space.title_of], rtol=1e-4, atol=1e-5)
    slow = np.stack([usual.scores(case, titles, catalog, 4) for case in CASES])
    np.testing.assert_allclose(ranker.scores(CASES), slow, rtol=1e-4, atol=1e-5)
    assert len(np.unique(slow)) > 14
    assert evaluating._same_lists(slow, slow.copy(), CASES) == 3
    assert evaluating._same_lists(slow, -slow, CASES) == 0


def ranked(*places: int) -> np.ndarray:
    """Scores of 20 items for each case, its target at a place from 1 among those that are not seen."""
    rows = []
    for case, place in zip(CASES, places, strict=True):
        others = [item for item in range(20) if item not in (*case.seen, *case.targets)]
        order = [*others[: place - 1], *case.targets, *others[place - 1 :], *case.seen]
        row = np.empty(20, dtype=np.float32)
        row[order] = np.arange(20, 0, -1)
        rows.append(row)
    return np.stack(rows)


def test_ways_of_other_quality_or_other_lists_are_refused() -> None:
    same, quality = evaluating.check_quality(ranked(1, 12, 12), ranked(1, 12, 12), CASES)
    assert same == 3
    assert quality["l2"] == quality["one at a time"] == pytest.approx(1 / 3)
    with pytest.raises(SystemExit, match="do not rank alike"):  # one list of three is another, and its target is lost
        evaluating.check_quality(ranked(1, 12, 12), ranked(12, 12, 12), CASES)
    other = ranked(12, 12, 12)
    other[:2, :] = -other[:2, :]
    with pytest.raises(SystemExit, match="same for 1 of 3 users"):
        evaluating.check_quality(ranked(12, 12, 12), other, CASES)


def test_users_are_ranked_until_a_target_is_found_and_those_who_have_one_are_compared() -> None:
    scores = ranked(12, 12, 3)

    class Known:
        def scores(self, cases):
            return np.stack([scores[CASES.index(case)] for case in cases])

    assert evaluating.measured_users(Known(), CASES, 3, 2) == (CASES, [2])
    assert evaluating.measured_users(Known(), CASES, 2, 2) == (CASES[2:], [0])
    with pytest.raises(SystemExit, match="no target of 2 users, so there is no quality to compare"):
        evaluating.measured_users(Known(), CASES[:2], 1, 1)
    assert evaluating.compared_users([2], 3, 1) == [2]
    assert evaluating.compared_users([2], 3, 2) == [0, 2]
    assert evaluating.compared_users([0, 1, 2], 3, 2) == [0, 1]


def test_the_measurement_runs_whole(tmp_path: Path, small_config: Callable[..., Config], model_folder: Path) -> None:
    settings = (f"backbone.model={model_folder}", "federation.rounds=1")
    own = small_config(*settings, "backbone.name=causal_lm")
    vectors = small_config(*settings, "backbone.name=item_vectors", "backbone.item_vectors.width=8")
    arguments = evaluating.make_parser().parse_args(
        ["--users", "6", "--slow-users", "5", "--turns", "2", "--tokens", "8", "--batch-size", "4"]
    )
    told = evaluating.measure(arguments, tmp_path / "run", own, vectors)
    assert {way: len(taken) for way, taken in told["seconds_per_user"].items()} == dict.fromkeys(
        ("one at a time", "l2", "trie", "item vectors"), 2
    )
    assert told["compared_users"] == len(told["written_tokens"]) == told["same_first_ten"] == 5
    assert told["ndcg@10"]["l2"] == told["ndcg@10"]["one at a time"] > 0
    assert [row["at_least"] for row in told["rows"]] == [10, None, None]
    assert [row["met"] is None for row in told["rows"]] == [False, True, True]
    written = f"8 new tokens at most, {np.mean(told['written_tokens']):.0f} written on average"
    assert all(written in row["against"] for row in told["rows"])
    json.dumps(told)
