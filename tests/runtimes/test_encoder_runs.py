"""Whole runs of ``encoder``: cut, federated, in two phases, stopped and resumed, over a network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel

from pplr.backbones.adapters import load_adapter
from pplr.backbones.base import load_backbone
from pplr.config import BackboneConfig, Config
from pplr.progress import Silent
from pplr.runtimes.address import StageServerAt
from pplr.runtimes.identity import enroll_client, init_federation, read_server
from pplr.runtimes.in_process import evaluate_run, train
from pplr.runtimes.run import open_run
from pplr.runtimes.stage_server import StageServer
from pplr.testing import same_adapters

SETTINGS = (
    "backbone.name=encoder",
    "backbone.max_tokens=128",
    "adapter.target_modules=[query, value]",
    "evaluation.validation_metric=ndcg@3",
    "data.history_items=4",
)
CLIENTS = ("0", "1", "2")
TABLE = "catalog.items"


@pytest.fixture
def config(small_config: Callable[..., Config], encoder_folder: Path) -> Callable[..., Config]:
    def make(*settings: str) -> Config:
        return small_config(f"backbone.model={encoder_folder}", *SETTINGS, *settings)

    return make


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_a_run_trains_measures_recommends_and_leaves_adapters_that_peft_loads(tmp_path, config, encoder_folder) -> None:
    run = train(config(), tmp_path / "run")
    assert run.metrics is not None
    assert run.metrics["backbone"] == "encoder"
    assert all(run.metrics["clients"][name]["recall@3"] is not None for name in CLIENTS)
    found = run.recommend(client="1", history=["Ash", "Elm"], count=3)
    assert [own.rank for own in found] == [1, 2, 3]
    folder = run.folder / "clients" / "0"
    assert set(load_file(folder / "ends.safetensors")) == {
        "embeddings.token_type", "embeddings.item_position", TABLE
    }  # fmt: skip
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(encoder_folder), folder)
    loaded = {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}
    kept = load_file(folder / "adapter_model.safetensors")
    assert len(loaded) == len(kept)
    assert all(torch.equal(loaded[name.replace(".weight", ".default.weight")], kept[name]) for name in kept)
    again = open_run(run.folder)
    assert evaluate_run(again, Silent())["overall"] == run.metrics["overall"]


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_neither_the_cut_nor_the_network_changes_anything(tmp_path, config, encoder_folder, kind) -> None:
    ended = []
    for name, cut in (("cut", "cut.output_layers=1"), ("whole", "cut=null")):
        run = train(config(cut, f"adapter.kind={kind}"), tmp_path / name)
        ended.append((run.folder, run.metrics["overall"], [r["similarity"] for r in run.rounds]))
    assert same_adapters(ended[0][0], ended[1][0])
    assert ended[0][1:] == ended[1][1:]
    init_federation(tmp_path / "ca", "trees", ["localhost"], address="localhost:1")
    enroll_client(tmp_path / "ca", "all", tmp_path / "kit")
    base = load_backbone(BackboneConfig(name="encoder", model=str(encoder_folder), dtype="float32", max_tokens=128))
    server = StageServer(base, read_server(tmp_path / "ca"), "localhost:0")
    server.start()
    try:
        there = StageServerAt(tmp_path / "kit", f"localhost:{server.port}")
        remote = train(config(f"adapter.kind={kind}"), tmp_path / "remote", stage_server=there)
        remote.close()
    finally:
        server.stop(0.0)
    assert same_adapters(remote.folder, ended[0][0])
    assert remote.metrics["overall"] == ended[0][1]


def test_item_embeddings_are_a_clients_own_and_no_part_of_similarity(tmp_path, config) -> None:
    run = train(config("run.keep_rounds=true", "federation.rounds=1"), tmp_path / "run")
    local, mixed = (
        {name: load_file(run.folder / "rounds" / "1" / name / f"{part}.safetensors") for name in CLIENTS}
        for part in ("local", "mixed")
    )
    weights = run.rounds[0]["clients"]
    for name in CLIENTS:
        assert torch.equal(mixed[name][TABLE], local[name][TABLE])
        for key in ("embeddings.token_type", "embeddings.item_position"):
            weighed = sum(local[other][key].double() * weights[name]["mixed_from"][other] for other in CLIENTS)
            torch.testing.assert_close(mixed[name][key], weighed.float())
    flat = [
        torch.cat([tensor.flatten().double() for key, tensor in sorted(local[name].items()) if key != TABLE])
        for name in CLIENTS
    ]
    expected = [[(float(a @ b / a.norm() / b.norm()) + 1) / 2 for b in flat] for a in flat]
    assert run.rounds[0]["similarity"] == [pytest.approx(row) for row in expected]


def test_the_second_phase_begins_at_each_clients_best_round_and_keeps_its_item_embeddings(tmp_path, config) -> None:
    settings = ("run.keep_rounds=true", "federation.patience=null", "training.schedule=constant")
    phases = "backbone.encoder.first_phase_rounds=2"
    run = train(config(*settings, "federation.rounds=4", phases), tmp_path / "run")
    first = train(config(*settings, "federation.rounds=2"), tmp_path / "first")
    best = {name: load_adapter(first.folder / "clients" / name) for name in CLIENTS}

    def table(server_round: int, name: str) -> torch.Tensor:
        return load_file(run.folder / "rounds" / str(server_round) / name / "local.safetensors")[TABLE]

    for name in CLIENTS:
        assert not torch.equal(table(1, name), table(2, name))
        assert torch.equal(table(3, name), best[name][TABLE])
        assert torch.equal(table(4, name), best[name][TABLE])
        assert torch.equal(load_adapter(run.folder / "clients" / name)[TABLE], best[name][TABLE]) or (
            max(r["clients"][name]["validation"]["ndcg@3"] for r in run.rounds)
            == run.rounds[0]["clients"][name]["validation"]["ndcg@3"]
        )


def test_a_client_that_sits_a_round_out_keeps_its_item_embeddings_too(tmp_path, config) -> None:
    """Under a shared method it gets the new average and is validated, though it does not train."""
    settings = (
        "federation.method=fedavg",
        "federation.participation=0.34",
        "federation.rounds=3",
        "run.keep_rounds=true",
    )
    run = train(
        config(*settings, "federation.patience=null", "backbone.encoder.first_phase_rounds=1"), tmp_path / "run"
    )
    trained = [sum(bool(own.get("samples")) for own in record["clients"].values()) for record in run.rounds]
    assert trained == [1, 1, 1]

    def tables(server_round: int) -> list[torch.Tensor]:
        folder = run.folder / "rounds" / str(server_round)
        return [load_file(folder / name / "mixed.safetensors")[TABLE] for name in CLIENTS]

    assert all(torch.equal(a, b) for a, b in zip(tables(2), tables(3), strict=True))


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_run_that_was_stopped_ends_as_one_that_never_was(tmp_path, config, after) -> None:
    class Stop(Silent):
        def server_round(self, record: Any) -> None:
            if record["server_round"] == after:
                raise KeyboardInterrupt

    settings = ("federation.rounds=4", "federation.patience=null", "backbone.encoder.first_phase_rounds=2")
    whole = train(config(*settings), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(config(*settings), tmp_path / "stopped", progress=Stop())
    resumed = train(config(*settings), tmp_path / "stopped", resume=True)
    assert same_adapters(resumed.folder, whole.folder)
    assert resumed.metrics["overall"] == whole.metrics["overall"]


def test_every_method_runs_with_it(tmp_path, config) -> None:
    for method in ("local", "centralized", "fedavg", "fedprox", "ditto"):
        run = train(config(f"federation.method={method}", "federation.rounds=1"), tmp_path / method)
        assert run.metrics["overall"]["ndcg@3"] is not None
