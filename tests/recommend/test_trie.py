"""The trie against plain Python; the constrained search against transformers' own and every title's odds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessorList

from pplr.errors import DataError
from pplr.recommend.trie import TitleTrie, TrieConstraint, generated_titles

END, PAD, VOCABULARY = 1, 0, 64

titles_of_few_tokens = st.lists(st.lists(st.integers(2, 6), min_size=1, max_size=5), min_size=1, max_size=15)


def naive_allowed(titles, prefix):
    prefix = tuple(prefix)
    longer = {title[len(prefix)] for title in titles if len(title) > len(prefix) and title[: len(prefix)] == prefix}
    return sorted(longer | ({END} if prefix in titles or not longer else set()))


@settings(max_examples=200)
@given(titles_of_few_tokens, st.lists(st.integers(0, 8), max_size=6))
def test_the_trie_equals_plain_python(token_ids, drawn):
    trie = TitleTrie(token_ids, END)
    titles = {tuple(title) for title in token_ids}
    assert len(trie) == len(titles)
    assert trie.max_length == max(map(len, titles))
    prefixes = [tuple(drawn), *(title[:stop] for title in titles for stop in range(len(title) + 1))]
    for prefix in prefixes:
        assert trie.allowed(prefix).tolist() == naive_allowed(titles, prefix)
        own = tuple(item for item, title in enumerate(token_ids) if END not in prefix and tuple(title) == prefix)
        if END not in prefix:
            assert trie.items(prefix) == own
            assert trie.items([*prefix, END, 3, END]) == own
    for item, title in enumerate(token_ids):
        assert [other for other in range(len(token_ids)) if trie.title_of[other] == trie.title_of[item]] == list(
            trie.items(title)
        )
        assert trie.allowed([*title, END]).tolist() == [END]


def test_one_end_token_at_the_end_is_dropped():
    with_end, without = TitleTrie([[5, 6, END], [7, END]], END), TitleTrie([[5, 6], [7]], END)
    assert with_end.max_length == without.max_length == 2
    assert with_end.items([5, 6]) == without.items([5, 6]) == (0,)


@pytest.mark.parametrize("token_ids", [[], [[]], [[END]], [[3, END, 4]], [[3, -1]]])
def test_what_makes_no_title_is_refused(token_ids):
    with pytest.raises(DataError, match="title"):
        TitleTrie(token_ids, END)


@settings(max_examples=100)
@given(titles_of_few_tokens, st.data())
def test_the_constraint_equals_plain_python_for_every_user(token_ids, data):
    users, beams = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    items = st.integers(0, len(token_ids) - 1)
    exclude = [data.draw(st.lists(items, max_size=2 * len(token_ids))) for _ in range(users)]
    left = [
        {tuple(title) for item, title in enumerate(token_ids) if item not in seen} for seen in exclude
    ]  # a title stays when any of its items does
    length = data.draw(st.integers(0, 4))
    prefixes = []
    for _ in range(users * beams):
        title = data.draw(st.sampled_from(token_ids))[:length]
        prefixes.append(title + [END] * (length - len(title)))
    input_ids = torch.cat(
        [torch.full((users * beams, 2), 3), torch.tensor(prefixes).long().view(users * beams, length)], dim=1
    )
    scores = torch.randn(users * beams, 9)
    masked = TrieConstraint(TitleTrie(token_ids, END), 2, beams, exclude)(input_ids, scores)
    for row, prefix in enumerate(prefixes):
        expected = naive_allowed(left[row // beams], prefix)
        assert masked[row].isfinite().nonzero().flatten().tolist() == expected
        assert torch.equal(masked[row, expected], scores[row, expected])


@settings(max_examples=100)
@given(titles_of_few_tokens, st.data())
def test_users_who_go_on_are_told_what_they_would_be_told_alone(token_ids, data):
    """One user leaves after another, and before the beams part there is one row for each."""
    trie, users = TitleTrie(token_ids, END), data.draw(st.integers(1, 5))
    items = st.integers(0, len(token_ids) - 1)
    exclude = [data.draw(st.lists(items, max_size=2 * len(token_ids))) for _ in range(users)]
    constraint, left = TrieConstraint(trie, 0, 2, exclude), list(range(users))
    for beams in (1, 2, 2):
        keep = sorted(data.draw(st.sets(st.integers(0, len(left) - 1), min_size=1)))
        constraint.keep(torch.tensor(keep))
        left = [left[place] for place in keep]
        prefixes = torch.tensor([data.draw(st.sampled_from(token_ids))[:1] for _ in range(len(left) * beams)])
        scores = torch.randn(len(prefixes), 9)
        alone = TrieConstraint(trie, 0, beams, [exclude[user] for user in left])
        assert torch.equal(constraint(prefixes, scores), alone(prefixes, scores))


def test_rows_vocabulary_and_items_must_fit():
    trie = TitleTrie([[5], [6]], END)
    with pytest.raises(DataError, match="3 rows"):
        TrieConstraint(trie, 0, 2, [[0]])(torch.zeros(3, 0, dtype=torch.long), torch.zeros(3, 9))
    with pytest.raises(DataError, match="token 6"):
        TrieConstraint(trie, 0)(torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, 6))
    for item in (2, -1):
        with pytest.raises(DataError, match=f"item {item}"):
            TrieConstraint(trie, 0, 1, [[item]])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        bos_token_id=2, eos_token_id=END, pad_token_id=PAD, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def catalog():
    draw = np.random.default_rng(5)
    titles = [draw.integers(3, 20, size=draw.integers(1, 6)).tolist() for _ in range(24)]
    return [*titles, titles[3] + [7], titles[4][:1], titles[0], titles[1]]  # prefixes of others, and shared titles


@pytest.fixture(scope="module")
def prompts():
    rows = [[30, 31, 32, 33, 34], [40, 41, 42], [50, 51, 52, 53]]
    width = max(map(len, rows))
    input_ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    return {"input_ids": input_ids, "attention_mask": (input_ids != PAD).long()}


def search(model, prompts, beams, trie, **how):
    with torch.no_grad():
        return model.generate(
            **prompts, do_sample=False, num_beams=beams, num_return_sequences=beams, length_penalty=0.0,
            max_new_tokens=trie.max_length + 1, return_dict_in_generate=True, output_scores=True, **how,
        )  # fmt: skip


def title_log_probability(model, prompts, row, title):
    """Score one title alone, without padding, cache or search."""
    prompt = prompts["input_ids"][row][prompts["attention_mask"][row].bool()]
    answer = torch.tensor([*title, END])
    with torch.no_grad():
        logits = model(torch.cat([prompt, answer])[None]).logits[0, len(prompt) - 1 : -1]
    return float(logits.log_softmax(-1).gather(1, answer[:, None]).sum())


@pytest.mark.parametrize("beams", [2, 4, 7])
def test_the_search_equals_transformers_own_constraint(model, prompts, catalog, beams):
    trie, width = TitleTrie(catalog, END), prompts["input_ids"].shape[1]
    titles = {tuple(title) for title in catalog}
    ours = search(
        model, prompts, beams, trie, logits_processor=LogitsProcessorList([TrieConstraint(trie, width, beams)])
    )
    theirs = search(
        model, prompts, beams, trie, prefix_allowed_tokens_fn=lambda _, ids: naive_allowed(titles, ids[width:].tolist())
    )
    assert torch.equal(ours.sequences, theirs.sequences)
    assert torch.equal(ours.sequences_scores, theirs.sequences_scores)


@pytest.mark.parametrize("beams", [1, 3, 5])
def test_only_real_titles_come_out(model, prompts, catalog, beams):
    trie, width = TitleTrie(catalog, END), prompts["input_ids"].shape[1]
    out = search(
        model, prompts, beams, trie, logits_processor=LogitsProcessorList([TrieConstraint(trie, width, beams)])
    )
    for row in out.sequences[:, width:].tolist():
        assert row[: row.index(END)] in catalog
    if beams > 1:
        for row, told in enumerate(generated_titles(trie, out.sequences, out.sequences_scores, width, 3)):
            assert len(told) == beams
            for items, score in told:
                assert items == tuple(i for i, title in enumerate(catalog) if title == catalog[items[0]])
                truth = title_log_probability(model, prompts, row, catalog[items[0]])
                assert score == pytest.approx(truth, abs=1e-3)


@pytest.mark.parametrize("spare", [0, 7])
def test_with_enough_beams_all_titles_come_in_order_of_their_log_probability(model, prompts, catalog, spare):
    trie, width = TitleTrie(catalog, END), prompts["input_ids"].shape[1]
    beams = len(trie) + spare
    out = search(
        model, prompts, beams, trie, logits_processor=LogitsProcessorList([TrieConstraint(trie, width, beams)])
    )
    for row, told in enumerate(generated_titles(trie, out.sequences, out.sequences_scores, width, 3)):
        truth = {trie.items(title): title_log_probability(model, prompts, row, title) for title in catalog}
        assert [items for items, _ in told] == sorted(truth, key=lambda items: -truth[items])
        assert [score for _, score in told] == pytest.approx(sorted(truth.values(), reverse=True), abs=1e-3)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_the_history_is_not_told_again(model, prompts, catalog, length_penalty):
    trie, width = TitleTrie(catalog, END), prompts["input_ids"].shape[1]
    beams = len(trie)
    exclude = [[0, 5, 6, 7], list(range(len(catalog))), list(range(2, len(catalog)))]
    # user 0 keeps the title of item 0, which item 26 shares; user 1 keeps nothing; user 2 keeps two titles
    expected = [{trie.items(title) for i, title in enumerate(catalog) if i not in seen} for seen in exclude]
    constraint = LogitsProcessorList([TrieConstraint(trie, width, beams, exclude)])
    with torch.no_grad():
        out = model.generate(
            **prompts, do_sample=False, num_beams=beams, num_return_sequences=beams, length_penalty=length_penalty,
            max_new_tokens=trie.max_length + 1, return_dict_in_generate=True, output_scores=True,
            logits_processor=constraint,
        )  # fmt: skip
    told = generated_titles(trie, out.sequences, out.sequences_scores, width, 3)
    assert [{items for items, _ in own} for own in told] == expected
    assert [len(own) for own in told] == [len(own) for own in expected]
    assert [len(own) for own in expected[1:]] == [0, 2]
    assert (0, 26) in expected[0]


def test_beams_that_hold_nothing_are_not_read():
    trie = TitleTrie([[5], [6], [7], [8, 9, 4]], END)
    answers = [[5, END, PAD], [6, END, PAD], [7, END, END], [8, 9, 4], [8, END, PAD], [5, END, END]]
    scores = torch.tensor([-2.0, -torch.inf, -1e9 / 25, -1.0, -1.0, -3.0])  # found, dead, spare, unfinished, no title
    sequences = torch.cat([torch.full((6, 2), END), torch.tensor(answers)], dim=1)
    assert generated_titles(trie, sequences, scores, prompt_length=2, batch_size=1) == [[((0,), -2.0)]]
    assert generated_titles(trie, sequences, scores, prompt_length=2, batch_size=3) == [
        [((0,), -2.0)],
        [],
        [((0,), -3.0)],
    ]
