"""Lists of which every title is a target: each as if it were alone, and none twice or never."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pplr.backbones import titles
from pplr.backbones.causal_lm import CausalLM
from pplr.config import AdapterConfig, BackboneConfig, PromptConfig, TrainingConfig
from pplr.data.prompts import Sample
from pplr.errors import DataError
from pplr.stages.client_model import ClientModel
from pplr.stages.cut import CutPlan
from pplr.stages.model import CutModel
from pplr.testing import BackboneContract, random_adapter, refuses, tiny_backbone, tiny_catalog, tiny_samples

CATALOG = tiny_catalog()
WALK = (1, 2, 4, 5, 7, 0, 3)
PROMPT = PromptConfig(noun="trees", verb="planted", instruction="Name one.", targets="all")


def a_list(*items: int) -> Sample:
    return Sample(0, items[:-1], items[-1], every=True)


class TestLists(BackboneContract):
    def make(self) -> CausalLM:
        return tiny_backbone(targets="all")

    def encoded(self, backbone):
        samples = [replace(sample, every=True) for sample in tiny_samples()]
        return backbone.encode(samples, CATALOG, history_items=3)


@pytest.fixture(scope="module")
def lists() -> CausalLM:
    return tiny_backbone(targets="all")


@pytest.fixture(scope="module")
def backbone() -> CausalLM:
    return CausalLM(tiny_backbone(layers=1).model, tiny_backbone().tokenizer, prompt=PROMPT)


def a_client(backbone: CausalLM, plan: CutPlan, seed: int = 0) -> ClientModel:
    cut = CutModel(backbone, plan, AdapterConfig(rank=2, dropout=0.0), TrainingConfig())
    return cut.client("one", random_adapter(cut.shapes, seed))


def gradients(model: ClientModel) -> list[Tensor]:
    optimizers = model.optimizer._clipped_together(middle=True)
    return [own.grad for optimizer in optimizers for own in optimizer.parameters.values() if own.grad is not None]


# -- text to tokens -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", ["one", "all"])
def test_many_samples_are_encoded_as_each_alone(monkeypatch: pytest.MonkeyPatch, targets: Literal["one", "all"]):
    monkeypatch.setattr(titles, "_AT_ONCE", 4)
    backbone = tiny_backbone(targets=targets)
    tokens, items = backbone.titles, [0, 3, 5, 1, 2, 4, 7]
    samples = [Sample(0, tuple(items[:place]), items[place]) for place in range(1, len(items))] * 3
    lengths = [len(tokens.whole_prompt([CATALOG.titles[item] for item in sample.history])) for sample in samples]
    most = max(lengths) + tokens.room(CATALOG) - 1  # so that some are cut off
    alone = [tokens.encode(sample, CATALOG, 6, most) for sample in samples]
    assert tokens.encode_all(samples, CATALOG, 6, most) == alone
    assert max(len(own.prompt) for own in alone) < max(lengths)
    assert tokens.encode_all([], CATALOG, 6, most) == []
    with refuses(DataError, "no items"):
        tokens.encode_all([Sample(0, (), 1)], CATALOG, 6, most)


def test_a_sample_is_a_list_where_every_title_is_a_target():
    for targets, kind in (("one", "target"), ("all", "history")):
        assert CausalLM.samples_of(BackboneConfig(prompt=PromptConfig(targets=targets))) == kind


def test_a_list_is_the_template_byte_for_byte(lists: CausalLM):
    (encoded,) = lists.encode([a_list(*WALK)], CATALOG, 10)
    titles = [CATALOG.titles[item] for item in WALK]
    text = lists.template.prompt(titles[:-1]) + lists.template.answer(titles[-1])
    assert lists.tokenizer.decode([*encoded.prompt, *encoded.answer]) == text == lists.template.prompt(titles)
    assert lists.tokenizer.decode(list(encoded.answer)) == "".join(f"{title}\n" for title in titles[1:])


def test_what_is_asked_for_begins_as_what_was_trained_on(lists: CausalLM):
    """A prompt in inference is a beginning of the list in training, and the answer what follows there."""
    (encoded,) = lists.encode([a_list(*WALK)], CATALOG, 10)
    whole, titles = encoded.prompt + encoded.answer, [CATALOG.titles[item] for item in WALK]
    for place in range(1, len(titles)):
        asked = lists.prompt_tokens(titles[:place], lists.answer_room(CATALOG))
        said = lists.answer_tokens(titles[place])
        assert whole[: len(asked) + len(said)] == asked + said
        assert said.index(lists.answer_end) == len(said) - 1
        assert lists.read_answer(said) == titles[place]


def test_a_list_of_nothing_or_of_too_long_a_title_is_refused(lists: CausalLM):
    with refuses(DataError, "no items"):
        lists.prompt_tokens([], 0)
    with refuses(DataError, "more than the 512 allowed"):
        lists.prompt_tokens(["Oak", "x" * 500], 10)


@given(
    st.lists(st.integers(0, 7), min_size=2, max_size=40),
    st.integers(0, 60),
)
def test_long_lists_are_divided_so_that_every_title_is_a_target_once(
    backbone: CausalLM, items: Sequence[int], spare: int
):
    backbone.max_tokens = len(backbone.prompt_tokens(["Copper Beech"], 0)) + backbone.answer_room(CATALOG) + spare
    parts = backbone.divide([a_list(*items)], CATALOG)
    encoded = backbone.encode(parts, CATALOG, 100)
    asked = [item for part in parts for item in (*part.history[1:], part.target)]
    assert asked == list(items[1:])
    for part, one in zip(parts, encoded, strict=True):
        assert backbone.length(one) <= backbone.max_tokens
        lines = "".join(backbone.template.answer(CATALOG.titles[item]) for item in (*part.history[1:], part.target))
        assert backbone.tokenizer.decode(list(one.answer)) == lines  # nothing is left out of a part
        titles = [CATALOG.titles[item] for item in part.history]
        prompt = backbone.prompt_tokens(titles, backbone.answer_room(CATALOG))
        assert one.prompt + one.answer[: len(prompt) - len(one.prompt)] == prompt  # as long as when it is asked


def test_single_targets_and_short_lists_are_not_divided(lists: CausalLM):
    samples = [*tiny_samples(), a_list(*WALK)]
    assert lists.divide(samples, CATALOG) == samples
    one = tiny_backbone(layers=1)
    assert one.divide(samples, CATALOG) == samples


def test_too_long_a_list_keeps_its_newest_titles(lists: CausalLM):
    sample = a_list(*WALK)
    (newest,) = lists.encode([a_list(*WALK[-3:])], CATALOG, 10)
    assert lists.encode([sample], CATALOG, 2) == [newest]


# -- every target as if it were alone -------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [CutPlan.make(None, 4), CutPlan(1, 1, 4)])
def test_a_list_trains_as_its_targets_one_at_a_time(lists: CausalLM, plan: CutPlan):
    """A decoder looks back alone: loss and gradient of a list are sums of those of each title after its history."""
    ones = [Sample(0, WALK[:place], WALK[place]) for place in range(1, len(WALK))]
    model = a_client(lists, plan)
    alone = []
    for one in lists.encode(ones, CATALOG, 10):
        loss = model.train_loss(lists.collate([one]), None)
        loss.backward()
        alone.append(loss.detach())
    expected = [gradient.clone() for gradient in gradients(model)]
    other = a_client(lists, plan)
    batch = lists.collate(lists.encode([a_list(*WALK)], CATALOG, 10))
    loss = other.train_loss(batch, None)
    loss.backward()
    torch.testing.assert_close(loss.detach(), torch.stack(alone).sum(), rtol=1e-6, atol=0)
    packed = gradients(other)
    assert len(packed) == len(expected) == 16
    for one, sums in zip(packed, expected, strict=True):
        torch.testing.assert_close(one, sums, rtol=1e-4, atol=1e-5 * float(sums.abs().max()))


def test_the_loss_of_each_target_is_that_of_its_own_prompt(lists: CausalLM):
    model = a_client(lists, CutPlan(1, 1, 4))
    batch = lists.collate(lists.encode([a_list(*WALK)], CATALOG, 10))
    states = model.hidden_states(batch)
    ends = (batch.input_ids[0] == lists.answer_end).nonzero()[:, 0][-len(WALK) :]  # of each title's line
    for place in range(1, len(WALK)):
        own = torch.zeros_like(batch.is_target)
        own[0, ends[place - 1] + 1 : ends[place] + 1] = True
        (one,) = lists.encode([Sample(0, WALK[:place], WALK[place])], CATALOG, 10)
        expected = model.evaluation_loss(lists.collate([one]))
        torch.testing.assert_close(lists.loss(states, replace(batch, is_target=own)), expected, rtol=1e-5, atol=1e-5)


def test_a_title_does_not_see_what_follows(lists: CausalLM):
    """Other titles later on leave what comes before bit for bit as it is."""
    model = a_client(lists, CutPlan(1, 1, 4))
    batch = lists.collate(lists.encode([a_list(*WALK)], CATALOG, 10))
    changed = replace(batch, input_ids=batch.input_ids.clone())
    changed.input_ids[0, -5:] = 65
    before, after = model.hidden_states(batch)[0], model.hidden_states(changed)[0]
    assert torch.equal(before[:-5], after[:-5])
    assert not torch.equal(before[-5:], after[-5:])


def test_users_in_one_batch_do_not_see_each_other(lists: CausalLM):
    """What one row holds, of the same length or not, changes no bit of another row's loss and states."""
    model = a_client(lists, CutPlan(1, 1, 4))
    rows = lists.encode([a_list(*WALK[:4]), a_list(*WALK)], CATALOG, 10)
    batch = lists.collate(rows)
    changed = replace(batch, input_ids=batch.input_ids.clone())
    changed.input_ids[1] = changed.input_ids[1].flip(0)
    changed.input_ids[0, batch.lengths[0] :] = 70  # nor what pads
    first, second = (model.hidden_states(own) for own in (batch, changed))
    real = int(batch.lengths[0])
    assert torch.equal(first[0, :real], second[0, :real])
    assert not torch.equal(first[1], second[1])
    own = replace(batch, is_target=batch.is_target & torch.tensor([[True], [False]]))
    assert torch.equal(lists.loss(first, own), lists.loss(second, own))
