"""Ranks and metrics against slow truths and against torchmetrics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.retrieval import (
    retrieval_hit_rate,
    retrieval_normalized_dcg,
    retrieval_recall,
    retrieval_reciprocal_rank,
)

from pplr.data.prompts import Case
from pplr.errors import ConfigError, DataError
from pplr.recommend.metrics import batch_ranks, ranking_metrics, spread, summarise, target_ranks


def naive_ranks(scores, targets, seen):
    """Sort the whole list in Python: by score, other items before targets, targets as given, masked ones last."""
    worth = {item: -math.inf if item in seen and item in targets else score for item, score in enumerate(scores)}
    listed = [item for item in worth if item in targets or item not in seen]
    listed.sort(key=lambda item: (-worth[item], targets.index(item) if item in targets else -1))
    return [1 + listed.index(target) for target in targets]


few_scores = st.sampled_from([-math.inf, -1.0, 0.0, 0.5, 2.0, math.inf])


@st.composite
def batches(draw):
    item_count = draw(st.integers(1, 12))
    items = st.integers(0, item_count - 1)
    rows = draw(st.lists(st.lists(few_scores, min_size=item_count, max_size=item_count), min_size=1, max_size=4))
    cases = [
        Case(
            user=user,
            history=(),
            targets=tuple(draw(st.lists(items, unique=True, max_size=5))),
            seen=tuple(draw(st.lists(items, max_size=8))),
        )
        for user in range(len(rows))
    ]
    return np.array(rows, dtype=np.float32), cases


@given(batches())
def test_ranks_equal_a_sorted_list(batch):
    scores, cases = batch
    together = batch_ranks(scores, cases)
    for row, case, ranks in zip(scores, cases, together, strict=True):
        assert ranks.dtype == np.int64
        assert ranks.tolist() == naive_ranks(row.tolist(), list(case.targets), set(case.seen))
        assert ranks.tolist() == target_ranks(row, case.targets, case.seen).tolist()


def test_a_constant_model_ranks_its_target_last():
    assert target_ranks(np.zeros(50), [7], seen=[1, 2]).tolist() == [48]


def test_a_seen_target_is_never_recommended():
    assert target_ranks(np.array([9.0, 1.0, -np.inf, 0.0]), [0], seen=[0, 1]).tolist() == [3]


def test_integer_scores_rank_as_they_are():
    assert target_ranks(np.array([3, 1, 2]), [2], seen=[]).tolist() == [2]


@pytest.mark.parametrize(
    ("scores", "targets", "seen", "says"),
    [
        ([0.0, math.nan], [0], [], "NaN"),
        ([0.0, 1.0], [2], [], "item 2"),
        ([0.0, 1.0], [-1], [], "item -1"),
        ([0.0, 1.0], [0], [5], "item 5"),
        ([0.0, 1.0], [1, 1], [], "twice"),
    ],
)
def test_what_cannot_be_ranked_is_refused(scores, targets, seen, says):
    with pytest.raises(DataError, match=says):
        target_ranks(np.array(scores), targets, seen)


def test_scores_and_cases_must_match():
    with pytest.raises(DataError, match=r"shape \(2, 3\)"):
        batch_ranks(np.zeros((2, 3)), [Case(user=0, history=(), targets=(0,), seen=())])


@settings(max_examples=60)
@given(st.data(), st.integers(1, 30), st.integers(0, 2**31))
def test_metrics_equal_torchmetrics(data, item_count, seed):
    # torchmetrics has no pessimistic ties and skips scores of 0 and less, so the scores are drawn without any
    scores = np.random.default_rng(seed).permutation(item_count).astype(np.float32) + 1
    items = st.integers(0, item_count - 1)
    targets = data.draw(st.lists(items, min_size=1, max_size=8, unique=True))
    seen = data.draw(st.lists(items.filter(lambda item: item not in targets), unique=True)) if item_count > 8 else []
    cutoff = data.draw(st.integers(1, item_count - len(seen)))
    kept = np.setdiff1d(np.arange(item_count), seen)
    preds, relevant = torch.tensor(scores[kept]), torch.tensor(np.isin(kept, targets))
    measured = ranking_metrics(target_ranks(scores, targets, seen), [cutoff])
    assert measured == pytest.approx(
        {
            f"recall@{cutoff}": float(retrieval_recall(preds, relevant, top_k=cutoff)),
            f"ndcg@{cutoff}": float(retrieval_normalized_dcg(preds, relevant, top_k=cutoff)),
            f"hit@{cutoff}": float(retrieval_hit_rate(preds, relevant, top_k=cutoff)),
            "mrr": float(retrieval_reciprocal_rank(preds, relevant)),
        },
        abs=1e-6,
    )


def test_metrics_come_in_the_order_of_the_cutoffs():
    assert list(ranking_metrics([1], [20, 5])) == [
        "recall@20", "ndcg@20", "hit@20", "recall@5", "ndcg@5", "hit@5", "mrr",
    ]  # fmt: skip


@given(st.lists(st.integers(1, 60), min_size=1, max_size=10, unique=True), st.integers(1, 50))
def test_metrics_never_leave_their_range_and_grow_with_k(ranks, cutoff):
    values = ranking_metrics(ranks, [cutoff, cutoff + 1])
    assert all(0 <= value <= 1 for value in values.values())
    assert values[f"recall@{cutoff}"] <= values[f"recall@{cutoff + 1}"]
    assert values[f"hit@{cutoff}"] <= values[f"hit@{cutoff + 1}"]
    perfect = ranking_metrics(range(1, len(ranks) + 1), [cutoff])
    assert perfect[f"ndcg@{cutoff}"] == pytest.approx(1)


def test_no_target_and_no_list_are_refused():
    with pytest.raises(DataError, match="without a target"):
        ranking_metrics([], [10])
    for cutoff in (0, -3, 2.5):
        with pytest.raises(ConfigError, match="cutoff"):
            ranking_metrics([1], [cutoff])


def test_no_user_and_no_client_are_not_zero():
    assert summarise({"mrr": np.array([])}) == {"mrr": None}
    assert spread({}) == spread({"a": None}) == {"worst": None, "best": None, "std": None, "gap": None}


def test_spread_of_three_clients():
    told = spread({"a": 0.1, "b": 0.4, "c": 0.7, "empty": None})
    assert told == pytest.approx({"worst": 0.1, "best": 0.7, "std": math.sqrt(0.06), "gap": 0.6})
