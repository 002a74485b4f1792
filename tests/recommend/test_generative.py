"""From cases to scores: each short cut against the slow way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pplr.backbones.causal_lm import CausalLM
from pplr.config import AdapterConfig, EvaluationConfig, PromptConfig, TrainingConfig
from pplr.data.interactions import Catalog
from pplr.data.prompts import Case, PromptTemplate
from pplr.errors import ConfigError, StorageError
from pplr.recommend import generative
from pplr.recommend.evaluation import evaluate, scored
from pplr.recommend.generative import GenerativeRanker, TitleSpace, embed_texts, read_texts
from pplr.recommend.metrics import batch_ranks
from pplr.recommend.trie import TitleTrie
from pplr.stages.client_model import ClientModel
from pplr.stages.cut import CutPlan
from pplr.stages.model import CutModel
from pplr.storage import cache_dir
from pplr.testing import peft_model, random_adapter, refuses, tiny_catalog, tiny_decoder, tiny_tokenizer

PROMPT = PromptConfig(noun="trees", verb="planted", instruction="Name one of the {noun}.")
CASES = [
    Case(user=0, history=(0, 1), targets=(2,), seen=(0, 1)),
    Case(user=1, history=(5,), targets=(3,), seen=(5, 4)),
    Case(user=2, history=(7, 2, 3, 1, 0), targets=(4,), seen=(7, 2, 3, 1, 0)),
]
TEXTS = ["Oak", "Birch", "a much longer text, by far", "Yew", "Oak", "Elm"]


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setenv("PPLR_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def trees() -> CausalLM:
    return CausalLM(tiny_decoder(), tiny_tokenizer(), prompt=PROMPT, max_tokens=256)


@pytest.fixture(scope="module")
def model(trees: CausalLM) -> ClientModel:
    cut = CutModel(trees, CutPlan(1, 1, 4), AdapterConfig(rank=4), TrainingConfig())
    return cut.client("one", random_adapter(cut.shapes))


@pytest.fixture
def space(model: ClientModel) -> TitleSpace:
    return TitleSpace.build(model, tiny_catalog())


def naive_embedding(backbone: CausalLM, text: str, pooling: str = "last") -> torch.Tensor:
    """The uncut base model, one text, no padding."""
    tokens = backbone.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        states = backbone.model.model(input_ids=tokens).last_hidden_state[0]
    return states[-1] if pooling == "last" else states.mean(dim=0)


# -- embeddings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("batch_tokens", [1, 8, 4096])
def test_embeddings_are_those_of_one_text_at_a_time(
    trees: CausalLM, model: ClientModel, monkeypatch: pytest.MonkeyPatch, batch_tokens: int, pooling: str
):
    monkeypatch.setattr(generative, "_BATCH_TOKENS", batch_tokens)
    told: list[int] = []
    embedded = embed_texts(model, TEXTS, told.append, pooling=pooling)
    assert embedded.shape == (6, 32)
    assert embedded.dtype == torch.float32
    naive = torch.stack([naive_embedding(trees, text, pooling) for text in TEXTS])
    torch.testing.assert_close(embedded, naive, rtol=1e-5, atol=1e-5)
    assert torch.equal(embedded[0], embedded[4])
    assert sum(told) == 5  # each different text once


def test_embeddings_do_not_depend_on_adapter_or_cut(trees: CausalLM, model: ClientModel):
    expected = embed_texts(model, TEXTS)
    for plan in (CutPlan(0, 0, 4), CutPlan(2, 1, 4), CutPlan.make(None, 4)):
        cut = CutModel(trees, plan, AdapterConfig(rank=2), TrainingConfig())
        for seed in range(2):
            other = cut.client(str(seed), random_adapter(cut.shapes, seed))
            assert torch.equal(embed_texts(other, TEXTS), expected)


def test_texts_are_kept_by_how_their_tokens_are_pooled(model: ClientModel):
    for _ in range(2):
        assert torch.equal(read_texts(model, TEXTS), embed_texts(model, TEXTS, pooling="mean"))
        assert torch.equal(read_texts(model, TEXTS, pooling="last"), embed_texts(model, TEXTS))


def test_items_of_one_title_share_a_row(space: TitleSpace):
    assert space.embeddings.shape == (7, 32)
    assert space.title_of.tolist() == [0, 1, 2, 3, 4, 5, 5, 6]


def test_titles_that_are_shown_alike_share_a_row(model: ClientModel):
    catalog = Catalog(("a", "b", "c"), ('The "Oak"', "The  'Oak'", "Oak"))
    assert TitleSpace.build(model, catalog).title_of.tolist() == [0, 0, 1]


def test_titles_are_embedded_once(model: ClientModel, space: TitleSpace, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(generative, "embed_texts", None)  # calling it again would fail
    again = TitleSpace.build(model, tiny_catalog())
    assert torch.equal(again.embeddings, space.embeddings)
    assert torch.equal(again.title_of, space.title_of)


@pytest.mark.parametrize("other", ["titles", "order", "model"])
def test_other_titles_and_other_models_are_embedded_anew(model: ClientModel, space: TitleSpace, other: str):
    catalog, reader = tiny_catalog(), model
    if other == "titles":
        catalog = Catalog(catalog.item_ids, ("Asp", *catalog.titles[1:]))
    elif other == "order":
        catalog = Catalog(catalog.item_ids, catalog.titles[::-1])
    else:
        backbone = CausalLM(tiny_decoder(seed=1), tiny_tokenizer(), prompt=PROMPT, max_tokens=256)
        cut = CutModel(backbone, CutPlan(1, 1, 4), AdapterConfig(rank=4), TrainingConfig())
        reader = cut.client("one", cut.initial_adapter(0))
    told: list[int] = []
    TitleSpace.build(reader, catalog, told.append)
    assert sum(told) == 7


@pytest.mark.parametrize("suffix", [".safetensors", ".sha256"])
@pytest.mark.parametrize("damage", [lambda b: b[:-3], lambda b: b"", lambda b: b[:-1] + bytes([b[-1] ^ 1])])
def test_a_damaged_cache_is_refused_by_name(model: ClientModel, space: TitleSpace, suffix: str, damage):
    (path,) = (cache_dir() / "title_embeddings").glob(f"*{suffix}")
    path.write_bytes(damage(path.read_bytes()))
    stored = path.with_suffix(".safetensors")
    with refuses(StorageError, str(stored)):
        TitleSpace.build(model, tiny_catalog())
    stored.unlink()  # the cure
    again = TitleSpace.build(model, tiny_catalog())
    assert torch.equal(again.embeddings, space.embeddings)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells what is mapped")
def test_cached_embeddings_are_mapped_and_not_copied(model: ClientModel, space: TitleSpace):
    again = TitleSpace.build(model, tiny_catalog())
    assert torch.equal(again.embeddings, space.embeddings)
    (path,) = (cache_dir() / "title_embeddings").glob("*.safetensors")

    def lies_in_file(tensor: torch.Tensor) -> bool:
        lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
        spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
        first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        return any(start <= first and last <= end for start, end in spans)

    assert lies_in_file(again.embeddings)
    assert not lies_in_file(again.embeddings.clone())


# -- rankings -------------------------------------------------------------------------------------------------


def naive_l2(trees: CausalLM, whole, space: TitleSpace, case: Case, history_items: int) -> np.ndarray:
    """Prompt by the template, generate by transformers, embed by the base, and measure every item alone."""
    titles = space.catalog.titles
    text = PromptTemplate(PROMPT).prompt([titles[item] for item in case.history[-history_items:]])
    prompt = trees.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        written = whole.generate(
            input_ids=prompt, num_beams=2, do_sample=False, max_new_tokens=5, eos_token_id=[256, 10], pad_token_id=256
        )
    answer = trees.tokenizer.decode(written[0, prompt.shape[1] :], skip_special_tokens=True)
    answer = answer.strip().split("\n")[0].strip().strip('"').strip()
    if not answer:
        return np.zeros(len(titles))
    query = naive_embedding(trees, answer)
    return np.array([-float((query - naive_embedding(trees, title)).norm()) for title in titles])


@pytest.mark.parametrize("history_items", [1, 10])
def test_l2_scores_are_those_of_one_case_at_a_time(
    trees: CausalLM, model: ClientModel, space: TitleSpace, history_items: int
):
    config = EvaluationConfig(beams=2, max_new_tokens=5)
    scores = GenerativeRanker(model, space, config, history_items=history_items).scores(CASES)
    assert scores.shape == (3, 8)
    whole = peft_model(trees, AdapterConfig(rank=4), model.adapter())
    for row, case in enumerate(CASES):
        np.testing.assert_allclose(scores[row], naive_l2(trees, whole, space, case, history_items), rtol=1e-4)
        assert scores[row, 5] == scores[row, 6]  # one title
    assert len(np.unique(scores)) > 14  # and the cases are told apart


@pytest.mark.parametrize("grounding", ["l2", "trie"])
@pytest.mark.parametrize("beams", [1, 3])
def test_a_case_scores_alone_as_among_others(model: ClientModel, space: TitleSpace, grounding: str, beams: int):
    config = EvaluationConfig(grounding=grounding, beams=beams, max_new_tokens=5)
    ranker = GenerativeRanker(model, space, config, history_items=3)
    together = ranker.scores(CASES)
    for row, case in enumerate(CASES):
        alone = ranker.scores([case])[0]
        np.testing.assert_allclose(alone, together[row], rtol=1e-4, atol=1e-5)
        assert np.argsort(-alone, kind="stable").tolist() == np.argsort(-together[row], kind="stable").tolist()


def naive_title_odds(trees: CausalLM, model: ClientModel, case: Case, title: str) -> float:
    """Log-probability of a title and the end after the prompt, by one pass over both."""
    titles = tiny_catalog().titles
    prompt = trees.prompt_tokens([titles[item] for item in case.history], 0)
    answer = trees.answer_tokens(title)
    batch = trees.pad([(*prompt, *answer)], [len(prompt)])
    return -float(model.evaluation_loss(batch))


def test_trie_scores_put_the_likeliest_unseen_titles_first(trees: CausalLM, model: ClientModel, space: TitleSpace):
    """With a beam for every title the search is exhaustive, and its order is that of the titles' own odds."""
    config = EvaluationConfig(grounding="trie", beams=16)
    scores = GenerativeRanker(model, space, config, history_items=10).scores(CASES)
    titles = space.catalog.titles
    for row, case in enumerate(CASES):
        left = sorted(
            {title for item, title in enumerate(titles) if item not in case.seen},  # Oak stays while one is unseen
            key=lambda title: naive_title_odds(trees, model, case, title),
        )
        for place, title in enumerate(left, start=1):
            for item in space.catalog.by_title[title]:
                assert scores[row, item] == place, (row, title)
        told = [item for title in left for item in space.catalog.by_title[title]]
        others = [item for item in range(len(titles)) if item not in told]
        best = naive_embedding(trees, left[-1])
        for item in others:
            expected = -float((best - naive_embedding(trees, titles[item])).norm())
            assert scores[row, item] == pytest.approx(expected, rel=1e-4)
            assert scores[row, item] <= 0


@pytest.fixture(scope="module")
def lists() -> CausalLM:
    prompt = PROMPT.model_copy(update={"targets": "all"})
    return CausalLM(tiny_decoder(), tiny_tokenizer(), prompt=prompt, max_tokens=256)


def test_after_a_list_the_likeliest_unseen_lines_come_first(lists: CausalLM, space: TitleSpace):
    """Scores are the odds of a title and its line's end; no token ends a text, which lists never do."""
    cut = CutModel(lists, CutPlan(1, 1, 4), AdapterConfig(rank=4), TrainingConfig())
    model = cut.client("one", random_adapter(cut.shapes))
    config = EvaluationConfig(grounding="trie", beams=16)
    scores = GenerativeRanker(model, space, config, history_items=10).scores(CASES)
    titles = space.catalog.titles
    for row, case in enumerate(CASES):
        left = sorted(
            {title for item, title in enumerate(titles) if item not in case.seen},
            key=lambda title: naive_title_odds(lists, model, case, title),
        )
        assert [scores[row, titles.index(title)] for title in left] == list(range(1, len(left) + 1))


def test_after_a_list_the_next_line_is_written_and_no_more(lists: CausalLM, space: TitleSpace):
    cut = CutModel(lists, CutPlan(1, 1, 4), AdapterConfig(rank=4), TrainingConfig())
    model = cut.client("one", random_adapter(cut.shapes))
    ranker = GenerativeRanker(model, space, EvaluationConfig(beams=2, max_new_tokens=5), history_items=10)
    assert ranker.stop_tokens == [lists.answer_end]
    whole = peft_model(lists, AdapterConfig(rank=4), model.adapter())
    for row, case in enumerate(CASES):
        text = lists.template.prompt([space.catalog.titles[item] for item in case.history])
        prompt = lists.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        with torch.no_grad():
            told = whole.generate(
                input_ids=prompt, num_beams=2, do_sample=False, max_new_tokens=5,
                eos_token_id=[256, lists.answer_end], pad_token_id=256,
            )  # fmt: skip
        line = lists.tokenizer.decode(told[0, prompt.shape[1] :], skip_special_tokens=True)
        assert ranker.write(CASES)[row] == line.strip().split("\n")[0].strip().strip('"').strip()


def test_trie_answers_are_encoded_as_in_training(trees: CausalLM, model: ClientModel, space: TitleSpace):
    ranker = GenerativeRanker(model, space, EvaluationConfig(grounding="trie"), history_items=10)
    assert isinstance(ranker._trie, TitleTrie)
    for item, title in enumerate(space.catalog.titles):
        assert item in ranker._trie.items(trees.answer_tokens(title))


def test_an_empty_answer_ranks_nothing(model: ClientModel, space: TitleSpace, monkeypatch: pytest.MonkeyPatch):
    ranker = GenerativeRanker(model, space, EvaluationConfig(beams=1, max_new_tokens=3), history_items=10)
    some = ranker.scores(CASES)
    texts = ranker._texts
    monkeypatch.setattr(ranker, "_texts", lambda prompts: ["", *texts(prompts)[1:]])
    scores = ranker.scores(CASES)
    assert (scores[0] == scores[0, 0]).all()  # all items tie, which metrics count as the last place
    np.testing.assert_array_equal(scores[1:], some[1:])


def test_what_is_written_is_what_is_grounded(trees: CausalLM, model: ClientModel, space: TitleSpace):
    ranker = GenerativeRanker(model, space, EvaluationConfig(beams=2, max_new_tokens=5), history_items=10)
    texts = ranker.write(CASES)
    scores = ranker.scores(CASES)
    for row, text in enumerate(texts):
        query = naive_embedding(trees, text)
        naive = [-float((query - naive_embedding(trees, title)).norm()) for title in space.catalog.titles]
        np.testing.assert_allclose(scores[row], naive, rtol=1e-4)


def test_answers_stop_at_the_end_of_their_line(trees: CausalLM, model: ClientModel, space: TitleSpace):
    ranker = GenerativeRanker(model, space, EvaluationConfig(), history_items=10)
    assert ranker.stop_tokens == [trees.tokenizer("\n", add_special_tokens=False).input_ids[0]]


def test_another_backbone_is_refused(model: ClientModel, monkeypatch: pytest.MonkeyPatch):
    class Other:
        name = "other"

    monkeypatch.setattr(model, "backbone", Other())
    with refuses(ConfigError, "'other' writes no titles"):
        embed_texts(model, TEXTS)


def test_a_queue_scores_as_one_user_at_a_time(model: ClientModel, space: TitleSpace):
    """Evaluation and lists for all users take whoever waits; each is scored as alone."""
    config = EvaluationConfig(grounding="trie", beams=3)
    ranker = GenerativeRanker(model, space, config, history_items=10)
    cases = [Case(number, own.history, own.targets, own.seen) for number, own in enumerate(CASES * 3)]
    alone = np.concatenate([ranker.scores([case]) for case in cases])
    assert ranker.queues
    found = list(scored(ranker, cases, 2))
    assert sorted(place for places, _ in found for place in places) == list(range(len(cases)))
    for places, scores in found:
        np.testing.assert_allclose(scores, alone[places], rtol=1e-4, atol=1e-4)
    told = evaluate(ranker, {"a": cases[:5], "b": cases[5:]}, [1, 5], 2)
    naive = [batch_ranks(ranker.scores([case]), [case])[0][0] for case in cases]
    assert told.values["mrr"].tolist() == pytest.approx([1 / rank for rank in naive])
    by_distance = GenerativeRanker(model, space, EvaluationConfig(beams=2, max_new_tokens=4), history_items=10)
    assert not by_distance.queues


def test_the_opening_of_prompts_crosses_once(trees: CausalLM, space: TitleSpace):
    """What every prompt begins with tells of no user, and is kept until the adapter changes."""
    cut = CutModel(trees, CutPlan(1, 1, 4), AdapterConfig(rank=4), TrainingConfig())
    one = cut.client("one", random_adapter(cut.shapes))
    for config in (EvaluationConfig(grounding="trie", beams=2), EvaluationConfig(beams=2, max_new_tokens=3)):
        ranker = GenerativeRanker(one, space, config, history_items=10)
        one.openings.close()
        readings = []
        for _ in range(2):
            before = one.traffic.bytes_up
            readings.append(ranker.scores(CASES[:1]))
            readings.append(one.traffic.bytes_up - before)
        np.testing.assert_array_equal(readings[0], readings[2])
        assert readings[1] - readings[3] == len(trees.opening) * 32 * 4
        assert len(trees.opening) > 10
