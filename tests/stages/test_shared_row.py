"""Samples in one row, what they share once, against the same samples padded, each in a row of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from pplr.backbones.causal_lm import CausalLM, EncodedSample
from pplr.config import AdapterConfig, StatePrivacyConfig, TrainingConfig
from pplr.config_files import load_config
from pplr.data.prompts import Sample
from pplr.errors import BackboneError, ConfigError
from pplr.privacy.states import StateGuard
from pplr.recommend.training import train_locally
from pplr.stages.client_model import ClientModel
from pplr.stages.cut import CutPlan
from pplr.stages.host import Asked, StageHost
from pplr.stages.model import CutModel
from pplr.stages.stage import StageCall
from pplr.testing import (
    every_cut,
    random_adapter,
    refuses,
    same_state,
    tiny_backbone,
    tiny_catalog,
    tiny_encoder,
    tiny_samples,
)

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    "qwen3": {"tie_word_embeddings": True},
}
PLAN = CutPlan(1, 1, 4)
ADAPTER = AdapterConfig(rank=4, dropout=0.0, target_modules=("q_proj", "v_proj", "down_proj"))
TRAINING = TrainingConfig(learning_rate=0.01, warmup_steps=2, batch_size=4)


def encoded(shared: int, *rests: int) -> list[EncodedSample]:
    """Draw samples of random tokens: as many shared ones, then as many of their own, the last three an answer."""
    source = torch.Generator().manual_seed(shared)

    def drawn(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, 256, (count,), generator=source).tolist())

    first, found = drawn(shared), []
    for number, rest in enumerate(rests):
        found.append(EncodedSample((*first, number, *drawn(rest)), drawn(3)))
    return found


SAMPLES = {
    "some share": encoded(9, 14, 2, 0, 30),
    "nothing in common": encoded(0, 14, 2, 5),
    "all the same length": encoded(4, 7, 7),
    "one": encoded(6, 5),
    "twice the same": encoded(6, 5) * 2,
}


def client(
    backbone: CausalLM, plan: CutPlan, adapter: AdapterConfig = ADAPTER, **options: Any
) -> tuple[CutModel, ClientModel]:
    cut = CutModel(backbone, plan, adapter, TRAINING.model_copy(update=options))
    model = cut.client("one", random_adapter(cut.shapes, scale=0.1 if adapter.kind == "lora" else 0.01))
    model.begin_round(10)
    return cut, model


def gradients(cut: CutModel, model: ClientModel) -> dict[str, Tensor]:
    members = [*model._members, *([cut.host._of("one").member] if cut.host is not None else [])]
    return {name: p.grad for member in members for name, p in member.parameters.items() if p.grad is not None}


def assert_same(one: tuple[CutModel, ClientModel], other: tuple[CutModel, ClientModel]) -> None:
    found, wanted = gradients(*one), gradients(*other)
    assert found.keys() == wanted.keys() != set()
    for name, tensor in wanted.items():
        assert float((found[name] - tensor).abs().max()) <= 1e-5 * float(tensor.abs().max()), name


def assert_trains_alike(backbone: CausalLM, plan: CutPlan, samples: Sequence[EncodedSample], **options: Any) -> None:
    padded, row = client(backbone, plan, **options), client(backbone, plan, **options)
    losses = []
    for (_, model), batch in ((padded, backbone.collate(samples)), (row, backbone.collate_row(samples))):
        loss = model.train_loss(batch, 5) / batch.targets
        loss.backward()
        losses.append(float(loss.detach()))
        if options.get("adapter", ADAPTER).dropout == 0:
            told = float(model.evaluation_loss(batch)) / batch.targets
            assert told == pytest.approx(losses[-1], rel=1e-5)
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert_same(row, padded)


@pytest.mark.parametrize("plan", every_cut(4), ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_trains_as_padded_rows(family: str, plan: CutPlan) -> None:
    assert_trains_alike(tiny_backbone(family, **FAMILIES[family]), plan, SAMPLES["some share"])


@pytest.mark.parametrize("samples", SAMPLES.values(), ids=SAMPLES)
@pytest.mark.parametrize(
    "options", [{}, {"recompute": True}, {"adapter": AdapterConfig(kind="full", dropout=0.0)}], ids=str
)
def test_whatever_they_share(samples: list[EncodedSample], options: dict[str, Any]) -> None:
    assert_trains_alike(tiny_backbone(), PLAN, samples, **options)


def test_lists_in_a_row_train_as_padded_lists() -> None:
    backbone = tiny_backbone(targets="all")
    lists = [Sample(own.user, own.history, own.target, every=True) for own in tiny_samples()]
    samples = backbone.encode(lists, tiny_catalog(), 4)
    assert backbone.collate_row(samples).row.prefix > 10
    assert_trains_alike(backbone, PLAN, samples)


def test_attention_as_products_takes_a_row() -> None:
    backbone = tiny_backbone()
    backbone.model.bfloat16()
    own = CausalLM(backbone.model, backbone.tokenizer, folder="tiny")
    found = []
    for batch in (own.collate(SAMPLES["some share"]), own.collate_row(SAMPLES["some share"])):
        model = client(own, PLAN)
        model[1].train_loss(batch, None).backward()
        found.append(gradients(*model))
    for name, tensor in found[0].items():
        assert float((found[1][name] - tensor).norm()) < 0.03 * float(tensor.norm()), name


def test_one_sample_drops_what_it_drops_padded() -> None:
    assert_trains_alike(tiny_backbone(), PLAN, SAMPLES["one"], adapter=ADAPTER.model_copy(update={"dropout": 0.3}))


def test_every_cut_drops_alike() -> None:
    backbone, told = tiny_backbone(), []
    batch = backbone.collate_row(SAMPLES["some share"])
    for plan in every_cut(4):
        _, model = client(backbone, plan, ADAPTER.model_copy(update={"dropout": 0.3}))
        for step in range(2):
            (model.train_loss(batch, step) / batch.targets).backward()
            model.optimizer_step(0.5)
        told.append(model.adapter())
    assert all(same_state(own, told[0]) for own in told)


def test_what_crosses_is_the_row() -> None:
    backbone, samples = tiny_backbone(), SAMPLES["some share"]
    _, model = client(backbone, PLAN)
    model.train_loss(backbone.collate_row(samples), None).backward()
    tokens = 9 + sum(len(own.prompt) + len(own.answer) - 9 - 1 for own in samples)
    assert model.traffic.bytes_up == model.traffic.bytes_down == 2 * tokens * 32 * 4


def test_local_training_is_the_same() -> None:
    backbone = tiny_backbone()
    samples = backbone.encode(tiny_samples(), tiny_catalog(), 3)
    ended = []
    for shared in (False, True):
        for micro in (None, 3):
            _, model = client(backbone, PLAN)
            config = TRAINING.model_copy(update={"shared_prefix": shared, "micro_batch_size": micro, "local_epochs": 2})
            told = train_locally(model, samples, config, client="one", server_round=0, rounds=1, seed=0)
            ended.append((told, model.adapter()))
    for told, adapter in ended[1:]:
        assert (told.loss, told.targets) == (pytest.approx(ended[0][0].loss, rel=1e-5), ended[0][0].targets)
        for name, tensor in ended[0][1].items():
            assert float((adapter[name] - tensor).abs().max()) < 2e-4, name
    assert ended[2][0].tokens < ended[3][0].tokens < ended[0][0].tokens


def test_rows_and_padded_batches_of_several_clients_in_one_pass() -> None:
    backbone = tiny_backbone()
    rows = [backbone.collate_row(SAMPLES["some share"]), backbone.collate(SAMPLES["nothing in common"]),
            backbone.collate_row(SAMPLES["all the same length"])]  # fmt: skip
    hosts, asked = [], []
    for _ in range(2):
        host = StageHost(backbone, PLAN, ADAPTER.model_copy(update={"dropout": 0.3}), TRAINING)
        for number in range(3):
            host.admit(str(number), random_adapter(host.stage.shapes, seed=number, scale=0.1))
        hosts.append(host)
    for number, batch in enumerate(rows):
        states = torch.randn(*batch.input_ids.shape, 32, generator=torch.Generator().manual_seed(number))
        asked.append(
            Asked(str(number), 1, states, StageCall(dropout_seed=number, lengths=batch.lengths, row=batch.row))
        )
    left = hosts[0].forward_together(asked)
    alone = [hosts[1].forward(own.client, own.hidden_states, own.call, keep_as=1) for own in asked]
    real = [
        (torch.arange(own.shape[1]) < batch.lengths[:, None])[..., None] for own, batch in zip(left, rows, strict=True)
    ]
    sent = [Asked(own.client, 1, own.hidden_states * kept) for own, kept in zip(asked, real, strict=True)]
    back = hosts[0].backward_together(sent)
    plain = [hosts[1].backward(own.client, 1, own.hidden_states) for own in sent]
    for one, other, kept in zip([*left, *back], [*alone, *plain], real * 2, strict=True):
        torch.testing.assert_close(one * kept, other * kept, rtol=1e-4, atol=1e-5)
    for own in asked:
        first, second = (host._of(own.client).member.parameters for host in hosts)
        for name, parameter in first.items():
            torch.testing.assert_close(parameter.grad, second[name].grad, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_in_a_row_is_refused() -> None:
    yarn = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    backbone = tiny_backbone("llama", rope_parameters=yarn)
    with refuses(BackboneError, "do not keep apart"):
        client(backbone, PLAN)[1].train_loss(backbone.collate_row(SAMPLES["one"]), None)
    with refuses(BackboneError, "share no row"):
        tiny_encoder().collate_row([])
    guarded = client(tiny_backbone(), PLAN)[1]
    guarded.guard = StateGuard(StatePrivacyConfig(clip_norm=1), bytes(32), "client")
    with refuses(ConfigError, "samples in one row"):
        guarded.train_loss(tiny_backbone().collate_row(SAMPLES["one"]), None)


@pytest.mark.parametrize(
    "setting", ["backbone.name=item_vectors", "backbone.name=encoder", "privacy.states.clip_norm=1"]
)
def test_a_configuration_that_cannot_be_is_refused(setting: str) -> None:
    load_config(overrides=[setting])
    with refuses(ConfigError, "training.shared_prefix"):
        load_config(overrides=[setting, "training.shared_prefix=true"])
