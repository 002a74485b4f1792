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


def test_the_measurement_runs_whole(tmp_path: Path, small_config: Callable[..., Config], model_folder: Path) -> None:
    settings = (f"backbone.model={model_folder}", "federation.rounds=1")
    own = small_config(*settings, "backbone.name=causal_lm")
    vectors = small_config(*settings, "backbone.name=item_vectors", "backbone.item_vectors.width=8")
    arguments = evaluating.make_parser().parse_args(
        ["--users", "6", "--slow-users", "4", "--turns", "2", "--tokens", "8", "--batch-size", "4"]
    )
    told = evaluating.measure(arguments, tmp_path / "run", own, vectors)
    assert {way: len(taken) for way, taken in told["seconds_per_user"].items()} == dict.fromkeys(
        ("one at a time", "l2", "trie", "item vectors"), 2
    )
    assert told["compared_users"] == len(told["written_tokens"]) == 4
    assert [row["at_least"] for row in told["rows"]] == [10, 10, 10]
    json.dumps(told)
