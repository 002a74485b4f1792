"""RecFormer's backbone: cut as it is whole on three families, and each part against a slow and plain truth."""

from __future__ import annotations

import math
import shutil
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file

from pplr.backbones.base import load_backbone
from pplr.backbones.bundles import write_bundles
from pplr.backbones.encoder import EncodedUser, Encoder, item_fields
from pplr.config import AdapterConfig, BackboneConfig, EncoderConfig, TrainingConfig
from pplr.config_files import load_config
from pplr.data.interactions import Catalog
from pplr.data.prompts import Case, Sample
from pplr.errors import BackboneError, ConfigError, DataError
from pplr.recommend.matching import MatchingRanker
from pplr.stages.cut import CutPlan
from pplr.stages.model import CutModel
from pplr.testing import (
    BackboneContract,
    peft_model,
    random_adapter,
    refuses,
    tiny_catalog,
    tiny_encoder,
    tiny_samples,
    tiny_tokenizer,
)

LORA = AdapterConfig(rank=2, dropout=0.2, target_modules=("query", "value"))
FAMILIES = ("bert", "roberta", "longformer")
END_TOKEN, PADDING = 256, 257


def make(family: str = "bert", config: EncoderConfig | None = None, **options) -> Encoder:
    backbone = tiny_encoder(family, config, **options)
    backbone.prepare(tiny_catalog(), lambda texts: torch.empty(0))
    return backbone


class TestBert(BackboneContract):
    adapter = LORA

    def make(self) -> Encoder:
        return make("bert")


class TestRoberta(TestBert):
    def make(self) -> Encoder:
        return make("roberta", EncoderConfig(pooling="mean"))


class TestLongformer(TestBert):
    def make(self) -> Encoder:
        return make("longformer")


class TestFullFineTuning(TestBert):
    adapter = AdapterConfig(kind="full")

    def test_recomputing_changes_no_bit(self) -> None:
        """A configuration refuses it."""
        with refuses(ConfigError, "training.recompute goes with adapter.kind: lora alone"):
            load_config(overrides=["adapter.kind=full", "training.recompute=true"])


class TestFullFineTuningOfLongformer(TestFullFineTuning):
    def make(self) -> Encoder:
        return make("longformer")


def client(backbone: Encoder, config: AdapterConfig = LORA, plan: CutPlan | None = None, seed: int = 0, **ends):
    cut = CutModel(backbone, plan or CutPlan(1, 1, 4), config, TrainingConfig(warmup_steps=1, learning_rate=0.01))
    start = random_adapter(cut.shapes, seed)
    start["catalog.items"] = torch.zeros(cut.shapes["catalog.items"])
    return cut.client("one", start | ends)


# -- what the model reads --------------------------------------------------------------------------------------


def trees() -> Catalog:
    return Catalog(
        ("a", "b", "c"), ("Ash", "Birch", "Oak"), {"kind": ("broad|tall", "", "hard"), "zone": ("4", "5", "")}
    )


def test_an_item_is_keys_and_values_and_says_nothing_where_nothing_is_known() -> None:
    assert item_fields(trees(), ["kind", "zone"]) == [
        [("title", "Ash"), ("kind", "broad tall"), ("zone", "4")],
        [("title", "Birch"), ("zone", "5")],
        [("title", "Oak"), ("kind", "hard")],
    ]
    with refuses(ConfigError, "backbone.encoder.attributes names 'kin', which no item has"):
        item_fields(trees(), ["kin"])
    with refuses(ConfigError, "an item has a title and at most two attributes, got 3"):
        load_config(overrides=["backbone.encoder.attributes=[a, b, c]"])


def test_a_history_is_read_newest_first_with_types_and_places() -> None:
    backbone = tiny_encoder()
    backbone.prepare(trees(), lambda texts: torch.empty(0))
    tokenizer = tiny_tokenizer()

    def written(item: str, place: int) -> list[tuple[int, int, int]]:
        keys = [(token, 1, place) for token in tokenizer("title").input_ids]
        return keys + [(token, 2, place) for token in tokenizer(item).input_ids]

    batch = backbone.pad([(0, 2), (1,)])
    first = [(END_TOKEN, 0, 0), *written("Oak", 1), *written("Ash", 2)]
    second = [(END_TOKEN, 0, 0), *written("Birch", 1)]
    second += [(PADDING, 0, 0)] * (len(first) - len(second))
    assert batch.input_ids.tolist() == [list(map(list, first)), list(map(list, second))]
    assert batch.lengths.tolist() == [17, 11]
    assert batch.targets == 0


def test_attributes_are_cut_to_their_length_and_the_oldest_items_give_way_whole() -> None:
    backbone = tiny_encoder(config=EncoderConfig(attributes=("kind",), attribute_tokens=7), max_tokens=30)
    backbone.prepare(trees(), lambda texts: torch.empty(0))
    tokenizer = tiny_tokenizer()
    shown = backbone.pad([(1, 0)]).input_ids[0]
    letters = tokenizer.decode([token for token, kind, _ in shown.tolist() if kind])
    assert letters == "titleAs" + "kindbro" + "titleBi"
    assert backbone.pad([(0, 1, 2)]).lengths.tolist() == [1 + 14 + 7]  # one token too few for the oldest
    assert backbone.pad([(2, 0, 1, 0)]).lengths.tolist() == [1 + 14 + 7]
    short = tiny_encoder(max_tokens=8)
    with refuses(DataError, "an item takes 9 tokens, more than the 8 allowed"):
        short.prepare(trees(), lambda texts: torch.empty(0))
    with refuses(BackboneError, "no catalog was read by this backbone"):
        short.pad([(0,)])


def test_a_target_is_a_label_and_is_never_read() -> None:
    backbone = make()
    encoded = backbone.encode(tiny_samples(), tiny_catalog(), 3)
    batch = backbone.collate(encoded)
    assert batch.labels is not None
    assert batch.labels.tolist() == [sample.target for sample in tiny_samples()]
    assert torch.equal(batch.input_ids, backbone.pad([sample.history[-3:] for sample in tiny_samples()]).input_ids)
    assert batch.targets == batch.samples


def test_every_epoch_draws_a_target_of_each_user_and_what_came_before_it() -> None:
    backbone = make()
    walk = (3, 1, 4, 2, 5, 0, 7, 6)
    (encoded,) = backbone.encode([Sample(0, walk[:-1], walk[-1], every=True)], tiny_catalog(), 3)
    drawn = [backbone.draw([encoded], seed)[0] for seed in range(700)]
    counts = Counter(own.target for own in drawn)
    assert set(counts) == set(walk[1:])
    assert all(60 <= count <= 140 for count in counts.values()), counts
    for own in drawn:
        place = walk.index(own.target)
        assert own.history == walk[max(0, place - 3) : place]
        assert own.drawn_from is None
    assert backbone.draw([encoded], 5) == backbone.draw([encoded], 5)
    fixed = EncodedUser((1, 2), 3)
    assert backbone.draw([fixed], 5) == [fixed]
    with refuses(ConfigError, "data.history_items is 51, and an encoder knows 50 item positions"):
        backbone.encode([], tiny_catalog(), 51)


# -- what the model makes of it --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_those_of_transformers_and_peft(family) -> None:
    """Without the tables, an adapter on the cut model gives what PEFT's gives on transformers' own."""
    backbone = make(family)
    config = LORA.model_copy(update={"dropout": 0.0})
    cut = CutModel(backbone, CutPlan(1, 2, 4), config, TrainingConfig())
    adapter = random_adapter(cut.shapes)
    for name in ("embeddings.token_type", "embeddings.item_position"):
        adapter[name] = torch.zeros_like(adapter[name])
    batch = backbone.pad([(0, 3, 5), (1,), (4, 7)])
    ours = cut.client("one", adapter).hidden_states(batch)
    factors = {name: tensor for name, tensor in adapter.items() if ".lora_" in name}
    truth = peft_model(backbone, config, factors)
    real = (torch.arange(ours.shape[1])[None] < batch.lengths[:, None]).long()
    told = {"input_ids": batch.input_ids[..., 0], "attention_mask": real}
    if family == "longformer":
        told["global_attention_mask"] = torch.zeros_like(real).index_fill_(1, torch.tensor([0]), 1)
    if family != "bert":
        first = backbone.model.config.pad_token_id + 1
        told["position_ids"] = (torch.arange(ours.shape[1]) + first)[None].expand_as(real)
    with torch.no_grad():
        theirs = truth(**told).last_hidden_state
    torch.testing.assert_close(ours[real.bool()], theirs[real.bool()], rtol=1e-4, atol=1e-5)


def test_the_tables_are_added_before_the_norm() -> None:
    backbone = make()
    source = torch.Generator().manual_seed(0)
    ends = {
        "embeddings.token_type": torch.randn(3, 32, generator=source),
        "embeddings.item_position": torch.randn(51, 32, generator=source),
    }
    batch = backbone.pad([(0, 3), (1,)])
    states = backbone.embed(batch.input_ids, ends)
    own = backbone.model.embeddings
    for row, place in ((0, 0), (0, 4), (1, 7)):
        token, kind, item = batch.input_ids[row, place].tolist()
        summed = own.word_embeddings.weight[token] + own.position_embeddings.weight[place]
        summed = summed + own.token_type_embeddings.weight[0]
        summed = summed + ends["embeddings.token_type"][kind] + ends["embeddings.item_position"][item]
        torch.testing.assert_close(states[row, place], own.LayerNorm(summed))


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_the_loss_is_that_of_plain_loops(pooling) -> None:
    backbone = make(config=EncoderConfig(pooling=pooling, temperature=0.1))
    model = client(backbone)
    model.refresh()
    encoded = backbone.encode(tiny_samples(), tiny_catalog(), 3)

    def alone(items) -> torch.Tensor:
        states = model.hidden_states(backbone.pad([items]))[0].double()
        pooled = states[0] if pooling == "first" else states.mean(dim=0)
        return pooled / pooled.norm()

    total = 0.0
    for own in encoded:
        scores = [float(alone(own.history) @ alone((item,))) / 0.1 for item in range(len(tiny_catalog()))]
        total += math.log(sum(math.exp(score) for score in scores)) - scores[own.target]
    assert float(model.evaluation_loss(backbone.collate(encoded))) == pytest.approx(total, rel=1e-4)
    ranker = MatchingRanker(model, history_items=3)
    scores = torch.from_numpy(ranker.scores([Case(0, (1, 2), (3,), (1, 2))]))[0]
    expected = torch.stack([alone((1, 2)) @ alone((item,)) for item in range(len(tiny_catalog()))])
    torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=1e-5)


def test_negatives_are_drawn_while_it_trains_alone() -> None:
    full, few = make(), make(config=EncoderConfig(negatives=2))
    batches = [own.collate(own.encode(tiny_samples()[:1], tiny_catalog(), 3)) for own in (full, few)]
    models = [client(own) for own in (full, few)]
    for model in models:
        model.refresh()
    assert float(models[0].evaluation_loss(batches[0])) == float(models[1].evaluation_loss(batches[1]))
    trained = [float(model.train_loss(batch, 0).detach()) for model, batch in zip(models, batches, strict=True)]
    assert trained[1] < trained[0]


def test_items_are_encoded_anew_when_the_adapter_has_changed_and_only_then(monkeypatch) -> None:
    backbone = make()
    model = client(backbone)
    runs = []
    real = backbone.queries
    monkeypatch.setattr(backbone, "queries", lambda *given: runs.append(1) or real(*given))
    model.refresh()
    first = model.adapter()["catalog.items"].clone()
    assert first.norm(dim=1).tolist() == pytest.approx([1.0] * 8)
    encoded = len(runs)
    model.refresh()
    assert len(runs) == encoded
    twin = client(backbone)
    twin.refresh()  # the same adapter: from the cache
    assert len(runs) == encoded
    assert torch.equal(twin.adapter()["catalog.items"], first)
    batch = backbone.collate(backbone.encode(tiny_samples(), tiny_catalog(), 3))
    model.begin_round(4)
    for step in range(2):
        model.train_loss(batch, step).backward()
        model.optimizer_step(1.0)
    assert torch.equal(model.adapter()["catalog.items"], first)  # no gradient reaches it
    assert "exp_avg.catalog.items" not in model.optimizer_state()
    assert "exp_avg.embeddings.item_position" in model.optimizer_state()
    model.keeps_constants = True
    model.refresh()
    assert torch.equal(model.adapter()["catalog.items"], first)
    model.keeps_constants = False
    model.refresh()
    assert not torch.allclose(model.adapter()["catalog.items"], first, atol=1e-4)
    assert not torch.equal(model.adapter()["catalog.items"], twin.adapter()["catalog.items"])


def test_it_generates_nothing() -> None:
    backbone = make()
    with refuses(BackboneError, "an encoder generates nothing"):
        backbone.new_cache(backbone.blocks(range(1)))


# -- what it is loaded from ------------------------------------------------------------------------------------


def saved(folder, family: str = "bert"):
    tiny_encoder(family).model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def load(folder, **options) -> Encoder:
    config = BackboneConfig(name="encoder", model=str(folder), dtype="float32", max_tokens=128, **options)
    backbone = load_backbone(config)
    assert isinstance(backbone, Encoder)
    return backbone


def prepared(backbone: Encoder) -> Encoder:
    backbone.prepare(tiny_catalog(), lambda texts: torch.empty(0))
    return backbone


def recformer(folder, *, binary: bool):
    """Write weights as RecFormer's authors publish them: below ``longformer.``, with four types and item positions."""
    saved(folder, "longformer")
    source = torch.Generator().manual_seed(3)
    tensors = {f"longformer.{name}": t for name, t in load_file(folder / "model.safetensors").items()}
    tensors["longformer.embeddings.token_type_embeddings.weight"] = torch.randn(4, 32, generator=source)
    tensors["longformer.embeddings.item_position_embeddings.weight"] = torch.randn(51, 32, generator=source)
    tensors["longformer.embeddings.position_ids"] = torch.arange(160)[None]
    tensors["longformer.pooler.dense.weight"] = torch.zeros(32, 32)
    tensors["lm_head.bias"] = torch.zeros(258)
    (folder / "model.safetensors").unlink()
    if binary:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return {name.removeprefix("longformer."): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("binary", [True, False])
def test_recformers_published_layout_is_loaded_with_its_tables(tmp_path, binary) -> None:
    tensors = recformer(tmp_path / "published", binary=binary)
    backbone = prepared(load(tmp_path / "published"))
    ends = {"embeddings.token_type": torch.zeros(3, 32), "embeddings.item_position": torch.zeros(51, 32)}
    batch = backbone.pad([(0, 3)])
    states = backbone.embed(batch.input_ids, ends)
    for place in (0, 4, 9):
        token, kind, item = batch.input_ids[0, place].tolist()
        summed = tensors["embeddings.word_embeddings.weight"][token]
        summed = summed + tensors["embeddings.position_embeddings.weight"][place + 2]
        summed = summed + tensors["embeddings.token_type_embeddings.weight"][kind]
        summed = summed + tensors["embeddings.item_position_embeddings.weight"][item]
        torch.testing.assert_close(states[0, place], backbone.model.embeddings.LayerNorm(summed))
    layer = "encoder.layer.2.attention.self.query.weight"
    assert torch.equal(backbone.model.state_dict()[layer], tensors[layer])
    assert backbone.fingerprint() != load(saved(tmp_path / "plain", "longformer")).fingerprint()


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("family", [*FAMILIES, "recformer"])
def test_two_bundles_train_bit_for_bit_as_the_whole_model(tmp_path, family, kind) -> None:
    source = tmp_path / "whole"
    if family == "recformer":
        recformer(source, binary=False)
    else:
        saved(source, family)
    write_bundles(source, tmp_path / "cut", input_layers=1, output_layers=1)
    plan, config = CutPlan(1, 1, 4), LORA.model_copy(update={"kind": kind})
    training = TrainingConfig(learning_rate=0.01, warmup_steps=1)
    whole = CutModel(prepared(load(source)), plan, config, training)
    shutil.rmtree(source)
    own, server = prepared(load(tmp_path / "cut" / "client")), load(tmp_path / "cut" / "server")
    assert own.fingerprint() == server.fingerprint()
    apart = CutModel(own, plan, config, training, server=server)
    adapters = []
    for model in (whole, apart):
        one = model.client("a", random_adapter(whole.shapes, seed=1))
        batch = own.collate(own.encode(tiny_samples(), tiny_catalog(), 3))
        one.begin_round(2)
        for step in range(2):
            (one.train_loss(batch, step) / batch.targets).backward()
            one.optimizer_step(1.0)
        adapters.append(one.adapter())
    assert list(adapters[0]) == list(adapters[1])
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    assert whole.stored_bytes() == apart.stored_bytes()
    with refuses(BackboneError, "is a server's bundle and handles no text"):
        prepared(server)


def test_the_first_blocks_alone_can_be_used(tmp_path) -> None:
    for family in FAMILIES:
        backbone = load(saved(tmp_path / family, family), keep_blocks=2)
        assert backbone.total_layers == len(backbone.model.encoder.layer) == 2
        model = client(prepared(backbone), plan=CutPlan(1, 0, 2))
        assert model.hidden_states(backbone.pad([(1, 2)])).isfinite().all()
        with refuses(BackboneError, "backbone.keep_blocks is 5, and the model has 4 blocks"):
            load(tmp_path / family, keep_blocks=5)


def test_what_does_not_fit_is_refused(tmp_path) -> None:
    folder = saved(tmp_path / "bert")
    with refuses(ConfigError, "backbone.max_tokens is 512, and the model has 160 positions"):
        prepared(load_backbone(BackboneConfig(name="encoder", model=str(folder))))
    roberta = saved(tmp_path / "roberta", "roberta")
    with refuses(ConfigError, "backbone.max_tokens is 159, and the model has 158 positions"):
        prepared(load_backbone(BackboneConfig(name="encoder", model=str(roberta), max_tokens=159)))
    (folder / "model.safetensors").unlink()
    with refuses(BackboneError, "cannot load the model"):
        load(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_near_float32(tmp_path, family) -> None:
    folder = saved(tmp_path / family, family)
    wide = prepared(load(folder))
    config = BackboneConfig(name="encoder", model=str(folder), dtype="bfloat16", max_tokens=128)
    narrow = prepared(load_backbone(config))
    batch = wide.pad([(0, 3, 5), (1,), (4, 7)])
    states = [client(own).hidden_states(batch) for own in (wide, narrow)]
    assert states[1].dtype == torch.bfloat16
    real = torch.arange(batch.input_ids.shape[1])[None] < batch.lengths[:, None]
    off = (states[0][real] - states[1][real].float()).norm() / states[0][real].norm()
    assert off < 0.05
    model = client(narrow)
    assert float(model.train_loss(narrow.collate([EncodedUser((1, 2), 3)]), 0).detach()) > 0
