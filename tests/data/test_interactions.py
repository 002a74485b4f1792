from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pplr.data.interactions import Catalog, Dataset
from pplr.errors import DataError, UnknownItemError

Make = Callable[..., Dataset]


@given(drawn=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=6), min_size=1, max_size=5))
def test_histories(make_dataset: Make, drawn: list[list[int]]) -> None:
    assert [items.tolist() for items in make_dataset(drawn).histories] == drawn


def test_items_that_share_a_title_stay_apart() -> None:
    catalog = Catalog(("a", "b", "c"), ("Sabrina", "Heat", "Sabrina"))
    assert catalog.by_title == {"Sabrina": (0, 2), "Heat": (1,)}
    assert catalog.find("  sabRINA ") == (0, 2)
    with pytest.raises(UnknownItemError, match="Did you mean 'Sabrina'"):
        catalog.find("Sabrona")
    with pytest.raises(UnknownItemError, match="separated by ';'"):
        catalog.find("xyz")


def test_ids_are_unique() -> None:
    with pytest.raises(DataError, match="not unique"):
        Catalog(("a", "a"), ("x", "y"))


def test_an_unknown_user_names_the_nearest(make_dataset: Make) -> None:
    dataset = make_dataset([[0, 1], [1]])
    assert dataset.user("u1") == 1
    with pytest.raises(UnknownItemError, match="no user 'u9' in drawn"):
        dataset.user("u9")
