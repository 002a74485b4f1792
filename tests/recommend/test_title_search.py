"""The search by nodes against the search token by token within the same trie."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pplr.backbones.causal_lm import CausalLM
from pplr.config import AdapterConfig, TrainingConfig
from pplr.errors import DataError
from pplr.recommend import title_search
from pplr.recommend.decoding import TokenTree
from pplr.recommend.generation import generate
from pplr.recommend.title_search import search_titles, walk_titles
from pplr.recommend.trie import TitleTrie, TrieConstraint, generated_titles
from pplr.stages.client_model import ClientModel
from pplr.stages.cut import CutPlan
from pplr.stages.model import CutModel
from pplr.testing import random_adapter, tiny_backbone

WORDS = ("oak", "oat", "oats", "elm", "elder", "elder tree", "yew", "fir", "fir tree of the north", "oak")
PLANS = [CutPlan(0, 0, 4), CutPlan(1, 1, 4), CutPlan.make(None, 4)]
FAMILIES: dict[str, dict[str, Any]] = {"llama": {}, "qwen2": {}, "qwen3": {"tie_word_embeddings": True}}
EXCLUDE: list[list[int]] = [[], [1, 4], [0, 3, 8, 9], [], list(range(1, 9))]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=FAMILIES)
def backbone(request: pytest.FixtureRequest) -> CausalLM:
    return tiny_backbone(request.param, **FAMILIES[request.param])


def _trie(words: tuple[str, ...] = WORDS, start: str = "") -> TitleTrie:
    return TitleTrie([list((start + word).encode()) for word in words], 256)


def _prompts(*lengths: int, alike: int = 0) -> list[list[int]]:
    source = torch.Generator().manual_seed(3)
    rows = [torch.randint(0, 256, (length,), generator=source).tolist() for length in lengths]
    return [list(range(60, 60 + alike)) + row for row in rows]


def _client(backbone: CausalLM, plan: CutPlan) -> ClientModel:
    cut = CutModel(backbone, plan, AdapterConfig(rank=4), TrainingConfig())
    return cut.client("one", random_adapter(cut.shapes))


def _naive(
    model: ClientModel, prompts: list[list[int]], trie: TitleTrie, beams: int, exclude: list[list[int]]
) -> list[list[tuple[tuple[int, ...], float]]]:
    longest = max(map(len, prompts))
    told = generate(
        model,
        prompts,
        beams=beams,
        max_new_tokens=trie.max_length + 1,
        returned=beams,
        length_penalty=0.0,
        processors=[TrieConstraint(trie, longest, beams, exclude=exclude)],
    )
    assert told.scores is not None
    return generated_titles(trie, told.sequences, told.scores, longest, len(prompts))


def _assert_same(found: list[Any], expected: list[Any]) -> None:
    assert [[items for items, _ in own] for own in found] == [[items for items, _ in own] for own in expected]
    for own, other in zip(found, expected, strict=True):
        assert [score for _, score in own] == pytest.approx([score for _, score in other], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("plan", PLANS, ids=["k0-m0", "k1-m1", "uncut"])
@pytest.mark.parametrize("start", ["", '"a '], ids=["", "all titles begin alike"])
def test_it_finds_what_the_search_token_by_token_finds(backbone: CausalLM, plan: CutPlan, start: str):
    model, trie, prompts = _client(backbone, plan), _trie(start=start), _prompts(9, 4, 13, 1, 6, alike=3)
    for beams in (2, 4, 12):
        expected = _naive(model, prompts, trie, beams, EXCLUDE)
        _assert_same(search_titles(model, prompts, trie, beams=beams, exclude=EXCLUDE), expected)
    assert len({tuple(own[0][0]) for own in expected}) > 1


@pytest.mark.parametrize("room", [1, 30, 400])
def test_what_is_run_ahead_changes_nothing_but_the_passes(room: int, monkeypatch: pytest.MonkeyPatch):
    model, trie, prompts = _client(tiny_backbone(), PLANS[1]), _trie(), _prompts(7, 12)
    passes: list[int] = []
    extend = TokenTree.extend

    def counted(self: TokenTree, tokens: Any, after: Any) -> torch.Tensor:
        passes.append(tokens.shape[1])
        return extend(self, tokens, after)

    monkeypatch.setattr(TokenTree, "extend", counted)
    monkeypatch.setattr(title_search, "_PASS_TOKENS", room)
    for prompt in prompts:  # one user, as `pplr recommend` asks
        passes.clear()
        found = search_titles(model, [prompt], trie, beams=9, exclude=[[]])
        taken = len(passes)
        _assert_same(found, _naive(model, [prompt], trie, 9, [[]]))
        steps = len(passes) - taken
        assert taken == steps if room == 1 else taken < steps / 2


def test_no_more_states_cross_than_are_announced(monkeypatch: pytest.MonkeyPatch):
    """The bound of a guarded run: the prompt, and twice the tokens of all beams."""
    monkeypatch.setattr(title_search, "_PASS_TOKENS", 10_000)
    trie, prompt = _trie(), _prompts(7)
    for beams in (1, 2, 5):
        model = _client(tiny_backbone(), PLANS[1])
        search_titles(model, prompt, trie, beams=beams, exclude=[[]])
        crossed = model.traffic.bytes_up / (32 * 4)
        assert crossed <= 7 + 2 * beams * (trie.max_length + 1)


def test_a_user_to_whom_no_title_is_left_is_told_none():
    model, trie, prompts = _client(tiny_backbone(), PLANS[1]), _trie(), _prompts(5, 8)
    every = list(range(len(WORDS)))
    found = search_titles(model, prompts, trie, beams=3, exclude=[every, []])
    assert found[0] == []
    _assert_same(found[1:], search_titles(model, prompts[1:], trie, beams=3, exclude=[[]]))
    assert search_titles(model, prompts[:1], trie, beams=3, exclude=[every]) == [[]]


def test_what_does_not_fit_is_refused():
    model = _client(tiny_backbone(), PLANS[1])
    with pytest.raises(DataError, match="token 300 of a vocabulary of 258"):
        search_titles(model, [[1, 2]], TitleTrie([[300]], 256), beams=2, exclude=[[]])
    with pytest.raises(DataError, match="item 10 is not among"):
        search_titles(model, [[1, 2]], _trie(), beams=2, exclude=[[10]])


@pytest.mark.parametrize("plan", PLANS[1:], ids=["k1-m1", "uncut"])
def test_who_waits_finds_what_is_found_alone(backbone: CausalLM, plan: CutPlan):
    """New users join those who still search, at other places and with other lengths, again and again."""
    model, trie, alike = _client(backbone, plan), _trie(), list(range(60, 63))
    prompts = _prompts(9, 4, 13, 1, 6, 30, 2, 5, 17, 8, 3, 11, alike=3)
    exclude = [EXCLUDE[number % 5] if number % 4 else list(range(10)) for number in range(len(prompts))]
    alone = [
        search_titles(model, [prompt], trie, beams=3, exclude=[own])[0]
        for prompt, own in zip(prompts, exclude, strict=True)
    ]
    for places in (1, 2, 5):
        found = list(walk_titles(model, prompts, trie, beams=3, exclude=exclude, opening=alike, places=places))
        assert sorted(number for number, _ in found) == list(range(len(prompts)))
        _assert_same([dict(found)[number] for number in range(len(prompts))], alone)


def test_new_users_join_those_who_still_search(monkeypatch: pytest.MonkeyPatch):
    """So fewer passes are made than batch by batch, and what was let go of is held no longer."""
    model, trie, held = _client(tiny_backbone(), PLANS[1]), _trie(), list[tuple[int, ...]]()
    prompts = _prompts(*([9, 4, 13, 1, 6, 30, 2, 5] * 4))
    exclude = [EXCLUDE[number % 5] for number in range(len(prompts))]
    extend = TokenTree.extend

    def counted(self: TokenTree, tokens: Any, after: Any) -> torch.Tensor:
        states = extend(self, tokens, after)
        held.append(self._sees.shape)
        return states

    monkeypatch.setattr(TokenTree, "extend", counted)
    monkeypatch.setattr(title_search, "_PASS_TOKENS", 1)
    dict(walk_titles(model, prompts, trie, beams=3, exclude=exclude, places=8))
    together = len(held)
    assert max(shape[1] for shape in held) < 200
    assert max(shape[2] for shape in held) < 200
    for start in range(0, len(prompts), 8):
        part = slice(start, start + 8)
        search_titles(model, prompts[part], trie, beams=3, exclude=exclude[part])
    assert together < len(held) - together


@pytest.mark.parametrize("plan", PLANS, ids=["k0-m0", "k1-m1", "uncut"])
def test_the_opening_is_run_once_for_an_adapter(plan: CutPlan):
    backbone, trie, opening = tiny_backbone(), _trie(), list(range(60, 70))
    cut = CutModel(backbone, plan, AdapterConfig(rank=4), TrainingConfig())
    model, (one, other) = cut.client("one", random_adapter(cut.shapes)), _prompts(4, 7, alike=10)

    def ask(prompt: list[int], opening: list[int]) -> tuple[list[Any], float]:
        before = model.traffic.bytes_up
        found = search_titles(model, [prompt], trie, beams=3, exclude=[[]], opening=opening)
        return found, (model.traffic.bytes_up - before) / (32 * 4)

    def check(prompt: list[int], runs_opening: bool) -> None:
        expected, whole = ask(prompt, [])
        found, crossed = ask(prompt, opening)
        _assert_same(found, expected)
        if model.transport is not None:
            assert crossed == whole - (0 if runs_opening else 10)

    check(one, runs_opening=True)
    check(other, runs_opening=False)
    model.set_adapter(random_adapter(cut.shapes, seed=1))
    assert not model.openings
    check(other, runs_opening=True)
    check(one, runs_opening=False)
    for tensor in model.adapter().values():  # whoever writes it, and wherever it is
        tensor.add_(0.1)
    check(one, runs_opening=True)
    check(other, runs_opening=False)
    if plan.middle and cut.host is not None:
        cut.host.discard("one")
        check(other, runs_opening=model.transport is not None)
    model.begin_round(1)
    assert not model.openings
    for start in range(5):
        model.opening([start, 7, 8])
    assert len(model.openings) == 2
    if cut.host is not None and model.transport is not None:
        assert len(cut.host._of("one").caches) == 2
