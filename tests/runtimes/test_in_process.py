"""Whole runs in one process: what a run folder holds, that it can be checked and repeated, and what is refused."""

from __future__ import annotations

import fcntl
import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import pplr
from pplr.config_files import load_config
from pplr.data.prompts import Sample
from pplr.errors import CutError, PartitionError, RunError, StorageError
from pplr.runtimes.in_process import train
from pplr.runtimes.run import open_run
from pplr.stages.client_model import ClientModel
from pplr.testing import tiny_decoder

WHOLE = ("run.keep_rounds=true", "evaluation.before=true")
QUICK = ("evaluation.test_users=3", "evaluation.beams=1", "evaluation.max_new_tokens=2", "evaluation.floors=[]")


def adapters(run):
    found = sorted(run.folder.glob("clients/*/adapter_model.safetensors"))
    return {path.parent.name: path.read_bytes() for path in found}


def everything(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def run(finished):
    return finished(*WHOLE)


# -- what a run folder holds ------------------------------------------------------------------------------------


def test_the_folder_holds_what_it_should(run):
    assert {path.name for path in run.folder.iterdir()} == {
        ".lock", "checkpoints", "clients", "config.yaml", "evaluation.json", "metrics.json", "provenance.json",
        "rounds", "rounds.jsonl",
    }  # fmt: skip
    assert sorted(path.name for path in (run.folder / "clients").iterdir()) == ["0", "1", "2"]
    for client in "012":
        files = sorted(path.name for path in (run.folder / "clients" / client).iterdir())
        assert files == ["adapter_config.json", "adapter_model.safetensors"]
        for server_round in "12":
            kept = sorted(path.name for path in (run.folder / "rounds" / server_round / client).iterdir())
            assert kept == ["local.safetensors", "mixed.safetensors"]
    assert sorted(path.name for path in (run.folder / "checkpoints").iterdir()) == ["000001", "000002"]


def test_the_configuration_is_resolved_and_makes_the_same_run(run):
    assert load_config(run.folder / "config.yaml") == run.config
    written = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert written["training"]["weight_decay"] == 0.0  # a default is written out


def test_provenance_says_where_everything_came_from(run):
    told = run.provenance
    assembly = run.assembly()
    assert told["seed"] == 0
    assert told["versions"]["pplr"] == pplr.__version__
    assert told["versions"]["torch"] == torch.__version__
    assert set(told["versions"]) >= {"python", "transformers", "peft", "numpy"}
    assert told["holdout_sha256"] == assembly.data.holdout.sha256
    assert told["partition_sha256"] == assembly.data.partition.sha256
    assert told["catalog_sha256"] == assembly.data.dataset.catalog.sha256
    assert told["model_sha256"] == assembly.backbone.fingerprint()
    assert all(len(told[name]) == 64 for name in told if name.endswith("_sha256"))
    assert list(told["clients"]) == ["0", "1", "2"]


def test_metrics_have_their_keys_and_what_was_not_measured_is_null(run):
    told = json.loads((run.folder / "metrics.json").read_text())
    assert set(told) == {
        "method", "backbone", "cut", "overall", "before", "clients", "spread", "floors", "cost", "seconds",
        "samples_per_second",
    }  # fmt: skip
    names = ["recall@3", "ndcg@3", "hit@3", "recall@5", "ndcg@5", "hit@5", "mrr"]
    assert (told["method"], told["backbone"]) == ("pplr", "causal_lm")
    assert told["cut"] == {"input_layers": 1, "output_layers": 1, "total_layers": 3}
    assert list(told["overall"]) == list(told["floors"]["popularity"]) == list(told["spread"]) == names
    assert list(told["clients"]) == list(told["before"]["clients"]) == ["0", "1", "2"]
    assert all(list(own) == ["users", *names] and own["users"] == 2 for own in told["clients"].values())
    for side in ("client", "server"):
        assert told["cost"][side]["peak_rss_bytes"] is None  # one process holds both sides
        assert told["cost"][side]["stored_bytes"] > 0
    rows = [row for record in run.rounds for row in record["clients"].values()]
    assert told["cost"]["wire"]["bytes_up"] == sum(row["bytes_up"] for row in rows) > 0
    assert told["seconds"]["train"] == sum(row["seconds"] for row in rows)
    assert told["samples_per_second"] == pytest.approx(48 / told["seconds"]["train"])
    assert told["seconds"]["total"] > told["seconds"]["train"] + told["seconds"]["evaluate"]


def test_operations_of_both_sides_are_those_of_the_whole_model(run):
    cost = run.metrics["cost"]
    flops = {side: cost[side]["train_flops"] for side in ("client", "server", "whole")}
    assert flops["client"] + flops["server"] == flops["whole"]
    assert 0 < flops["server"] < flops["client"]
    assert cost["whole"]["stored_bytes"] == cost["client"]["stored_bytes"] + cost["server"]["stored_bytes"]


def test_the_base_is_shared_out_between_client_and_server(run, backbone):
    cost = run.metrics["cost"]
    whole = {p.data_ptr(): p.nbytes for p in backbone.model.parameters()}
    assert cost["client"]["stored_bytes"] + cost["server"]["stored_bytes"] == sum(whole.values())
    assert cost["server"]["stored_bytes"] == sum(p.nbytes for p in backbone.model.model.layers[1].parameters())


def test_without_a_cut_nothing_is_on_the_server_and_nothing_crosses(finished):
    told = finished("cut=null", *QUICK).metrics
    assert told["cut"] is None
    assert told["cost"]["server"]["stored_bytes"] == 0
    assert told["cost"]["wire"] == {"bytes_up": 0, "bytes_down": 0}
    assert "before" not in told
    assert told["floors"] == {}


def test_the_stored_evaluation_gives_the_metrics(run):
    for part, told in (("test", run.metrics), ("before", run.metrics["before"])):
        assert run.evaluation(part).overall() == told["overall"]
        assert run.evaluation(part).by_client() == told["clients"]
    assert run.evaluation("popularity").overall() == run.metrics["floors"]["popularity"]
    with pytest.raises(RunError, match=r"no evaluation 'popularty'.*Did you mean 'popularity'"):
        run.evaluation("popularty")


def test_evaluating_again_gives_the_same_figures(run):
    before, seconds = run.metrics, run.metrics["seconds"]["total"]
    again = open_run(run.folder)
    again._assembled = run.assembly()
    again.evaluate()
    again.evaluate()
    after = again.metrics
    assert after.pop("seconds")["total"] == seconds
    before.pop("seconds")
    assert after == before


# -- anyone can check the mixing --------------------------------------------------------------------------------


def test_the_mixing_can_be_recomputed_from_what_was_kept(run):
    for t, record in enumerate(run.rounds):
        folder = run.folder / "rounds" / str(t + 1)
        rows = record["clients"]
        local = {name: load_file(folder / name / "local.safetensors") for name in rows}
        vectors = {name: np.concatenate([x.double().numpy().ravel() for x in own.values()]) for name, own in local.items()}  # noqa: E501 # fmt: skip
        alike = {
            (i, j): (vectors[i] @ vectors[j] / np.linalg.norm(vectors[i]) / np.linalg.norm(vectors[j]) + 1) / 2
            for i in rows
            for j in rows
        }
        top = sum(math.exp(row["loss"] / 0.05 - max(r["loss"] for r in rows.values()) / 0.05) for row in rows.values())
        for i, row in rows.items():
            share = math.exp(row["loss"] / 0.05 - max(r["loss"] for r in rows.values()) / 0.05) / top
            heat = math.tanh(0.7 / share ** (t + 1 / 5))
            assert row["loss_share"] == pytest.approx(share)
            assert row["heating_weight"] == pytest.approx(heat)
            bottom = alike[i, i] + heat * sum(alike[i, j] for j in rows if j != i)
            weights = {j: (1.0 if i == j else heat) * alike[i, j] / bottom for j in rows}
            assert row["mixed_from"] == pytest.approx(weights)
            mixed = load_file(folder / i / "mixed.safetensors")
            for name, tensor in mixed.items():
                expected = sum(weights[j] * local[j][name].double().numpy() for j in rows)
                np.testing.assert_allclose(tensor.numpy(), expected, atol=1e-6)
        assert record["similarity"] == [[pytest.approx(alike[i, j]) for j in rows] for i in rows]


def test_adapters_load_with_peft_and_say_the_same(run):
    from peft import PeftModel

    assembly = run.assembly()
    case = assembly.data.test["1"][0]
    sample = Sample(case.user, case.history, case.targets[0])
    batch = assembly.backbone.collate(assembly.backbone.encode([sample], assembly.data.dataset.catalog, 10))
    own = load_file(run.folder / "clients" / "1" / "adapter_model.safetensors")
    reader = assembly.model.client("compared", own)
    try:
        expected = assembly.backbone.logits(reader.hidden_states(batch))
    finally:
        assembly.model.dismiss("compared")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        loaded = PeftModel.from_pretrained(tiny_decoder(layers=3, width=16), run.folder / "clients" / "1").eval()
    with torch.no_grad():
        found = loaded(input_ids=batch.input_ids).logits
        loaded.base_model.disable_adapter_layers()
        base = loaded(input_ids=batch.input_ids).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (base - expected).abs().max() > 1e-2


# -- the same again ---------------------------------------------------------------------------------------------


def test_the_same_configuration_gives_the_same_bytes(run, tmp_path, backbone):
    again = train(run.config, tmp_path / "again", backbone=backbone)
    assert adapters(again) == adapters(run)
    assert again.metrics["overall"] == run.metrics["overall"]
    for old, new in zip(run.rounds, again.rounds, strict=True):
        for row in (*old["clients"].values(), *new["clients"].values()):
            row.pop("seconds")
        assert old == new


@pytest.mark.parametrize("method", ["pplr", "ditto"])
def test_cut_and_uncut_train_the_same_bytes(finished, method):
    settings = (f"federation.method={method}", "adapter.dropout=0.2", *QUICK)
    uncut, middle, nothing_before = (
        adapters(finished(*settings, cut))
        for cut in ("cut=null", "cut.input_layers=1", "cut={input_layers: 0, output_layers: 2}")
    )
    assert uncut == middle == nothing_before


def test_another_seed_gives_other_bytes(finished):
    one, two = adapters(finished("cut=null", *QUICK)), adapters(finished("cut=null", *QUICK, "run.seed=1"))
    assert all(one[name] != two[name] for name in one)


# -- folders that are refused -----------------------------------------------------------------------------------


def test_a_run_that_is_there_is_not_overwritten(run, backbone):
    before = everything(run.folder)
    with pytest.raises(RunError, match=r"holds this run already.*--resume"):
        train(run.config, run.folder, backbone=backbone)
    for resume in (False, True):
        other = load_config(run.folder / "config.yaml", ["training.learning_rate=0.5"])
        with pytest.raises(RunError, match=r"another configuration \(training.learning_rate is 0.02 there and 0.5"):
            train(other, run.folder, resume=resume, backbone=backbone)
    assert everything(run.folder) == before


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", ["thesis.txt", ".hidden", "checkpoints"])
def test_a_foreign_folder_is_left_as_it_is(tmp_path, small_config, backbone, name, resume):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / name).write_text("mine")
    (folder / ".lock").write_text("also mine")
    with pytest.raises(RunError, match=rf"is not empty and is not a run folder \(it holds {name}\)"):
        train(small_config(), folder, resume=resume, backbone=backbone)
    assert everything(folder) == {folder / name: b"mine", folder / ".lock": b"also mine"}


def test_a_foreign_configuration_is_left_as_it_is(tmp_path, small_config, backbone):
    (tmp_path / "config.yaml").write_text("site: blog\n")
    with pytest.raises(RunError, match=r"configuration that cannot be read .*unknown key 'site'"):
        train(small_config(), tmp_path, resume=True, backbone=backbone)
    assert (tmp_path / "config.yaml").read_text() == "site: blog\n"


def test_a_folder_where_a_file_is_cannot_be_made(tmp_path, small_config, backbone):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(StorageError, match=r"cannot write .*run.*Choose a folder"):
        train(small_config(), tmp_path / "run", backbone=backbone)
    assert (tmp_path / "run").read_text() == "mine"


def test_a_folder_in_use_is_refused(run, backbone):
    with (run.folder / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="another process is writing"):
            train(run.config, run.folder, resume=True, backbone=backbone)


# -- what ends a run before it begins ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ("cut.input_layers=3", CutError, r"3 input and 1 output layers leaves the server none of the model's 3"),
        ("data.partition.min_users=9", PartitionError, r"at least 9"),
        ("federation.clients=4", PartitionError, r"'region' has 3 values, too few for 4 clients"),
    ],
)
def test_what_cannot_be_trained_is_told_before_training(
    tmp_path, small_config, backbone, monkeypatch, setting, error, message
):
    def never(*_, **__):
        raise AssertionError("training began")

    monkeypatch.setattr(ClientModel, "train_loss", never)
    with pytest.raises(error, match=message):
        train(small_config(setting), tmp_path / "run", backbone=backbone)
    monkeypatch.undo()
    assert not list(Path(tmp_path).rglob("config.yaml"))  # so the folder is still free for a better configuration
    assert train(small_config(*QUICK, "federation.rounds=1"), tmp_path / "run", backbone=backbone).metrics is not None


def test_clients_that_were_never_drawn_are_served_by_the_start(tmp_path, small_config, backbone):
    config = small_config(*QUICK, "federation.participation=0.3", "federation.rounds=1")
    run = train(config, tmp_path / "run", backbone=backbone)
    (trained,) = run.rounds[0]["clients"]
    start = run.assembly().initial
    for client in "012":
        own = load_file(run.folder / "clients" / client / "adapter_model.safetensors")
        assert all(torch.equal(own[name], start[name]) for name in start) == (client != trained)


def test_centralized_serves_every_client_with_one_adapter(finished):
    own = adapters(finished("federation.method=centralized", *QUICK))
    assert list(own) == ["0", "1", "2"]
    assert len(set(own.values())) == 1


def test_ditto_serves_every_client_with_its_personal_adapter(finished):
    assert (
        len(set(adapters(finished("federation.method=ditto", "adapter.dropout=0.2", *QUICK, "cut=null")).values())) == 3
    )
