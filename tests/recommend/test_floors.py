"""Floors: what they learn from, what they rank from, and that they repeat."""

from __future__ import annotations

import numpy as np
import pytest
from threadpoolctl import threadpool_info

from pplr.data.holdout import Holdout
from pplr.data.prompts import Case
from pplr.errors import ConfigError, DataError
from pplr.recommend.evaluation import Ranker, evaluate
from pplr.recommend.floors import fit_floor, floor_names

ITEMS = 40


def make_holdout(train, validation=None, test=None):
    def arrays(rows):
        return tuple(np.array(row, dtype=np.int32) for row in rows)

    nothing = [[] for _ in train]
    parts = (arrays(rows) for rows in (train, validation or nothing, test or nothing))
    return Holdout(*parts, kind="leave_one_out")


@pytest.fixture(scope="module")
def two_tastes():
    """60 users who take eight even or eight odd items each; their next item is of the same kind."""
    draw = np.random.default_rng(0)
    rows = [draw.choice(np.arange(user % 2, ITEMS, 2), size=10, replace=False).tolist() for user in range(60)]
    holdout = make_holdout([row[:8] for row in rows], [row[8:9] for row in rows], [row[9:] for row in rows])
    cases = [
        Case(user=user, history=tuple(row[7:9]), targets=(row[9],), seen=tuple(row[:9]))
        for user, row in enumerate(rows)
    ]
    return holdout, cases


@pytest.mark.parametrize("name", ["popularity", "item_knn", "als"])
class TestEveryFloor:
    def test_it_ranks_the_full_catalog(self, name, two_tastes):
        holdout, cases = two_tastes
        floor = fit_floor(name, holdout, ITEMS, seed=0)
        assert isinstance(floor, Ranker)
        scores = floor.scores(cases)
        assert scores.shape == (60, ITEMS)
        assert scores.dtype == np.float32
        assert np.isfinite(scores).all()

    def test_it_is_fitted_on_training_alone(self, name, two_tastes):
        holdout, cases = two_tastes
        other = make_holdout(holdout.train, holdout.test, holdout.validation)
        scores = [fit_floor(name, one, ITEMS, seed=0).scores(cases) for one in (holdout, other)]
        assert np.array_equal(*scores)

    def test_it_repeats_and_leaves_the_threads_as_they_were(self, name, two_tastes):
        holdout, cases = two_tastes
        threads = [pool["num_threads"] for pool in threadpool_info()]
        first, second = (fit_floor(name, holdout, ITEMS, seed=3).scores(cases) for _ in range(2))
        assert np.array_equal(first, second)
        assert [pool["num_threads"] for pool in threadpool_info()] == threads

    def test_it_ranks_from_the_whole_past_and_not_from_the_prompt(self, name, two_tastes):
        holdout, cases = two_tastes
        floor = fit_floor(name, holdout, ITEMS, seed=0)
        full = floor.scores(cases[:1])
        cut = Case(user=0, history=(), targets=cases[0].targets, seen=cases[0].seen)
        assert np.array_equal(floor.scores([cut]), full)

    def test_a_user_does_not_depend_on_the_batch(self, name, two_tastes):
        holdout, cases = two_tastes
        floor = fit_floor(name, holdout, ITEMS, seed=0)
        alone = np.concatenate([floor.scores([case]) for case in cases[:5]])
        np.testing.assert_allclose(floor.scores(cases)[:5], alone, rtol=1e-5, atol=1e-6)

    def test_a_user_without_a_past_and_an_item_that_nobody_took(self, name):
        floor = fit_floor(name, make_holdout([[0, 1], [1, 2], [1]]), 5, seed=0)
        scores = floor.scores([Case(user=9, history=(), targets=(0,), seen=())])
        assert np.isfinite(scores).all()
        assert scores[0, 4] <= scores[0].max()


def test_popularity_counts():
    floor = fit_floor("popularity", make_holdout([[0, 1, 1], [1, 2], []]), 4, seed=0)
    assert floor.scores([Case(user=0, history=(), targets=(3,), seen=(1,))]).tolist() == [[1, 3, 1, 0]]


def test_item_knn_equals_the_cosine_written_out(two_tastes):
    holdout, cases = two_tastes
    taken = np.zeros((60, ITEMS))
    for user, row in enumerate(holdout.train):
        taken[user, row] = 1
    unit = taken / np.linalg.norm(taken, axis=0)
    cosine = unit.T @ unit  # (N, N)
    truth = np.stack([cosine[list(case.seen)].sum(axis=0) for case in cases])
    scores = fit_floor("item_knn", holdout, ITEMS, seed=0).scores(cases)
    np.testing.assert_allclose(scores, truth, rtol=1e-5)


@pytest.mark.parametrize("name", ["item_knn", "als"])
def test_personal_floors_learn_the_tastes_that_popularity_cannot(name, two_tastes):
    holdout, cases = two_tastes
    hits = {
        floor: evaluate(fit_floor(floor, holdout, ITEMS, seed=0), {"all": cases}, [12], 16).overall()["hit@12"]
        for floor in ("popularity", name)
    }
    # 11 unseen items share the taste, 20 do not
    assert hits[name] > 0.95
    assert hits["popularity"] < 0.7


def test_als_follows_its_seed(two_tastes):
    holdout, cases = two_tastes
    one, two = (fit_floor("als", holdout, ITEMS, seed=seed).scores(cases) for seed in (1, 2))
    assert not np.array_equal(one, two)


def test_an_unknown_floor_names_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'popularity'"):
        fit_floor("populraity", make_holdout([[0]]), 1, seed=0)
    assert set(floor_names()) == {"popularity", "item_knn", "als"}


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(DataError, match="training"):
        fit_floor("popularity", make_holdout([[], []]), 3, seed=0)
    with pytest.raises(DataError, match="catalog of 3"):
        fit_floor("popularity", make_holdout([[0, 3]]), 3, seed=0)
