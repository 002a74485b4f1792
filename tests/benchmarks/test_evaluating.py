"""Evaluating one user at a time against batches, at tiny size."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks import evaluating
from benchmarks.reference.one_at_a_time import OneAtATime
from pplr.backbones.adapters import load_adapter
from pplr.backbones.causal_lm import CausalLM
from pplr.config import AdapterConfig, Config, EvaluationConfig, TrainingConfig
from pplr.data.prompts import Case
from pplr.recommend.generative import GenerativeRanker, TitleSpace
from pplr.runtimes.in_process import train
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
    assert evaluating._in_common(slow, slow.copy(), CASES) == 1


def test_the_usual_way_stops_where_it_is_told_to() -> None:
    adapter, catalog = AdapterConfig(rank=4), tiny_catalog()
    backbone = CausalLM(tiny_decoder(), tiny_tokenizer(), max_tokens=512)
    state = random_adapter(CutModel(backbone, CutPlan(1, 1, 4), adapter, TrainingConfig()).shapes)
    usual = OneAtATime(backbone, adapter, state, beams=1, max_new_tokens=6)
    titles = usual.titles(catalog)
    for vocabulary, written in (([], [6]), (range(backbone.model.config.vocab_size), [1])):
        one = usual.stopping_at(list(vocabulary))
        one.scores(CASES[0], titles, catalog, 4)
        assert one.written == written
    assert usual.written == []


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
    def check(ours: np.ndarray, stopped: np.ndarray, slow: np.ndarray) -> tuple[dict[str, float], dict[str, float]]:
        return evaluating.check_quality(ours, {evaluating.SLOW: slow, evaluating.STOPPED: stopped}, CASES)

    other = ranked(12, 12, 12)
    other[:2, :] = -other[:2, :]
    common, quality = check(ranked(1, 12, 12), ranked(1, 12, 12), other)  # nothing is asked of the other
    assert common[evaluating.STOPPED] == 1 > common[evaluating.SLOW]
    assert quality["l2"] == quality[evaluating.STOPPED] == pytest.approx(1 / 3)
    with pytest.raises(SystemExit, match="do not rank alike"):  # one target is lost
        check(ranked(1, 12, 12), ranked(12, 12, 12), ranked(1, 12, 12))
    with pytest.raises(SystemExit, match=r"[45]\d% of the first ten items are in common over 3 users"):
        check(ranked(12, 12, 12), other, ranked(12, 12, 12))


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
        (evaluating.SLOW, evaluating.STOPPED, "l2", "trie", "item vectors"), 2
    )
    slow = told["written_tokens"][evaluating.SLOW]
    assert told["compared_users"] == len(slow) == len(told["written_tokens"][evaluating.STOPPED]) == 5
    assert told["first_ten_in_common"][evaluating.STOPPED] == 1
    assert told["exact_users"] == 5
    assert any("in float32 the first ten items of 5 of these users are the same" in note for note in told["notes"])
    assert told["ndcg@10"]["l2"] == told["ndcg@10"][evaluating.STOPPED] > 0
    assert [row["at_least"] for row in told["rows"]] == [10, None, None, None, None]
    assert [row["met"] is None for row in told["rows"]] == [False, True, True, True, True]
    written = f"8 new tokens at most, {np.mean(slow):.0f} written on average"
    assert [written in row["against"] for row in told["rows"]] == [True, False, True, False, True]
    assert all("stopped where" in told["rows"][row]["against"] for row in (1, 3))
    json.dumps(told)


def test_other_lists_in_float32_are_refused(
    tmp_path: Path, small_config: Callable[..., Config], model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("backbone.name=causal_lm", f"backbone.model={model_folder}", "federation.rounds=1")
    run = train(small_config(*settings), tmp_path / "run")
    state, data = load_adapter(run.folder / "clients" / "0"), run.assembly().data
    cases = data.test["0"][:2]
    narrow = run.config.backbone.model_copy(update={"dtype": "bfloat16"})
    config = run.config.model_copy(update={"backbone": narrow})
    evaluating.check_lists(config, "0", state, cases, 8)
    usual = OneAtATime.scores
    monkeypatch.setattr(OneAtATime, "scores", lambda *arguments: -usual(*arguments))
    with pytest.raises(SystemExit, match="in float32 2 of 2 users have other first ten items"):
        evaluating.check_lists(config, "0", state, cases, 8)
