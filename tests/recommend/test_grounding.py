"""Grounding against distances in float64 and against the order written out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pplr.data.prompts import Case
from pplr.errors import DataError
from pplr.recommend.grounding import l2_scores, trie_scores
from pplr.recommend.metrics import target_ranks


@settings(max_examples=40)
@given(
    st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 70), st.integers(1, 100), st.sampled_from([0, 10, 1000])
)
def test_l2_equals_float64_even_far_from_the_origin(seed, rows, item_count, width, offset):
    draw = torch.Generator().manual_seed(seed)
    queries = torch.randn(rows, width, generator=draw) + offset
    items = torch.randn(item_count, width, generator=draw) + offset
    truth = -torch.cdist(queries.double(), items.double(), compute_mode="donot_use_mm_for_euclid_dist")
    torch.testing.assert_close(l2_scores(queries, items).double(), truth, rtol=1e-5, atol=1e-6)


def test_the_fast_expansion_would_fail_where_l2_holds():
    draw = torch.Generator().manual_seed(0)
    queries, items = (torch.randn(n, 64, generator=draw) * 0.01 + 1000 for n in (3, 40))
    truth = torch.cdist(queries.double(), items.double(), compute_mode="donot_use_mm_for_euclid_dist")
    fast = torch.cdist(queries, items, compute_mode="use_mm_for_euclid_dist").double()
    assert ((fast - truth).abs() / truth).max() > 0.1
    torch.testing.assert_close(-l2_scores(queries, items).double(), truth, rtol=1e-4, atol=0)


@given(st.integers(1, 40), st.integers(0, 1000))
def test_the_chunk_changes_nothing_and_equal_embeddings_tie(chunk, seed):
    draw = torch.Generator().manual_seed(seed)
    distinct = torch.randn(17, 33, generator=draw)
    title_of = torch.randint(17, (37,), generator=draw)
    queries = torch.randn(4, 33, generator=draw)
    scores = l2_scores(queries, distinct[title_of], chunk_items=chunk)
    assert torch.equal(scores, l2_scores(queries, distinct[title_of]))
    assert torch.equal(scores, l2_scores(queries, distinct)[:, title_of])


def test_half_precision_is_widened_first():
    queries, items = torch.randn(2, 8).bfloat16(), torch.randn(5, 8).bfloat16()
    scores = l2_scores(queries, items)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, l2_scores(queries.float(), items.float()))


def test_widths_must_agree():
    with pytest.raises(DataError, match="width"):
        l2_scores(torch.zeros(1, 3), torch.zeros(1, 4))


def naive_order(row, embeddings, title_of):
    """Sort classes of items: generated ones by their best beam, then the others by distance to the best beam's."""
    best = {}
    for items, score in row:
        for item in items:
            best[item] = max(score, best.get(item, -math.inf))
    first_title = max(row, key=lambda beam: beam[1])[0][0] if row else None

    def key(item):
        if item in best:
            return (0, -best[item])
        if first_title is None:
            return (1, 0.0)
        first = [title_of.index(title_of[i]) for i in (first_title, item)]
        return (1, float(np.linalg.norm(embeddings[first[0]] - embeddings[first[1]])))

    return [key(item) for item in range(len(embeddings))]


@st.composite
def searches(draw):
    titles = draw(st.integers(1, 8))
    title_of = [*range(titles), *draw(st.lists(st.integers(0, titles - 1), max_size=5))]
    groups = [tuple(item for item, title in enumerate(title_of) if title == wanted) for wanted in range(titles)]
    beam = st.tuples(st.sampled_from(groups), st.integers(-20, 0).map(float))
    rows = draw(st.lists(st.lists(beam, max_size=5), min_size=1, max_size=3))
    embeddings = draw(
        st.lists(st.lists(st.integers(-9, 9), min_size=2, max_size=2), min_size=len(title_of), max_size=len(title_of))
    )
    return title_of, rows, np.array(embeddings, dtype=np.float32)


@given(searches())
def test_trie_scores_order_items_as_written_out(search):
    title_of, rows, embeddings = search
    scores = trie_scores(rows, torch.tensor(embeddings), title_of)
    for row, own in zip(rows, scores.tolist(), strict=True):
        keys = naive_order(row, embeddings, title_of)
        for one in range(len(own)):
            for other in range(len(own)):
                assert (own[one] > own[other]) == (keys[one] < keys[other])


def test_a_row_that_wrote_nothing_ranks_nothing():
    scores = trie_scores([[], [((1,), -3.0)]], torch.eye(3))
    assert scores[0].tolist() == [0, 0, 0]
    case = Case(user=0, history=(), targets=(0,), seen=())
    assert target_ranks(scores[0].numpy(), case.targets, case.seen).tolist() == [3]
    assert scores[1].argmax() == 1


def test_items_of_one_title_tie_even_if_their_embeddings_differ():
    embeddings = torch.tensor([[0.0], [1.0], [1.5], [4.0]])
    apart = trie_scores([[((0,), -1.0)]], embeddings)[0]
    tied = trie_scores([[((0,), -1.0)]], embeddings, [0, 1, 1, 2])[0]
    assert apart[1] != apart[2]
    assert tied.tolist() == [1.0, -1.0, -1.0, -4.0]


@pytest.mark.parametrize("beam", [((), -1.0), ((0,), math.nan), ((3,), -1.0), ((-1,), -1.0)])
def test_a_beam_that_names_no_item_is_refused(beam):
    with pytest.raises(DataError, match="does not fit a catalog of 3"):
        trie_scores([[beam]], torch.eye(3))
