"""The decoder as a backbone: each family keeps the contract; text, tokens and loss are what they should be."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from pplr.backbones.base import Backbone
from pplr.backbones.causal_lm import FAMILIES, CausalLM, EncodedSample
from pplr.config import AdapterConfig, PromptConfig, TrainingConfig
from pplr.data.prompts import PromptTemplate, Sample
from pplr.errors import BackboneError, DataError, UnsupportedModelError
from pplr.stages.cut import CutPlan
from pplr.stages.model import CutModel
from pplr.testing import (
    BackboneContract,
    peft_model,
    random_adapter,
    refuses,
    tiny_backbone,
    tiny_catalog,
    tiny_decoder,
    tiny_samples,
    tiny_tokenizer,
)

PROMPT = PromptConfig(noun="trees", verb="planted", instruction="Name one of the {noun}.")


class TestLlama(BackboneContract):
    def make(self) -> Backbone:
        return tiny_backbone("llama")


class TestMistral(BackboneContract):
    def make(self) -> Backbone:
        return tiny_backbone("mistral", sliding_window=16)


class TestQwen2(BackboneContract):
    def make(self) -> Backbone:
        return tiny_backbone("qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=2)


class TestQwen3(BackboneContract):
    def make(self) -> Backbone:
        return tiny_backbone("qwen3")


def test_every_family_has_its_contract():
    tested = {kind().make().model.config.model_type for kind in (TestLlama, TestMistral, TestQwen2, TestQwen3)}
    assert tested == set(FAMILIES)


@pytest.fixture(scope="module")
def trees() -> CausalLM:
    return CausalLM(tiny_decoder(), tiny_tokenizer(), prompt=PROMPT, max_tokens=256)


def test_other_families_are_refused_by_name():
    decoder = tiny_decoder("gpt2", n_layer=2, n_head=2, n_embd=32, n_positions=64)
    with refuses(UnsupportedModelError, "'gpt2'"):
        CausalLM(decoder, tiny_tokenizer())


def test_a_tokenizer_without_an_end_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with refuses(BackboneError, "end token"):
        CausalLM(tiny_decoder(layers=1), tokenizer)


# -- text to tokens -------------------------------------------------------------------------------------------


def test_prompt_and_answer_are_the_template_byte_for_byte(trees: CausalLM):
    template, catalog = PromptTemplate(PROMPT), tiny_catalog()
    for sample, encoded in zip(tiny_samples(), trees.encode(tiny_samples(), catalog, 10), strict=True):
        history = [catalog.titles[item] for item in sample.history]
        assert bytes(encoded.prompt) == _as_tokens(trees, template.prompt(history))
        *answer, end = encoded.answer
        assert bytes(answer) == _as_tokens(trees, template.answer(catalog.titles[sample.target]))
        assert end == trees.end_token == 256


def _as_tokens(backbone: CausalLM, text: str) -> bytes:
    return bytes(backbone.tokenizer(text, add_special_tokens=False).input_ids)


titles = st.text(alphabet=st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=12)


@given(st.lists(titles, min_size=1, max_size=6), titles)
def test_prompts_read_back_as_they_were_written(trees: CausalLM, history: Sequence[str], target: str):
    text = trees.template.prompt(history)
    if len(text.encode()) <= trees.max_tokens:
        assert trees.tokenizer.decode(list(trees.prompt_tokens(history, reserve=0))) == text
    answer = trees.answer_tokens(target)
    assert trees.tokenizer.decode(list(answer[:-1])) == trees.template.answer(target)


def test_the_newest_items_stay_and_no_title_is_cut(trees: CausalLM):
    history = [f"Title number {number}" for number in range(20)]
    whole = len(trees.template.prompt(history[-1:]).encode())
    room = trees.max_tokens
    for reserve in (0, 10, 60):
        tokens = trees.prompt_tokens(history, reserve)
        text = trees.tokenizer.decode(list(tokens))
        kept = max(n for n in range(1, 21) if len(trees.template.prompt(history[-n:])) + reserve <= room)
        assert text == trees.template.prompt(history[-kept:])
        assert whole <= len(tokens) <= room - reserve


def test_a_title_that_does_not_fit_is_refused(trees: CausalLM):
    with refuses(DataError, "more than the 256 allowed"):
        trees.prompt_tokens(["short", "x" * 300], 10)
    with refuses(DataError, "no items"):
        trees.prompt_tokens([], 10)


def test_training_and_inference_shorten_a_history_alike(trees: CausalLM):
    """A prompt that is nearly too long must not hold more titles in training than when it is asked for real."""
    catalog = tiny_catalog()
    longest = max(len(trees.answer_tokens(title)) for title in catalog.titles)
    histories = [tuple(range(7)) * times for times in range(1, 5)]
    encoded = trees.encode([Sample(0, history, 0) for history in histories], catalog, 100)
    for history, sample in zip(histories, encoded, strict=True):
        assert sample.prompt == trees.prompt_tokens([catalog.titles[item] for item in history], longest)
    assert len(encoded[-1].prompt) < len(trees.template.prompt([catalog.titles[item] for item in histories[-1]]))


def test_a_start_token_is_written_where_the_tokenizer_writes_one():
    from tokenizers import processors

    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<end>"
    without = CausalLM(tiny_decoder(layers=1), tokenizer, max_tokens=256, prompt=PROMPT)
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<end>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<end> $A", special_tokens=[("<end>", 256)]
    )
    starting = CausalLM(tiny_decoder(layers=1), tokenizer, max_tokens=256, prompt=PROMPT)
    assert starting.prompt_tokens(["Oak"], 0) == (256, *without.prompt_tokens(["Oak"], 0))
    assert starting.text_tokens("Oak") == (256, *without.text_tokens("Oak"))
    assert starting.answer_tokens("Oak") == without.answer_tokens("Oak")


@pytest.mark.parametrize(
    ("written", "title"),
    [
        ('"Oak"\n', "Oak"),
        ('"Oak"', "Oak"),
        ("Oak\nand more", "Oak"),
        ("  \"The 'Oak'\" \n\n", "The 'Oak'"),
        ("\n\n", ""),
        ('""\n', ""),
        ("", ""),
    ],
)
def test_an_answer_is_read_as_a_title(trees: CausalLM, written: str, title: str):
    tokens = [*trees.tokenizer(written, add_special_tokens=False).input_ids, trees.end_token]
    assert trees.read_answer(tokens) == title


@given(titles)
def test_an_answer_that_is_a_title_reads_as_it_is_shown(trees: CausalLM, title: str):
    from pplr.data.prompts import shown_title

    shown = shown_title(title)
    if "\n" not in shown and shown == shown.strip().strip('"'):
        assert trees.read_answer(trees.answer_tokens(title)) == shown


# -- tokens to loss -------------------------------------------------------------------------------------------


def test_batches_are_padded_on_the_right(trees: CausalLM):
    batch = trees.collate([EncodedSample((1, 2, 3), (4, 5)), EncodedSample((6,), (7, 8))])
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 257, 257]]
    assert batch.is_target.tolist() == [[False, False, False, True, True], [False, True, True, False, False]]
    assert batch.lengths.tolist() == [5, 3]
    assert (batch.samples, batch.tokens, batch.targets) == (2, 8, 4)


def test_without_a_padding_token_the_end_pads():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    backbone = CausalLM(tiny_decoder(layers=1), tokenizer)
    assert backbone.pad([[1], [2, 3]]).input_ids.tolist() == [[1, 256], [2, 3]]


def _cut(backbone: CausalLM) -> CutModel:
    return CutModel(backbone, CutPlan(1, 1, 4), AdapterConfig(rank=2, dropout=0.0), TrainingConfig())


def test_the_loss_is_over_answer_tokens_only(trees: CausalLM):
    cut = _cut(trees)
    start = random_adapter(cut.shapes)
    model, whole = cut.client("one", start), peft_model(trees, AdapterConfig(rank=2), start)
    encoded = trees.encode(tiny_samples(), tiny_catalog(), 10)
    batch = trees.collate(encoded)
    labels = torch.full_like(batch.input_ids, -100)
    for row, sample in enumerate(encoded):
        labels[row, len(sample.prompt) : len(sample.prompt) + len(sample.answer)] = torch.tensor(sample.answer)
    mask = (torch.arange(labels.shape[1])[None] < batch.lengths[:, None]).long()
    with torch.no_grad():
        expected = whole(input_ids=batch.input_ids, attention_mask=mask, labels=labels).loss
        prompts_too = whole(input_ids=batch.input_ids, attention_mask=mask, labels=batch.input_ids).loss
    own = model.evaluation_loss(batch) / batch.targets
    torch.testing.assert_close(own, expected, rtol=1e-6, atol=1e-6)
    assert not torch.isclose(own, prompts_too, rtol=1e-3)  # the loss over prompts would be another


def test_the_head_runs_where_an_answer_token_is_predicted_and_nowhere_else(trees: CausalLM):
    batch = trees.collate(trees.encode(tiny_samples(), tiny_catalog(), 10))
    cut = _cut(trees)
    model = cut.client("one", cut.initial_adapter(0))
    rows = []
    handle = trees.model.lm_head.register_forward_hook(lambda _, args, __: rows.append(args[0].shape))
    try:
        model.train_loss(batch, 0)
        model.evaluation_loss(batch)
    finally:
        handle.remove()
    assert rows == [(batch.targets, 32)] * 2
    assert batch.targets < batch.tokens / 4


def test_the_loss_is_the_naive_sum(trees: CausalLM):
    batch = trees.pad([[1, 2, 3, 4], [5, 6, 7]], [2, 1])
    states = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(0))
    logits = trees.logits(states).log_softmax(-1)
    naive = -(logits[0, 1, 3] + logits[0, 2, 4] + logits[1, 0, 6] + logits[1, 1, 7])
    torch.testing.assert_close(trees.loss(states, batch), naive)


def test_the_first_token_is_never_a_target_to_predict(trees: CausalLM):
    states = torch.zeros(1, 3, 32)
    batch = trees.pad([[1, 2, 3]], [0])  # nothing comes before the first token
    uniform = F.cross_entropy(trees.logits(states[0, :1]), torch.tensor([2]))
    assert float(trees.loss(states, batch)) == pytest.approx(2 * float(uniform), rel=1e-5)


# -- the frozen base ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_bytes_on_the_client_are_those_of_embeddings_norm_and_head(tied: bool):
    backbone = CausalLM(tiny_decoder(tie_word_embeddings=tied), tiny_tokenizer())
    assert backbone.client_bytes() == 4 * (258 * 32 * (1 if tied else 2) + 32)


def test_the_fingerprint_tells_models_apart():
    prints = [
        tiny_backbone().fingerprint(),
        tiny_backbone(seed=1).fingerprint(),
        tiny_backbone(layers=3).fingerprint(),
        CausalLM(tiny_decoder().to(torch.bfloat16), tiny_tokenizer()).fingerprint(),
    ]
    assert len(set(prints)) == 4
    changed = tiny_backbone()
    with torch.no_grad():
        changed.model.model.layers[2].mlp.up_proj.weight[3, 4] += 1e-3
    assert changed.fingerprint() not in prints
    assert tiny_backbone().fingerprint() == prints[0]


def test_bfloat16_keeps_adapters_in_float32():
    backbone = CausalLM(tiny_decoder().to(torch.bfloat16), tiny_tokenizer())
    cut = _cut(backbone)
    model = cut.client("one", random_adapter(cut.shapes))
    batch = backbone.collate(backbone.encode(tiny_samples()[:2], tiny_catalog(), 3))
    model.begin_round(2)
    model.train_loss(batch, 0).backward()
    model.optimizer_step(1.0)
    assert model.hidden_states(batch).dtype == torch.bfloat16
    assert all(tensor.dtype == torch.float32 for tensor in model.adapter().values())
    assert model.traffic.bytes_up == 3 * batch.tokens * 32 * 2  # forward, backward, evaluation, two bytes a number
