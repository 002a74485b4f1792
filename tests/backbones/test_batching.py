"""Batches hold every sample once, in an order that the seed fixes, with rows of nearly one length."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pplr.backbones.batching import bucketed_batches

lengths_of_samples = st.lists(st.integers(1, 500), max_size=90)


@given(lengths_of_samples, st.integers(1, 9), st.integers(0, 99), st.integers(1, 9))
def test_every_sample_is_in_one_batch(lengths: list[int], size: int, seed: int, pool: int):
    batches = bucketed_batches(lengths, size, seed, "client", 0, pool=pool)
    assert sorted(position for batch in batches for position in batch) == list(range(len(lengths)))
    assert len(batches) == math.ceil(len(lengths) / size)  # the optimizer takes as many steps as it announces
    assert sum(len(batch) < size for batch in batches) <= 1


@given(lengths_of_samples, st.integers(1, 9), st.integers(0, 99))
def test_a_batch_is_a_run_of_its_sorted_pool(lengths: list[int], size: int, seed: int):
    batches = bucketed_batches(lengths, size, seed, "x", pool=len(lengths) + 1)
    spans = sorted((lengths[batch[0]], lengths[batch[-1]]) for batch in batches)
    assert all([lengths[i] for i in batch] == sorted(lengths[i] for i in batch) for batch in batches)
    assert all(before[1] <= after[0] for before, after in pairwise(spans))


def test_the_order_follows_from_seed_and_name_alone():
    lengths = np.random.default_rng(0).integers(5, 50, 64).tolist()
    first = bucketed_batches(lengths, 4, 0, "client", 1)
    np.random.default_rng(0).random(3)
    assert bucketed_batches(lengths, 4, 0, "client", 1) == first
    others = [bucketed_batches(lengths, 4, *key) for key in ((1, "client", 1), (0, "other", 1), (0, "client", 2))]
    assert all(other != first for other in others)


def test_sorting_saves_padding():
    lengths = np.random.default_rng(0).integers(5, 200, 256).tolist()

    def padded(pool: int) -> int:
        batches = bucketed_batches(lengths, 8, 0, "x", pool=pool)
        return sum(max(lengths[i] for i in batch) * len(batch) for batch in batches)

    assert padded(8) < 0.7 * padded(1)
