"""Operations by arithmetic against those that torch counts while it computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.llama_costs import Shape
from benchmarks.llama_costs import flops as llama_flops
from pplr.backbones.base import Backbone, Batch
from pplr.backbones.item_vectors import ItemVectors
from pplr.config import AdapterConfig, EncoderConfig, ItemVectorsConfig, TrainingConfig
from pplr.stages.cut import CutPlan
from pplr.stages.flops import Flops, FlopsOfCut
from pplr.stages.model import CutModel
from pplr.stages.optimizer import LocalObjective
from pplr.testing import random_adapter, tiny_backbone, tiny_catalog, tiny_encoder, tiny_samples
from pplr.testing.checks import counted_operations


def one_batch(backbone: Backbone, samples: int = 1) -> Batch:
    catalog = tiny_catalog()
    if not isinstance(backbone, ItemVectors):
        backbone.prepare(catalog, lambda texts: torch.zeros(len(texts), backbone.hidden_size))
    return backbone.collate(backbone.encode(tiny_samples()[-samples:], catalog, history_items=3))


def counted(backbone: Backbone, batch: Batch, adapter: AdapterConfig, *, train_a: bool = True) -> int:
    """Train on a batch with the uncut model, and count."""
    whole = CutModel(backbone, CutPlan.make(None, backbone.total_layers), adapter, TrainingConfig())
    start = random_adapter(whole.shapes) if adapter.kind == "lora" else whole.initial_adapter(0)
    model = whole.client("one", start)
    model.begin_round(1, LocalObjective(train_a=train_a))
    with counted_operations() as counter:
        model.train_loss(batch, 0).backward()
    model.end_round()
    return int(counter.get_total_flops())


def worked_out(backbone: Backbone, batch: Batch, adapter: AdapterConfig, *, train_a: bool = True) -> Flops:
    plan = CutPlan.make(None, backbone.total_layers)
    found = FlopsOfCut(backbone, plan, adapter, train_a=train_a).training(batch)
    assert found is not None
    return found


ADAPTED = ("v_proj", "q_proj", "k_proj", "o_proj", "up_proj", "down_proj", "q_proj down_proj")
WIDER = {"hidden_width": 12, "negatives": 3, "residuals": "client"}


@pytest.mark.parametrize("targets", ADAPTED)
@pytest.mark.parametrize("train_a", [True, False])
def test_whatever_is_adapted_the_first_block_s_backward_pass_is_as_short_as_it_can_be(
    targets: str, train_a: bool
) -> None:
    backbone = tiny_backbone("llama", layers=2)
    batch, adapter = one_batch(backbone), AdapterConfig(rank=3, target_modules=tuple(targets.split()))
    expected = counted(backbone, batch, adapter, train_a=train_a)
    assert worked_out(backbone, batch, adapter, train_a=train_a).whole == expected


def test_whole_blocks_are_trained_at_what_their_weights_take_more() -> None:
    adapter = AdapterConfig(kind="full")
    for backbone in (tiny_backbone("llama", layers=2), tiny_encoder(num_hidden_layers=2)):
        batch = one_batch(backbone)
        assert worked_out(backbone, batch, adapter).whole == counted(backbone, batch, adapter)


@pytest.mark.parametrize("settings", [{}, {"hidden_width": 12}, {"negatives": 2}, WIDER])
def test_the_ends_of_item_vectors(settings: dict[str, Any]) -> None:
    text = tiny_backbone("llama", layers=2)
    backbone = ItemVectors(text, ItemVectorsConfig(width=8, **settings))
    backbone.prepare(tiny_catalog(), lambda texts: torch.randn(len(texts), text.hidden_size))
    batch, adapter = one_batch(backbone), AdapterConfig(rank=2)
    assert worked_out(backbone, batch, adapter).whole == counted(backbone, batch, adapter)


@pytest.mark.parametrize("negatives", [None, 3])
def test_the_end_of_an_encoder(negatives: int | None) -> None:
    backbone = tiny_encoder(config=EncoderConfig(negatives=negatives), num_hidden_layers=2)
    batch, adapter = one_batch(backbone), AdapterConfig(rank=2, target_modules=("query", "dense"))
    assert worked_out(backbone, batch, adapter).whole == counted(backbone, batch, adapter)


def test_what_is_read_alone_has_no_backward_pass() -> None:
    backbone = tiny_encoder(num_hidden_layers=2)
    batch, adapter = one_batch(backbone), AdapterConfig(rank=2, target_modules=("query",))
    plan = CutPlan(1, 0, 2)
    found = FlopsOfCut(backbone, plan, adapter).reading(batch)
    cut = CutModel(backbone, plan, adapter, TrainingConfig())
    with counted_operations() as counter:
        cut.client("one", random_adapter(cut.shapes)).hidden_states(batch)
    assert found is not None
    assert found.client == found.server == found.whole // 2
    assert found.whole == counter.get_total_flops()


def test_sequences_in_one_row_are_counted_as_they_stand() -> None:
    backbone, adapter = tiny_backbone("llama", layers=2), AdapterConfig(rank=2)
    encoded = backbone.encode([tiny_samples()[-1]] * 3, tiny_catalog(), history_items=3)  # of one length: no padding
    row = backbone.collate_row(encoded)
    assert worked_out(backbone, row, adapter).whole == counted(backbone, row, adapter)
    assert worked_out(backbone, row, adapter).whole < worked_out(backbone, backbone.collate(encoded), adapter).whole


def test_padding_counts_nothing() -> None:
    backbone, adapter = tiny_backbone("llama", layers=2), AdapterConfig(rank=2)
    encoded = backbone.encode(tiny_samples(), tiny_catalog(), history_items=3)
    alone = [worked_out(backbone, backbone.collate([sample]), adapter) for sample in encoded]
    assert worked_out(backbone, backbone.collate(encoded), adapter) == sum(alone, Flops())


def test_a_windowed_attention_is_not_counted() -> None:
    backbone = tiny_encoder("longformer", num_hidden_layers=2)
    found = FlopsOfCut(backbone, CutPlan(1, 0, 2), AdapterConfig(target_modules=("query",)))
    assert not found.is_known
    assert found.training(one_batch(backbone)) is None
    assert found.reading(one_batch(backbone)) is None


def test_the_benchmarks_count_alike_but_for_the_half_of_attention_that_looks_ahead() -> None:
    backbone, adapter = tiny_backbone("llama", layers=3, num_key_value_heads=4), AdapterConfig(rank=2)
    batch = one_batch(backbone)
    tokens, width = batch.tokens, backbone.hidden_size
    shape = Shape(width=width, blocks=3, heads=4, mlp_width=2 * width, vocabulary=258, input_layers=1, output_layers=1)
    theirs = llama_flops(shape, 2, [(tokens, batch.targets)])
    own = sum(sum(own.values()) - own["attention"] for own in theirs.values())
    attention = 12 * tokens**2 * width * 3 - 2 * tokens**2 * width  # the first block's keys need no gradient
    assert worked_out(backbone, batch, adapter).whole == own + attention
