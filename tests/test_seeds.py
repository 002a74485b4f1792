"""Seeds that depend on nothing but their names."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pplr.seeds import derive_seed, generator

parts = st.lists(st.one_of(st.text(max_size=5), st.integers(-5, 500)), max_size=4)


@given(st.integers(0, 2**31 - 1), parts)
def test_a_seed_is_a_number_that_every_generator_takes(seed: int, name: list):
    derived = derive_seed(seed, *name)
    assert 0 <= derived < 2**63
    assert derive_seed(seed, *name) == derived


@given(st.integers(0, 99), parts, st.integers(0, 99), parts)
def test_other_names_have_other_seeds(seed: int, name: list, other_seed: int, other: list):
    without_separators = [[part for part in each if "\x1f" not in str(part)] for each in (name, other)]
    one, two = derive_seed(seed, *without_separators[0]), derive_seed(other_seed, *without_separators[1])
    assert (one == two) == ((seed, without_separators[0]) == (other_seed, without_separators[1]))


def test_neighbours_are_told_apart():
    names = [("ab", "c"), ("a", "bc"), ("abc",), ("a", "b", "c"), ("1",), (1,), ("1", 2), ("12",), ()]
    assert len({derive_seed(0, *name) for name in names}) == len(names)


def test_seeds_are_the_same_on_every_machine():
    """Changing the rule would change every published result: these numbers stay."""
    assert derive_seed(0) == 2033344993903900207
    assert derive_seed(7, "dropout", "client 3", 12) == 4984216431503644977


def test_generators_do_not_share_draws():
    first = generator(0, "a").random(5)
    np.testing.assert_array_equal(generator(0, "a").random(5), first)
    assert not np.array_equal(generator(0, "b").random(5), first)
    assert not np.array_equal(generator(1, "a").random(5), first)
