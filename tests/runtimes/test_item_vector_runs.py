"""Whole runs of ``item_vectors``: cut, federated, stopped and resumed, over a network, and what stays private."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pplr.backbones.adapters import load_adapter
from pplr.backbones.base import load_backbone
from pplr.backbones.item_vectors import ItemVectors, item_texts, whiten
from pplr.config import BackboneConfig, Config
from pplr.errors import BackboneError
from pplr.progress import Silent
from pplr.recommend.generative import embed_texts
from pplr.runtimes.address import StageServerAt
from pplr.runtimes.assembly import Assembly
from pplr.runtimes.audit_settings import AuditSettings
from pplr.runtimes.auditing import audit_run
from pplr.runtimes.identity import enroll_client, init_federation, read_server
from pplr.runtimes.in_process import train
from pplr.runtimes.stage_server import StageServer
from pplr.stages.model import CutModel
from pplr.testing import refuses, same_adapters

SETTINGS = (
    "backbone.name=item_vectors",
    "backbone.item_vectors.width=8",
    "training.ends_rate=2.0",
    "training.schedule=cosine",
    "evaluation.validation_metric=ndcg@3",
    "data.history_items=6",
)
CLIENTS = ("0", "1", "2")


@pytest.fixture
def config(small_config: Callable[..., Config], model_folder: Path) -> Callable[..., Config]:
    def make(*settings: str) -> Config:
        return small_config(f"backbone.model={model_folder}", *SETTINGS, *settings)

    return make


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_a_run_trains_measures_recommends_and_leaves_adapters_that_peft_loads(tmp_path, config, model_folder) -> None:
    run = train(config(), tmp_path / "run")
    assert run.metrics is not None
    assert run.metrics["backbone"] == "item_vectors"
    assert all(run.metrics["clients"][name]["recall@3"] is not None for name in CLIENTS)
    found = run.recommend(client="1", history=["Ash", "Elm"], count=3)
    assert [own.rank for own in found] == [1, 2, 3]
    assert not {"Ash", "Elm"} & {own.title for own in found}
    folder = run.folder / "clients" / "0"
    assert set(load_file(folder / "ends.safetensors")) == {
        "item_in.weight", "item_in.hidden.weight", "item_in.back.weight", "item_out.state.weight",
        "item_out.item.weight", "item_out.item.hidden.weight", "item_out.item.back.weight",
    }  # fmt: skip
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), folder)
    loaded = {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}
    kept = load_file(folder / "adapter_model.safetensors")
    assert len(loaded) == len(kept)
    assert all(torch.equal(loaded[name.replace(".weight", ".default.weight")], kept[name]) for name in kept)


def test_a_text_may_be_its_last_token(config) -> None:
    made = [Assembly(config(*more), Silent()) for more in ([], ["backbone.item_vectors.pooling=last"])]
    for own, pooling in zip(made, ("mean", "last"), strict=True):
        assert isinstance(own.backbone, ItemVectors)
        texts = item_texts(own.data.dataset.catalog, ())
        reader = CutModel(own.backbone.text, own.plan, own.config.adapter, own.config.training)
        states = embed_texts(reader.client("reader", reader.initial_adapter(0)), texts, pooling=pooling)
        assert torch.equal(own.backbone.vectors, whiten(states, "zca"))


def test_the_cut_changes_nothing(tmp_path, config) -> None:
    ended = []
    for name, cut in (("cut", "cut.output_layers=1"), ("whole", "cut=null")):
        run = train(config(cut), tmp_path / name)
        ended.append((run.folder, run.metrics["overall"], [r["similarity"] for r in run.rounds]))
    assert same_adapters(ended[0][0], ended[1][0])
    assert ended[0][1:] == ended[1][1:]


def test_a_run_that_was_stopped_ends_as_one_that_never_was(tmp_path, config) -> None:
    class Stop(Silent):
        def server_round(self, record: Any) -> None:
            raise KeyboardInterrupt

    whole = train(config(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(config(), tmp_path / "stopped", progress=Stop())
    resumed = train(config(), tmp_path / "stopped", resume=True)
    assert same_adapters(resumed.folder, whole.folder)


def test_a_stage_server_that_knows_nothing_of_items_serves_it(tmp_path, config, model_folder) -> None:
    init_federation(tmp_path / "ca", "trees", ["localhost"], address="localhost:1")
    enroll_client(tmp_path / "ca", "all", tmp_path / "kit")
    base = load_backbone(BackboneConfig(model=str(model_folder), dtype="float32"))
    server = StageServer(base, read_server(tmp_path / "ca"), "localhost:0")
    server.start()
    try:
        there = StageServerAt(tmp_path / "kit", f"localhost:{server.port}")
        remote = train(config(), tmp_path / "remote", stage_server=there)
        remote.close()
        assert server.tenancies.all() == []
    finally:
        server.stop(0.0)
    local = train(config(), tmp_path / "local")
    assert same_adapters(remote.folder, local.folder)
    assert remote.metrics["overall"] == local.metrics["overall"]


@pytest.mark.parametrize("residuals", ["client", "mixed"])
def test_residuals_stay_at_home_unless_they_are_to_be_mixed(tmp_path, config, residuals) -> None:
    settings = (f"backbone.item_vectors.residuals={residuals}", "run.keep_rounds=true", "federation.rounds=1")
    run = train(config(*settings), tmp_path / "run")
    record = run.rounds[0]["clients"]
    local, mixed = (
        {name: load_file(run.folder / "rounds" / "1" / name / f"{part}.safetensors") for name in CLIENTS}
        for part in ("local", "mixed")
    )
    for name in CLIENTS:
        for key, tensor in mixed[name].items():
            weighed = sum(local[other][key].double() * record[name]["mixed_from"][other] for other in CLIENTS)
            if residuals == "client" and "residual" in key:
                assert torch.equal(tensor, local[name][key])
                assert tensor.any()
                assert not torch.allclose(tensor, weighed.float(), atol=1e-6)
            elif "lora_" not in key:
                torch.testing.assert_close(tensor, weighed.float())


def test_the_first_blocks_alone_can_be_used(tmp_path, config, model_folder) -> None:
    run = train(config("backbone.keep_blocks=2", "cut.output_layers=0", "federation.rounds=1"), tmp_path / "run")
    assert run.metrics["cut"]["total_layers"] == 2
    assert not any(".layers.2." in name for name in load_adapter(run.folder / "clients" / "0"))
    with refuses(BackboneError, "backbone.keep_blocks is 4, and the model has 3 blocks"):
        load_backbone(BackboneConfig(model=str(model_folder), keep_blocks=4))


def test_a_secret_projection_stays_at_home_and_starts_from_each_client_s_own_secret(tmp_path, config) -> None:
    settings = ("backbone.item_vectors.secret_projection=true", "run.keep_rounds=true")
    run = train(config(*settings), tmp_path / "run")
    names = {"item_in.weight", "item_in.hidden.weight", "item_in.back.weight"}
    assert run.assembly().backbone.private == names
    assert not names & run.assembly().exchanged(run.assembly().initial).keys()
    local, mixed = (
        {name: load_file(run.folder / "rounds" / "1" / name / f"{part}.safetensors") for name in CLIENTS}
        for part in ("local", "mixed")
    )
    starts = {name: run.assembly().start_of(name) for name in CLIENTS}
    for name in CLIENTS:
        for key in names:
            assert torch.equal(mixed[name][key], local[name][key])
        others = [starts[other] for other in CLIENTS if other != name] + [run.assembly().initial]
        own = starts[name]["item_in.weight"]
        assert all(abs(_cosine(own, other["item_in.weight"])) < 0.3 for other in others)
        assert _cosine(own, local[name]["item_in.weight"]) > 0.3
        public = float(run.assembly().initial["item_in.weight"].std())
        assert float(own.std()) == pytest.approx(public, rel=0.2)
        shared = starts[name].keys() - names
        assert all(torch.equal(starts[name][key], run.assembly().initial[key]) for key in shared)


def test_a_run_with_a_secret_projection_that_was_stopped_ends_as_one_that_never_was(
    tmp_path, config, monkeypatch
) -> None:
    class Stop(Silent):
        def server_round(self, record: Any) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr("pplr.privacy.secret.new_secret", lambda: bytes(range(32)))
    settings = ("backbone.item_vectors.secret_projection=true", "federation.method=ditto")
    whole = train(config(*settings), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(config(*settings), tmp_path / "stopped", progress=Stop())
    resumed = train(config(*settings), tmp_path / "stopped", resume=True)
    assert same_adapters(resumed.folder, whole.folder)


def test_a_secret_projection_is_read_by_who_has_it_and_not_by_who_has_the_rest(tmp_path, config) -> None:
    run = train(config("backbone.item_vectors.secret_projection=true", "federation.rounds=1"), tmp_path / "run")
    content = audit_run(run, AuditSettings(("vocabulary_matching",), users=4, cuts=((0, 1),)))
    found = {own["knowledge"]: own["token_recovery"]["mean"] for own in content["settings"][0]["audits"]}
    assert set(found) == {"own", "exchanged", "mixed", "base", "pairs"}
    assert found["own"] == found["pairs"] == 1.0
    assert max(found["exchanged"], found["mixed"], found["base"]) < 0.5
    content = audit_run(run, AuditSettings(users=2, cuts=((0, 1),)))
    assert ("alignment", "catalog") in {(own["audit"], own["knowledge"]) for own in content["settings"][0]["audits"]}


def _cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.cosine_similarity(one.flatten(), other.flatten(), dim=0))
