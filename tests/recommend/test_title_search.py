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
from pplr.recommend.title_search import search_titles
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
