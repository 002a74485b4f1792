"""The loop of server rounds: best rounds, patience, records, and what ends a run."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from pplr.config import Config
from pplr.data.prompts import Sample
from pplr.errors import AdapterError, CheckpointError, FederationError
from pplr.federation.checkpoints import CheckpointStore
from pplr.federation.client import FederatedClient
from pplr.federation.decisions import Best
from pplr.federation.rounds import restore_checkpoint
from pplr.runtimes.assembly import Assembly
from pplr.runtimes.in_process import train
from pplr.stages.client_model import ClientModel


def scripted(*scores):
    """Measure nothing, and tell scores written beforehand, one for each round."""
    left = iter(scores)
    return lambda _: {"loss": next(left), "ndcg@5": 0.0}


def equal(one, two):
    return set(one) == set(two) and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("metric", "scores", "best"),
    [
        ("loss", [3.0, 2.0, 2.0, 4.0], [0, 1, 1, 1]),  # a tie keeps the earlier round
        ("ndcg@10", [0.1, 0.3, 0.3, 0.2], [0, 1, 1, 1]),
        ("loss", [None, None], [0, 1]),
        ("ndcg@10", [0.0, 0.0], [0, 0]),
    ],
)
def test_a_client_remembers_its_best_round(metric, scores, best):
    left = iter(scores)
    client = FederatedClient("0", [], None, lambda _: {metric: next(left)})
    found = []
    for server_round in range(len(scores)):
        _, improved = client.validate(server_round, metric)
        found.append(client.best.server_round)
        assert improved == (client.best.server_round == server_round)
    assert found == best
    assert client.best.score == scores[best[-1]]


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_a_validation_that_is_not_finite_ends_the_run(score):
    client = FederatedClient("north", [], None, lambda _: {"loss": score})
    with pytest.raises(
        FederationError, match=r"client north's loss .* in server round 1.*Lower training.learning_rate"
    ):
        client.validate(0, "loss")


def test_the_best_round_is_what_is_exported_not_the_last(tmp_path, small_config, backbone, monkeypatch):
    scores = {"0": (3.0, 2.0, 2.5, 2.6), "1": (1.0, 1.5, 1.2, 1.1), "2": (4.0, 3.0, 2.0, 1.0)}
    monkeypatch.setattr(Assembly, "_validation", lambda self, name: scripted(*scores[name]))
    run = train(small_config("federation.rounds=4", "run.keep_rounds=true", "run.checkpoints=1"), tmp_path / "run",
                backbone=backbone)  # fmt: skip
    for name, server_round in (("0", 2), ("1", 1), ("2", 4)):
        saved = load_file(run.folder / "clients" / name / "adapter_model.safetensors")
        assert equal(saved, load_file(run.folder / "rounds" / str(server_round) / name / "mixed.safetensors"))
        assert not equal(saved, load_file(run.folder / "rounds" / "3" / name / "mixed.safetensors"))


def test_a_tiny_run_with_a_rate_that_is_too_high_really_keeps_an_earlier_round(finished):
    run = finished("run.keep_rounds=true", "training.learning_rate=1.0", "training.schedule=constant",
                   "federation.rounds=3", "federation.method=local")  # fmt: skip
    kept_early = 0
    for name in ("0", "1", "2"):
        losses = [record["clients"][name]["validation"]["loss"] for record in run.rounds]
        best = 1 + losses.index(min(losses))
        kept_early += best < 3
        saved = load_file(run.folder / "clients" / name / "adapter_model.safetensors")
        assert equal(saved, load_file(run.folder / "rounds" / str(best) / name / "mixed.safetensors"))
    assert kept_early


def patient(federation, *scores):
    for client, own in zip(federation.clients, scores, strict=True):
        client._validate = scripted(*own)


def test_patience_ends_the_run_when_no_client_improves(carry_out):
    rounds = carry_out(
        "federation.rounds=9", "federation.patience=2",
        prepare=lambda f: patient(f, [5, 4, 4, 4, 9, 9], [5, 6, 3, 3, 3, 9], [1, 1, 1, 1, 1, 9]),
    )  # fmt: skip
    assert len(rounds.federation.records) == 5  # client 1 improved last in the third, and two more went by
    assert [client.best for client in rounds.federation.clients] == [Best(1, 4), Best(2, 3), Best(0, 1)]


def test_without_patience_all_rounds_are_carried_out(carry_out):
    rounds = carry_out(
        "federation.rounds=4", "federation.patience=null", prepare=lambda f: patient(f, *[[5, 6, 7, 8]] * 3)
    )
    assert len(rounds.federation.records) == 4


def test_a_client_that_cannot_validate_does_not_keep_the_others_from_stopping(carry_out):
    rounds = carry_out(
        "federation.rounds=6", "federation.patience=1",
        prepare=lambda f: patient(f, [5, 6, 6, 6, 6, 6], [None] * 6, [5, 5, 6, 6, 6, 6]),
    )  # fmt: skip
    assert len(rounds.federation.records) == 2
    assert rounds.federation.clients[1].best == Best(1, None)  # its newest


def test_a_federation_that_cannot_validate_at_all_goes_on_to_the_end(carry_out):
    rounds = carry_out("federation.rounds=3", "federation.patience=1", prepare=lambda f: patient(f, *[[None] * 3] * 3))
    assert len(rounds.federation.records) == 3


def validation_samples(rounds, name):
    assembly = rounds.assembly
    samples = [Sample(case.user, case.history, case.targets[0]) for case in assembly.data.validation[name]]
    assert len(samples) == 2
    return assembly.backbone.encode(samples, assembly.data.dataset.catalog, rounds.config.data.history_items)


def test_a_record_says_what_happened(carry_out, backbone):
    rounds = carry_out()
    lines = [json.loads(json.dumps(record, allow_nan=False)) for record in rounds.federation.records]
    assert [line["server_round"] for line in lines] == [1, 2]
    names = [client.name for client in rounds.federation.clients]
    for line in lines:
        assert set(line) == {"server_round", "similarity", "clients"}
        assert list(line["clients"]) == names
        assert sum(row["loss_share"] for row in line["clients"].values()) == pytest.approx(1)
        for client, row in zip(rounds.federation.clients, line["clients"].values(), strict=True):
            assert set(row) == {
                "samples", "tokens", "loss", "loss_share", "heating_weight", "mixed_from", "validation", "seconds",
                "bytes_up", "bytes_down",
            }  # fmt: skip
            assert row["samples"] == len(client.encoded)
            assert row["tokens"] == sum(backbone.length(sample) for sample in client.encoded)
            assert sum(row["mixed_from"].values()) == pytest.approx(1)
            # a hidden state each way for each token, a gradient each way where it is trained; 16 wide, float32
            validated = sum(backbone.length(sample) for sample in validation_samples(rounds, client.name))
            assert row["bytes_up"] == row["bytes_down"] == (2 * row["tokens"] + validated) * 16 * 4


def test_a_method_that_measures_no_heating_records_null(carry_out):
    (record,) = carry_out("federation.method=fedavg", "federation.rounds=1").federation.records
    assert record["similarity"] is None
    assert all(row["loss_share"] is None and row["heating_weight"] is None for row in record["clients"].values())


# -- what is not finite -----------------------------------------------------------------------------------------


def test_a_loss_that_explodes_ends_the_run_before_a_checkpoint(carry_out, tmp_path, monkeypatch):
    real, calls = ClientModel.train_loss, []

    def train_loss(model, batch, dropout_seed):
        calls.append(dropout_seed)
        return real(model, batch, dropout_seed) * (math.inf if len(calls) == 2 else 1)

    monkeypatch.setattr(ClientModel, "train_loss", train_loss)
    with pytest.raises(FederationError, match=r"loss of client 0 is inf at step 2 of server round 1.*Lower training"):
        carry_out()
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def spoiled(number, whose, value):
    """Let a client's training end with one tensor spoiled, as after a last step that was too large."""

    def prepare(federation):
        client = federation.clients[number]
        real = client.train

        def train_and_spoil(*arguments):
            result = real(*arguments)
            adapter = getattr(client, whose).adapter()
            next(tensor for name, tensor in reversed(adapter.items()) if "lora_B" in name).fill_(value)
            return result

        client.train = train_and_spoil

    return prepare


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_adapter_that_explodes_in_the_last_step_ends_the_run_before_a_checkpoint(carry_out, tmp_path, value):
    with pytest.raises(AdapterError, match=r"client 1's adapter: .* holds NaN or infinite values"):
        carry_out(prepare=spoiled(1, "model", value))
    with pytest.raises(AdapterError, match=r"client 1's personal adapter: .* holds NaN or infinite values"):
        carry_out("federation.method=ditto", prepare=spoiled(1, "personal", value))
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_an_adapter_that_is_finite_but_useless_ends_the_run_before_a_checkpoint(carry_out, tmp_path):
    """The states it makes overflow, so its validation loss is no number."""
    with pytest.raises(FederationError, match=r"client 0's loss on its validation targets is \w+ in server round 1"):
        carry_out("federation.method=local", prepare=spoiled(0, "model", 3e38))
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


# -- going on ---------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_federation_is_refused(carry_out):
    rounds = carry_out("federation.rounds=1", "federation.method=local")
    store = CheckpointStore(rounds.folder / "checkpoints", keep=2, warn=print)
    checkpoint = store.newest()
    rounds.federation.clients[0].name = "elsewhere"
    with pytest.raises(CheckpointError, match=r"of another federation.*Resume with the configuration"):
        restore_checkpoint(rounds.federation, checkpoint)


@pytest.mark.parametrize("optimizer_state", ["carry", "reset"])
@pytest.mark.parametrize("method", ["pplr", "ditto"])
def test_restored_parties_stand_where_they_stood(carry_out, method, optimizer_state):
    settings = (f"federation.method={method}", f"training.optimizer_state={optimizer_state}")
    whole = carry_out(*settings)
    config: Config = whole.config
    fresh = Assembly(config, whole.assembly.progress, whole.assembly.backbone).federation()
    restore_checkpoint(fresh, CheckpointStore(whole.folder / "checkpoints", keep=2, warn=print).newest())
    assert fresh.next_round == 2
    assert fresh.records == json.loads(json.dumps(whole.federation.records))
    for old, new in zip(whole.federation.clients, fresh.clients, strict=True):
        assert old.best == new.best
        for before, after in ((old.model, new.model), (old.personal, new.personal)):
            if before is not None:
                assert equal(before.adapter(), after.adapter())
                state = before.optimizer_state()
                assert len(state) == 1 + 3 * len(before.adapter())
                assert equal(state, after.optimizer_state())
