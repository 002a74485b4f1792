"""Evaluation: who is counted where, and what two runs differ by."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pplr.data.prompts import Case
from pplr.errors import ConfigError, DataError
from pplr.recommend.evaluation import Evaluation, Ranker, evaluate, merge, metric_value, paired_bootstrap
from pplr.recommend.metrics import ranking_metrics, target_ranks

ITEMS = 20


class Constant:
    """Gives everyone the same scores and remembers how many were asked for at once."""

    def __init__(self, scores):
        self.row = np.asarray(scores, dtype=np.float32)
        self.batches = []

    def scores(self, cases):
        self.batches.append([case.user for case in cases])
        return np.repeat(self.row[None], len(cases), axis=0)


def draw_cases(first, count, seed):
    draw = np.random.default_rng(seed)
    drawn = (draw.permutation(ITEMS).tolist() for _ in range(count))
    return [
        Case(user=first + user, history=tuple(p[3:6]), targets=tuple(p[: 1 + user % 3]), seen=tuple(p[3:8]))
        for user, p in enumerate(drawn)
    ]


@pytest.fixture
def cases():
    return {"north": draw_cases(0, 5, 1), "empty": [], "south": draw_cases(100, 4, 2)}


def test_each_client_is_ranked_by_its_own_ranker(cases):
    up, down = Constant(range(ITEMS)), Constant(range(ITEMS, 0, -1))
    assert isinstance(up, Ranker)
    steps = []
    told = evaluate({"north": up, "south": down, "empty": up}, cases, [3, 5], 2, progress=steps.append)
    assert up.batches == [[0, 1], [2, 3], [4]]
    assert down.batches == [[100, 101], [102, 103]]
    assert steps == [2, 2, 1, 2, 2]
    assert told.users.tolist() == [0, 1, 2, 3, 4, 100, 101, 102, 103]
    assert told.client_of == ("north",) * 5 + ("south",) * 4
    expected = [
        ranking_metrics(target_ranks(ranker.row, case.targets, case.seen), [3, 5])
        for client, ranker in (("north", up), ("south", down))
        for case in cases[client]
    ]
    for metric, column in told.values.items():
        assert column.tolist() == [user[metric] for user in expected]
    assert told.overall()["mrr"] == pytest.approx(np.mean([user["mrr"] for user in expected]))
    by_client = told.by_client()
    assert list(by_client) == ["north", "empty", "south"]
    assert next(iter(by_client["south"])) == "users"
    assert by_client["south"]["users"] == 4
    assert by_client["south"]["mrr"] == pytest.approx(np.mean([user["mrr"] for user in expected[5:]]))
    assert by_client["empty"] == {"users": 0, **dict.fromkeys(told.values)}
    gap = abs(by_client["north"]["ndcg@5"] - by_client["south"]["ndcg@5"])
    assert told.spread(["ndcg@5"])["ndcg@5"]["gap"] == pytest.approx(gap)
    assert list(told.spread()) == list(told.values)


def test_the_batch_size_changes_nothing(cases):
    one, many = (evaluate(Constant(range(ITEMS)), cases, [10], size) for size in (1, 50))
    assert one.to_dict() == many.to_dict()


def test_no_user_at_all_is_none():
    told = evaluate(Constant(range(ITEMS)), {"a": []}, [10], 4)
    assert told.overall() == {"recall@10": None, "ndcg@10": None, "hit@10": None, "mrr": None}
    assert told.spread(["mrr"]) == {"mrr": {"worst": None, "best": None, "std": None, "gap": None}}
    assert metric_value(told, "mrr") is None


def test_clients_tested_apart_merge_to_all_tested_together(cases):
    ranker = Constant(range(ITEMS))
    together = evaluate(ranker, cases, [4], 3)
    apart = merge(evaluate(ranker, {client: own}, [4], 3) for client, own in cases.items())
    assert apart.to_dict() == together.to_dict()
    with pytest.raises(DataError, match="twice"):
        merge([together, apart])
    with pytest.raises(DataError, match="different metrics"):
        merge(
            [evaluate(ranker, {"north": cases["north"]}, [5], 3), evaluate(ranker, {"south": cases["south"]}, [4], 3)]
        )
    with pytest.raises(DataError, match="no evaluation"):
        merge([])


def test_it_comes_back_from_json(cases):
    told = evaluate(Constant(range(ITEMS)), cases, [4], 3)
    back = Evaluation.from_dict(json.loads(json.dumps(told.to_dict(), allow_nan=False)))
    assert back.by_client() == told.by_client()
    assert back.users.dtype == told.users.dtype
    for broken in ({}, {**told.to_dict(), "users": ["x"]}, {**told.to_dict(), "values": 3}):
        with pytest.raises(DataError, match="no stored evaluation"):
            Evaluation.from_dict(broken)
    with pytest.raises(DataError, match="not one for each"):
        Evaluation.from_dict({**told.to_dict(), "users": [1]})


def test_a_metric_is_found_or_its_nearest_is_named(cases):
    told = evaluate(Constant(range(ITEMS)), cases, [4], 3)
    value = told.overall()["ndcg@4"]
    assert metric_value(told, "ndcg@4") == value
    assert metric_value(told.overall(), "ndcg@4") == value
    assert metric_value({"overall": told.overall(), "method": "pplr"}, "ndcg@4") == value
    for ask in (lambda: metric_value(told, "ndgc@4"), lambda: told.spread(["ndgc@4"])):
        with pytest.raises(ConfigError, match="'ndcg@4'"):
            ask()


def test_what_cannot_be_evaluated_is_refused(cases):
    ranker = Constant(range(ITEMS))
    with pytest.raises(DataError, match=r"'south'"):
        evaluate({"north": ranker, "empty": ranker, "sout": ranker}, cases, [4], 3)
    with pytest.raises(ConfigError, match="batch"):
        evaluate(ranker, cases, [4], 0)
    with pytest.raises(ConfigError, match="cutoff"):
        evaluate(ranker, cases, [0], 3)
    with pytest.raises(DataError, match="NaN"):
        evaluate(Constant([np.nan] * ITEMS), cases, [4], 3)
    with pytest.raises(DataError, match="twice"):
        evaluate(ranker, {"a": cases["north"], "b": cases["north"]}, [4], 3)


def of_users(users, values):
    return Evaluation(np.array(users), ("c",) * len(users), {"mrr": np.array(values, dtype=np.float64)})


def test_bootstrap_pairs_by_user_and_not_by_place():
    draw = np.random.default_rng(3)
    hard = draw.uniform(size=200)
    a = of_users(list(range(200)), hard + 0.1)
    order = draw.permutation(200)
    b = of_users([*order.tolist(), 999], [*hard[order], 50.0])
    difference, low, high, p = paired_bootstrap(a, b, "mrr", samples=999, seed=1)
    # paired, the difference is 0.1 for every user; unpaired, it would drown in the users' differences
    assert (difference, low, high) == pytest.approx((0.1, 0.1, 0.1))
    assert p == pytest.approx(2 / 1000)


def test_bootstrap_is_symmetric_seeded_and_covers_the_normal_interval():
    draw = np.random.default_rng(4)
    d = draw.normal(0.05, 1.0, size=400)
    a, b = of_users(list(range(400)), d), of_users(list(range(400)), np.zeros(400))
    told = paired_bootstrap(a, b, "mrr", samples=4000, seed=7)
    assert told == paired_bootstrap(a, b, "mrr", samples=4000, seed=7)
    turned = paired_bootstrap(b, a, "mrr", samples=4000, seed=7)
    assert turned == pytest.approx((-told[0], -told[2], -told[1], told[3]))
    half = 1.96 * d.std() / 20
    assert told[:3] == pytest.approx((d.mean(), d.mean() - half, d.mean() + half), abs=0.015)
    assert paired_bootstrap(a, a, "mrr", samples=100) == (0.0, 0.0, 0.0, 1.0)


def test_bootstrap_says_what_it_cannot_compare():
    a, b = of_users([1, 2], [0.0, 1.0]), of_users([3], [0.0])
    with pytest.raises(DataError, match="share no user"):
        paired_bootstrap(a, b, "mrr")
    with pytest.raises(ConfigError, match="not measured"):
        paired_bootstrap(a, a, "ndcg@10")
    with pytest.raises(ConfigError, match="samples"):
        paired_bootstrap(a, a, "mrr", samples=0)


class _Sized:
    """Scores by the user's number, tells sizes, and notes its batches."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def sizes(self, cases):
        return [len(case.history) for case in cases]

    def scores(self, cases):
        self.batches.append([case.user for case in cases])
        return np.array([np.roll(np.arange(6, dtype=np.float32), case.user) for case in cases])


def test_cases_of_like_size_share_a_batch_and_keep_their_order():
    cases = [Case(user, (0,) * length, (user % 6,), ()) for user, length in enumerate((5, 1, 4, 2, 3))]
    sized = _Sized()
    found = evaluate(sized, {"a": cases}, [1, 3], 2)
    assert sized.batches == [[1, 3], [4, 2], [0]]
    plain = evaluate(_Plain(), {"a": cases}, [1, 3], 2)
    assert found.users.tolist() == [0, 1, 2, 3, 4]
    assert found.to_dict() == plain.to_dict()


class _Plain:
    def scores(self, cases):
        return _Sized().scores(cases)
