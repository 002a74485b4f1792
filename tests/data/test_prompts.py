from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pplr.config import HoldoutConfig, PromptConfig
from pplr.data.holdout import make_holdout
from pplr.data.interactions import Dataset
from pplr.data.prompts import (
    Case,
    PromptTemplate,
    Sample,
    draw_cases,
    draw_samples,
    evaluation_cases,
    training_samples,
)
from pplr.errors import DataError

Make = Callable[..., Dataset]
histories = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=9), min_size=1, max_size=5)


@given(drawn=histories, most=st.integers(1, 4))
def test_samples_equal_a_naive_walk(make_dataset: Make, drawn: list[list[int]], most: int) -> None:
    drawn = [*drawn, [0, 1, 2]]
    holdout = make_holdout(make_dataset(drawn), HoldoutConfig())
    naive = []
    for user, items in enumerate(drawn):
        train = items if len(items) < 3 else items[:-2]
        naive += [Sample(user, tuple(train[:i][-most:]), train[i]) for i in range(1, len(train))]
    assert training_samples(holdout, range(len(drawn)), most) == naive
    assert training_samples(holdout, [len(drawn) - 1], most) == []


@given(drawn=histories, most=st.integers(1, 4))
def test_cases_mask_the_past_and_hold_nothing_of_the_future(
    make_dataset: Make, drawn: list[list[int]], most: int
) -> None:
    drawn = [*drawn, [0, 1, 2]]
    holdout = make_holdout(make_dataset(drawn), HoldoutConfig())
    for part, held in (("validation", 2), ("test", 1)):
        cases, left_out = evaluation_cases(holdout, range(len(drawn)), part, most)
        naive = []
        for user, items in enumerate(drawn):
            if len(items) >= 3 and items[-held] not in items[:-held]:
                past = items[:-held]
                naive.append((user, tuple(past[-most:]), (items[-held],), set(past)))
        assert [(case.user, case.history, case.targets, set(case.seen)) for case in cases] == naive
        assert all(len(case.seen) == len(set(case.seen)) for case in cases)
        assert left_out == len(drawn) - len(naive)


def test_targets_taken_before_or_twice(make_dataset: Make) -> None:
    times = [[0.0, 1, 2, 3, 4, 5, 6, 7], [0.0, 0]]
    dataset = make_dataset([[0, 1, 2, 3, 0, 4, 4, 5], [1, 2]], times=times)
    holdout = make_holdout(dataset, HoldoutConfig(kind="global_time", ratios=(6, 0, 4)))
    assert [items.tolist() for items in holdout.test] == [[0, 4, 4, 5], []]
    cases, left_out = evaluation_cases(holdout, [0, 1], "test", 2)
    assert cases == [Case(0, (2, 3), (4, 5), (0, 1, 2, 3))]
    assert left_out == 1


def test_unseen_items_are_masked_until_they_can_be_recommended(make_dataset: Make) -> None:
    dataset = make_dataset([[0, 1, 2, 3, 4], [4, 3, 2, 1, 0]] * 3)
    holdout = make_holdout(dataset, HoldoutConfig(kind="unseen_items", share=0.4), seed=1)
    for case in evaluation_cases(holdout, range(6), "test", 5)[0]:
        own = dataset.histories[case.user].tolist()
        (target,) = case.targets
        assert target in holdout.unseen
        assert set(case.seen) == set(own[: own.index(target)])
        assert not set(case.history) & set(holdout.unseen)
    validation = evaluation_cases(holdout, range(6), "validation", 5)[0]
    assert validation
    assert all(set(holdout.unseen) <= set(case.seen) for case in validation)


@given(sizes=st.lists(st.integers(0, 30), min_size=1, max_size=6), total=st.integers(1, 80), seed=st.integers(0, 5))
def test_draws_are_proportional(sizes: list[int], total: int, seed: int) -> None:
    groups = [[Sample(client, (0,), index) for index in range(size)] for client, size in enumerate(sizes)]
    drawn = draw_samples(groups, total, seed)
    assert drawn == draw_samples(groups, total, seed)
    for own, group in zip(drawn, groups, strict=True):
        assert [sample for sample in group if sample in set(own)] == own  # in order, none twice, none invented
    whole = sum(sizes)
    if total >= whole:
        assert drawn == groups
        return
    assert sum(map(len, drawn)) == max(total, sum(size > 0 for size in sizes))
    for own, size in zip(drawn, sizes, strict=True):
        assert len(own) >= (size > 0)
        assert len(own) <= max(1, -(-total * size // whole))
        if min(total * other // whole for other in sizes if other) >= 1:
            assert len(own) >= total * size // whole


def test_other_seeds_draw_others_and_cases_are_drawn_alike() -> None:
    cases = [[Case(user, (0,), (1,), (0,)) for user in range(50)]]
    assert draw_cases(cases, 5, 0) != draw_cases(cases, 5, 1)
    assert draw_cases(cases, None, 0) == cases
    assert draw_samples([[], []], 3, 0) == [[], []]


def test_the_bytes_of_a_prompt() -> None:
    template = PromptTemplate(PromptConfig())
    prompt = template.prompt(["Toy Story (1995)", 'Ivan "Ironman"\n Stewart'])
    assert prompt.encode() == (
        b"### Instruction:\nGiven a list of movies the user has watched before, please recommend a new one that the "
        b"user would like.\n\n### Input:\nThe user has watched the following movies before: "
        b'"Toy Story (1995)", "Ivan \'Ironman\' Stewart"\n\n### Response:\n'
    )
    assert template.answer('The "Best"  One ') == "\"The 'Best' One\"\n"
    assert not [line for line in prompt.splitlines() if line != line.strip()]


def test_braces_in_an_instruction_are_only_text() -> None:
    config = PromptConfig(noun="games", verb="played", instruction="{verb} {noun}: {other} {}")
    assert PromptTemplate(config).prompt(["A"]).startswith("### Instruction:\nplayed games: {other} {}\n\n")


def test_an_empty_history_is_refused() -> None:
    with pytest.raises(DataError, match="at least one title"):
        PromptTemplate(PromptConfig()).prompt([])
