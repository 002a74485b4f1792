from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pplr.config import HoldoutConfig
from pplr.data.holdout import Holdout, make_holdout
from pplr.data.interactions import Catalog, Dataset, Interactions
from pplr.errors import DataError, UnknownItemError

Make = Callable[..., Dataset]
histories = st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=12), min_size=1, max_size=6)


def _lists(holdout: Holdout, user: int) -> tuple[list[int], list[int], list[int]]:
    return holdout.train[user].tolist(), holdout.validation[user].tolist(), holdout.test[user].tolist()


@given(drawn=histories)
def test_leave_one_out_is_the_last_and_the_one_before(make_dataset: Make, drawn: list[list[int]]) -> None:
    drawn = [*drawn, [1, 2, 3]]
    holdout = make_holdout(make_dataset(drawn), HoldoutConfig())
    for user, items in enumerate(drawn):
        expected = (items, [], []) if len(items) < 3 else (items[:-2], [items[-2]], [items[-1]])
        assert _lists(holdout, user) == expected


@given(drawn=histories, ratios=st.tuples(st.integers(1, 9), st.integers(0, 4), st.integers(1, 9)))
def test_user_ratio_cuts_each_history(make_dataset: Make, drawn: list[list[int]], ratios: tuple[int, int, int]) -> None:
    drawn = [*drawn, [1, 2, 3]]
    holdout = make_holdout(make_dataset(drawn), HoldoutConfig(kind="user_ratio", ratios=ratios))
    for user, items in enumerate(drawn):
        train, validation, test = _lists(holdout, user)
        assert train + validation + test == items
        if len(items) < 3:
            assert train == items
        else:
            assert len(train) == max(1, len(items) * ratios[0] // sum(ratios))
            assert len(train) + len(validation) == max(1, len(items) * (ratios[0] + ratios[1]) // sum(ratios))
            assert test


@given(times=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=8), min_size=1, max_size=5), data=st.data())
def test_global_time_equals_sorting_everything(make_dataset: Make, times: list[list[int]], data: st.DataObject) -> None:
    times = [sorted(own) for own in times] + [[0, 6]]
    count = sum(map(len, times))
    rows = np.array(data.draw(st.permutations(range(count))))
    for start, stop in zip(np.cumsum([0, *map(len, times)])[:-1], np.cumsum(list(map(len, times))), strict=True):
        rows[start:stop] = np.sort(rows[start:stop])
    flat = make_dataset([list(range(len(own))) for own in times], times=times)
    events = Interactions(flat.interactions.users, flat.interactions.items, None, flat.interactions.timestamps, rows)
    dataset = Dataset("drawn", flat.user_ids, flat.catalog, events)
    holdout = make_holdout(dataset, HoldoutConfig(kind="global_time", ratios=(2, 1, 1)))
    assert events.timestamps is not None
    order = sorted(range(count), key=lambda event: (events.timestamps[event], rows[event]))
    naive = {name: [[] for _ in times] for name in ("train", "validation", "test")}
    for rank, event in enumerate(order):
        name = "train" if rank < count * 2 // 4 else "validation" if rank < count * 3 // 4 else "test"
        naive[name][events.users[event]].append(int(events.items[event]))
    for name, expected in naive.items():
        assert [items.tolist() for items in getattr(holdout, name)] == expected


def test_only_the_proportion_of_ratios_matters(make_dataset: Make) -> None:
    dataset = make_dataset([list(range(70))], times=[[float(time) for time in range(70)]])
    for kind in ("global_time", "user_ratio"):
        parts = [
            make_holdout(dataset, HoldoutConfig(kind=kind, ratios=ratios))
            for ratios in ((8.0, 1.0, 1.0), (0.8, 0.1, 0.1), (80.0, 10.0, 10.0))
        ]
        assert len({part.sha256 for part in parts}) == 1
        assert [len(part[0]) for part in (parts[0].train, parts[0].validation, parts[0].test)] == [56, 7, 7]


def test_global_time_without_times_names_the_cure(make_dataset: Make) -> None:
    with pytest.raises(DataError, match=r"only an order for each user.*leave_one_out"):
        make_holdout(make_dataset([[0, 1, 2]]), HoldoutConfig(kind="global_time"))


def test_nothing_to_test_with_is_an_error(make_dataset: Make) -> None:
    with pytest.raises(DataError, match="leaves none for test"):
        make_holdout(make_dataset([[0, 1], [2]]), HoldoutConfig())


def test_history(make_dataset: Make) -> None:
    holdout = make_holdout(make_dataset([[4, 3, 2, 1]]), HoldoutConfig())
    assert holdout.history(0, "validation").tolist() == [4, 3]
    assert holdout.history(0, "test").tolist() == [4, 3, 2]
    for user in (-1, 1):
        with pytest.raises(UnknownItemError, match="no user has the number"):
            holdout.history(user, "test")


def test_the_hash_follows_ids_and_not_numbers(make_dataset: Make) -> None:
    def of(user_ids: tuple[str, ...], item_ids: tuple[str, ...], drawn: list[list[int]]) -> str:
        flat = make_dataset(drawn, items=3)
        dataset = Dataset("drawn", user_ids, Catalog(item_ids, item_ids), flat.interactions)
        return make_holdout(dataset, HoldoutConfig()).sha256

    one = of(("a", "b"), ("x", "y", "z"), [[0, 1, 2], [2, 1, 0]])
    assert of(("b", "a"), ("z", "y", "x"), [[0, 1, 2], [2, 1, 0]]) == one
    assert of(("a", "b"), ("x", "y", "z"), [[1, 0, 2], [2, 1, 0]]) != one
    assert of(("a", "c"), ("x", "y", "z"), [[0, 1, 2], [2, 1, 0]]) != one


@given(drawn=histories, share=st.floats(0.05, 0.9), seed=st.integers(0, 99))
def test_unseen_items_are_in_no_history(make_dataset: Make, drawn: list[list[int]], share: float, seed: int) -> None:
    drawn = [*drawn, list(range(7)), list(range(6, -1, -1))]  # whatever is drawn, someone took another item before it
    holdout = make_holdout(make_dataset(drawn, items=9), HoldoutConfig(kind="unseen_items", share=share), seed)
    taken = {item for items in drawn for item in items}
    unseen = set(holdout.unseen)
    assert len(unseen) == max(1, round(len(taken) * share))
    assert unseen < taken
    for user, items in enumerate(drawn):
        train, validation, test = _lists(holdout, user)
        known = [(place, item) for place, item in enumerate(items) if item not in unseen]
        places = [
            place
            for place, item in enumerate(items)
            if item in unseen and item not in items[:place] and known and known[0][0] < place
        ]
        if places:
            known = [(place, item) for place, item in known if place < places[-1]]
        history = [item for _, item in known]
        assert train + validation == history
        assert len(validation) == (len(history) > 1)
        assert test == [items[place] for place in places[-1:]]
        masked = holdout.not_recommended(user, "test")
        assert masked == [item for item in items[: places[-1] if places else 0] if item in unseen]
        assert set(holdout.not_recommended(user, "validation")) == unseen


@given(drawn=histories, share=st.floats(0.05, 0.9), seed=st.integers(0, 99))
def test_of_new_users_one_item_is_known(make_dataset: Make, drawn: list[list[int]], share: float, seed: int) -> None:
    drawn = [*drawn, [0, 1], [3, 2, 1]]
    holdout = make_holdout(make_dataset(drawn), HoldoutConfig(kind="new_users", share=share), seed)
    could = [user for user, items in enumerate(drawn) if len(items) > 1]
    new = [user for user in range(len(drawn)) if len(holdout.test[user])]
    assert set(new) <= set(could)
    assert len(new) == max(1, round(len(could) * share))
    for user, items in enumerate(drawn):
        if user in new:
            expected: tuple[list[int], list[int], list[int]] = (items[:1], [], items[1:2])
        else:
            expected = (items[:-1], items[-1:], []) if len(items) > 2 else (items, [], [])
        assert _lists(holdout, user) == expected


@pytest.mark.parametrize("kind", ["unseen_items", "new_users"])
def test_what_is_drawn_follows_the_seed(make_dataset: Make, kind: str) -> None:
    dataset = make_dataset([list(range(user, user + 9)) for user in range(20)])
    config = HoldoutConfig.model_validate({"kind": kind, "share": 0.3})
    hashes = [make_holdout(dataset, config, seed).sha256 for seed in (0, 0, 1, 2)]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3
