from collections.abc import Callable

import numpy as np
import pytest
import threadpoolctl
from hypothesis import given, settings
from hypothesis import strategies as st

from pplr.config import HoldoutConfig, PartitionConfig
from pplr.data.holdout import Holdout, make_holdout
from pplr.data.interactions import Dataset
from pplr.data.partition import make_partition
from pplr.errors import PartitionError

Make = Callable[..., Dataset]


def _tastes(make: Make, users: int = 40) -> tuple[Dataset, Holdout]:
    """Two tastes that share no item: even users take items 0 to 9, odd users items 10 to 19."""
    rng = np.random.default_rng(0)
    drawn = [(rng.permutation(10)[:6] + 10 * (user % 2)).tolist() for user in range(users)]
    dataset = make(
        drawn,
        items=20,
        genres=["Drama|War"] * 10 + ["Comedy"] * 10,
        columns={"shop": [f"s{user % 5}" for user in range(users)], "sex": ["F"] * users},
    )
    return dataset, make_holdout(dataset, HoldoutConfig())


@pytest.mark.parametrize("by", ["kmeans", "column", "dirichlet", "random"])
def test_every_user_has_one_client_and_the_seed_decides(make_dataset: Make, by: str) -> None:
    dataset, holdout = _tastes(make_dataset)
    config = PartitionConfig(by=by, column="shop" if by == "column" else None, min_users=2)
    one = make_partition(dataset, holdout, config, 2, seed=7)
    again = make_partition(dataset, holdout, config, 2, seed=7)
    assert sorted(np.concatenate(one.users).tolist()) == list(range(40))
    assert one.sha256 == again.sha256
    assert [users.tolist() for users in one.users] == [users.tolist() for users in again.users]
    assert one.names == ("0", "1")
    assert len(one.labels) == 2
    assert all(users.dtype == np.int32 and (np.diff(users) > 0).all() for users in one.users)
    if by in ("dirichlet", "random"):
        assert make_partition(dataset, holdout, config, 2, seed=8).sha256 != one.sha256


def test_kmeans_finds_tastes(make_dataset: Make) -> None:
    dataset, holdout = _tastes(make_dataset)
    found = make_partition(dataset, holdout, PartitionConfig(factors=4), 2, seed=0)
    assert {tuple(users.tolist()) for users in found.users} == {tuple(range(0, 40, 2)), tuple(range(1, 40, 2))}


def test_kmeans_reads_train_alone(make_dataset: Make) -> None:
    dataset, holdout = _tastes(make_dataset)
    swapped = tuple((20 - 1 - items).astype(np.int32) for items in holdout.test)
    other = Holdout(holdout.train, swapped, swapped, holdout.kind)
    config = PartitionConfig(factors=4)
    assert make_partition(dataset, holdout, config, 2, 0).sha256 == make_partition(dataset, other, config, 2, 0).sha256


def test_kmeans_does_not_depend_on_threads(make_dataset: Make) -> None:
    dataset, holdout = _tastes(make_dataset)
    config = PartitionConfig(factors=4, min_users=1)
    hashes = set()
    for threads in (1, 2):
        with threadpoolctl.threadpool_limits(threads):
            hashes.add(make_partition(dataset, holdout, config, 3, 0).sha256)
    assert len(hashes) == 1


def test_users_without_train_are_given_a_client(make_dataset: Make) -> None:
    dataset, holdout = _tastes(make_dataset)
    train = (*holdout.train[:-1], holdout.train[-1][:0])
    found = make_partition(dataset, Holdout(train, holdout.validation, holdout.test, "x"), PartitionConfig(), 2, 0)
    assert sum(map(len, found.users)) == 40


def test_column_deals_values_largest_first(make_dataset: Make) -> None:
    shops = ["a"] * 5 + ["b"] * 4 + ["c"] * 3 + ["d"] * 2 + [""]
    dataset = make_dataset([[0, 1, 2, 3]] * 15, columns={"shop": shops})
    holdout = make_holdout(dataset, HoldoutConfig())
    found = make_partition(dataset, holdout, PartitionConfig(by="column", column="shop", min_users=1), 2, 0)
    assert found.labels == ("shop: a, d, (none)", "shop: b, c")
    assert [len(users) for users in found.users] == [8, 7]


def test_dirichlet_parts_genres_by_the_concentration(make_dataset: Make) -> None:
    dataset, holdout = _tastes(make_dataset, users=400)
    even = make_partition(dataset, holdout, PartitionConfig(by="dirichlet", concentration=1e4), 2, 0)
    skewed = make_partition(dataset, holdout, PartitionConfig(by="dirichlet", concentration=0.05), 2, 1)

    def worst(users: tuple[np.ndarray, ...]) -> float:
        return max(abs(float(np.mean(own % 2)) - 0.5) for own in users)

    assert worst(even.users) < 0.05 < worst(skewed.users)
    assert even.labels[0] == "mostly Comedy, Drama"


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 8), min_size=6, max_size=40), clients=st.integers(1, 4), seed=st.integers(0, 9))
def test_random_is_even_in_users_who_train(make_dataset: Make, lengths: list[int], clients: int, seed: int) -> None:
    lengths = [*lengths, *[4] * clients]
    dataset = make_dataset([list(range(length)) for length in lengths])
    holdout = make_holdout(dataset, HoldoutConfig())
    found = make_partition(dataset, holdout, PartitionConfig(by="random", min_users=1), clients, seed)
    for counted in (
        [len(users) for users in found.users],
        [sum(len(holdout.train[user]) > 1 for user in users) for users in found.users],
    ):
        assert max(counted) - min(counted) <= 1


def test_too_few_users_are_told_with_sizes(make_dataset: Make) -> None:
    dataset, holdout = _tastes(make_dataset)
    with pytest.raises(PartitionError, match=r"40 of 40 users .* too few for 5 clients of at least 9.*Lower"):
        make_partition(dataset, holdout, PartitionConfig(min_users=9), 5, 0)
    with pytest.raises(PartitionError, match=r"gives 3 clients \d+, \d+, \d+ users .* each needs 13.*random"):
        make_partition(dataset, holdout, PartitionConfig(min_users=13, factors=4), 3, 0)
    same = make_dataset([[0, 1, 2, 3]] * 12)
    with pytest.raises(PartitionError, match=r"'kmeans' gives 2 clients"):
        make_partition(same, make_holdout(same, HoldoutConfig()), PartitionConfig(factors=2), 2, 0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PartitionConfig(by="column"), r"needs data.partition.column.*has: shop, sex"),
        (PartitionConfig(by="column", column="shpo"), r"not 'shpo'.*Did you mean 'shop'"),
        (PartitionConfig(by="column", column="sex"), r"has 1 values, too few for 2 clients"),
        (PartitionConfig(by="dirichlet", column="style"), r"'style'; the items of drawn have: genre"),
    ],
)
def test_columns_that_do_not_serve(make_dataset: Make, config: PartitionConfig, message: str) -> None:
    dataset, holdout = _tastes(make_dataset)
    with pytest.raises(PartitionError, match=message):
        make_partition(dataset, holdout, config, 2, 0)
