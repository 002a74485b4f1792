"""What each method exchanges, by the formulas and in whole server rounds."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pplr.config import FederationConfig
from pplr.errors import ConfigError
from pplr.federation.aggregation import similarity
from pplr.federation.decisions import participants_of
from pplr.federation.heating import heating_weight, loss_share
from pplr.federation.methods import METHODS, Method, Mixing, RoundView, make_method, register
from pplr.recommend.training import train_locally
from pplr.stages.optimizer import LocalObjective

KEEP = "run.keep_rounds=true"


def equal(one, two):
    assert set(one) == set(two)
    return all(torch.equal(one[name], two[name]) for name in one)


def distance(one, two):
    return float(sum((one[name].double() - two[name].double()).square().sum() for name in one)) ** 0.5


def kept(rounds, server_round, which):
    names = [client.name for client in rounds.federation.clients]
    folder = rounds.folder / "rounds" / str(server_round)
    return {name: load_file(folder / name / f"{which}.safetensors") for name in names}


def view_of(draw_adapters, *, server_round=0, losses=(2.0, 2.1, 2.3), samples=(10, 30, 60)):
    initial, *adapters = draw_adapters([1.0] * (1 + len(losses)), seed=5)
    return RoundView(server_round, adapters, initial, losses, samples)


# -- who learns from whom ---------------------------------------------------------------------------------------


def test_every_method_of_the_issue_is_registered():
    assert set(METHODS) >= {"pplr", "fedavg", "fedprox", "ditto", "local", "centralized"}


def test_an_unknown_method_is_named_with_the_nearest():
    with pytest.raises(ConfigError, match=r"no method is called 'fedavgg'.*Did you mean 'fedavg'\?"):
        make_method(FederationConfig(method="fedavgg"))


def test_a_new_method_is_one_class(draw_adapters, carry_out):
    @register
    class Ring(Method):
        """Everyone takes the next client's adapter."""

        name: ClassVar[str] = "ring"

        def mixing(self, view):
            return Mixing(np.roll(np.eye(len(view.samples)), 1, axis=1))

    try:
        rounds = carry_out("federation.method=ring", "federation.rounds=1", KEEP)
    finally:
        del METHODS["ring"]
    local, mixed = kept(rounds, 1, "local"), kept(rounds, 1, "mixed")
    assert all(equal(mixed[own], local[other]) for own, other in (("0", "1"), ("1", "2"), ("2", "0")))


@pytest.mark.parametrize("method", ["local", "centralized"])
def test_methods_that_exchange_nothing(draw_adapters, method):
    assert make_method(FederationConfig(method=method)).mixing(view_of(draw_adapters)).weights is None


@pytest.mark.parametrize("method", ["fedavg", "fedprox", "ditto"])
@pytest.mark.parametrize(("weighting", "shares"), [("samples", [0.1, 0.3, 0.6]), ("uniform", [1 / 3] * 3)])
def test_averages_weigh_by_samples_or_all_the_same(draw_adapters, method, weighting, shares):
    mixing = make_method(FederationConfig(method=method, weighting=weighting)).mixing(view_of(draw_adapters))
    np.testing.assert_allclose(mixing.weights, [shares] * 3)


@pytest.mark.parametrize("of", ["adapters", "updates", "products"])
def test_pplr_is_similarity_heating_and_the_weights_written_out(draw_adapters, of):
    config = FederationConfig(method="pplr", similarity=of, temperature=0.1, heating_scale=0.5, heating_horizon=3)
    view = view_of(draw_adapters, server_round=1)
    mixing = make_method(config).mixing(view)
    alike = similarity(view.adapters, view.initial, of=of)
    shares = loss_share(view.losses, temperature=0.1)
    heat = [heating_weight(float(p), 1, heating_scale=0.5, heating_horizon=3) for p in shares]
    np.testing.assert_array_equal(mixing.similarity, alike)
    np.testing.assert_array_equal(mixing.loss_share, shares)
    np.testing.assert_array_equal(mixing.heating, heat)
    for i in range(3):
        bottom = alike[i, i] + heat[i] * sum(alike[i, j] for j in range(3) if j != i)
        expected = [(1 if i == j else heat[i]) * alike[i, j] / bottom for j in range(3)]
        assert mixing.weights[i].tolist() == pytest.approx(expected)


def test_pplr_without_heating_weighs_by_similarity_alone(draw_adapters):
    view = view_of(draw_adapters, losses=(1.0, 2.0, 9.0))
    mixing = make_method(FederationConfig(method="pplr", heating_scale=None)).mixing(view)
    alike = similarity(view.adapters, view.initial)
    assert mixing.heating.tolist() == [1, 1, 1]
    np.testing.assert_allclose(mixing.weights, alike / alike.sum(axis=1, keepdims=True))


def test_weighted_pplr_counts_clients_by_their_samples(draw_adapters):
    config = FederationConfig(method="pplr_weighted", similarity="updates", temperature=0.1, heating_scale=0.5)
    view = view_of(draw_adapters, server_round=1)
    mixing = make_method(config).mixing(view)
    paper = make_method(config.model_copy(update={"method": "pplr"})).mixing(view)
    np.testing.assert_array_equal(mixing.heating, paper.heating)
    np.testing.assert_array_equal(mixing.similarity, paper.similarity)
    alike, heat, counts = mixing.similarity, mixing.heating, view.samples
    for i in range(3):
        bottom = counts[i] * alike[i, i] + heat[i] * sum(counts[j] * alike[i, j] for j in range(3) if j != i)
        expected = [(1 if i == j else heat[i]) * counts[j] * alike[i, j] / bottom for j in range(3)]
        assert mixing.weights[i].tolist() == pytest.approx(expected)


def test_weighted_pplr_is_pplr_with_clients_of_one_size_and_fedavg_where_all_are_alike(draw_adapters):
    even = view_of(draw_adapters, samples=(7, 7, 7))
    told = [make_method(FederationConfig(method=name)).mixing(even).weights for name in ("pplr_weighted", "pplr")]
    np.testing.assert_allclose(told[0], told[1])
    uneven, open_to_all = view_of(draw_adapters), {"similarity": "none", "heating_scale": None}
    weighted = make_method(FederationConfig(method="pplr_weighted", **open_to_all)).mixing(uneven)
    np.testing.assert_allclose(weighted.weights, make_method(FederationConfig(method="fedavg")).mixing(uneven).weights)


def test_what_clients_minimise():
    def made(method, **options):
        return make_method(FederationConfig(method=method, proximal_mu=0.3, **options))

    for method in ("pplr", "pplr_weighted", "fedavg", "local", "centralized", "ditto"):
        assert made(method).objective() == LocalObjective()
    assert made("fedprox").objective() == LocalObjective(proximal_mu=0.3)
    assert made("ditto").personal_objective() == LocalObjective(proximal_mu=0.3)
    frozen = {"averaging": "freeze_a"}
    assert made("pplr", **frozen).objective() == LocalObjective(train_a=False)
    assert made("fedprox", **frozen).objective() == LocalObjective(proximal_mu=0.3, train_a=False)
    assert made("ditto", **frozen).personal_objective().train_a  # a personal adapter is never averaged


# -- whole server rounds ----------------------------------------------------------------------------------------


def test_local_exchanges_nothing(carry_out, backbone):
    rounds = carry_out("federation.method=local", KEEP)
    for server_round in (1, 2):
        local, mixed = kept(rounds, server_round, "local"), kept(rounds, server_round, "mixed")
        assert all(equal(local[name], mixed[name]) for name in local)
    alone = rounds.assembly.model.client("alone", rounds.assembly.initial)  # trained where no other client exists
    own = rounds.federation.clients[1]
    for server_round in (0, 1):
        train_locally(
            alone, own.encoded, rounds.config.training, client="1", server_round=server_round, rounds=2, seed=0
        )
    assert equal(alone.adapter(), own.model.adapter())
    assert not equal(own.model.adapter(), rounds.federation.clients[0].model.adapter())


@pytest.mark.parametrize("averaging", ["factors", "product", "freeze_a"])
def test_fedavg_gives_all_clients_the_same_bytes(carry_out, averaging):
    rounds = carry_out("federation.method=fedavg", f"federation.averaging={averaging}", "federation.rounds=1")
    first, *others = rounds.adapters().values()
    assert others
    assert all(equal(first, other) for other in others)
    assert distance(first, rounds.federation.initial) > 1e-3


def test_fedavg_reaches_absent_clients_too(carry_out):
    rounds = carry_out("federation.method=fedavg", "federation.participation=0.6", KEEP)
    for record in rounds.federation.records:
        server_round = record["server_round"]
        local, mixed = kept(rounds, server_round, "local"), kept(rounds, server_round, "mixed")
        trained = {name: row["samples"] for name, row in record["clients"].items() if row["samples"]}
        assert len(trained) == 2
        first, *others = mixed.values()
        assert all(equal(first, other) for other in others)
        for tensor_name, tensor in first.items():
            expected = sum(count * local[name][tensor_name].double() for name, count in trained.items())
            torch.testing.assert_close(tensor.double(), expected / sum(trained.values()), rtol=1e-6, atol=1e-7)
        assert set(record["clients"]) == {"0", "1", "2"}  # the absent one measures the average as well


def test_an_absent_client_of_pplr_keeps_its_own(carry_out):
    rounds = carry_out("federation.method=pplr", "federation.participation=0.6", "federation.rounds=1", KEEP)
    (record,) = rounds.federation.records
    (absent,) = {"0", "1", "2"} - set(record["clients"])
    assert equal(kept(rounds, 1, "mixed")[absent], rounds.federation.initial)
    assert all(set(row["mixed_from"]) == set(record["clients"]) for row in record["clients"].values())
    assert np.shape(record["similarity"]) == (2, 2)


def test_the_stronger_the_proximal_term_the_nearer_clients_stay(carry_out):
    moved = []
    for mu in (0.0, 1.0, 100.0):
        rounds = carry_out(
            "federation.method=fedprox", f"federation.proximal_mu={mu}", "federation.rounds=1", KEEP,
            "training.local_epochs=2", "training.clip_norm=null",
        )  # fmt: skip
        moved.append([distance(own, rounds.federation.initial) for own in kept(rounds, 1, "local").values()])
    plain, some, much = np.array(moved)
    assert (some < plain).all()
    assert (much < 0.8 * some).all()


def test_fedprox_of_no_strength_is_fedavg(carry_out):
    none = carry_out("federation.method=fedprox", "federation.proximal_mu=0")
    plain = carry_out("federation.method=fedavg")
    assert equal(none.adapters()["0"], plain.adapters()["0"])


def test_ditto_never_sends_its_personal_adapters(carry_out):
    sent = []

    def listen(federation):
        mixing = federation.method.mixing

        def overhear(view):
            sent.append([{name: tensor.clone() for name, tensor in state.items()} for state in view.adapters])
            return mixing(view)

        federation.method.mixing = overhear

    ditto = carry_out("federation.method=ditto", "federation.proximal_mu=0.1", prepare=listen)
    plain = carry_out("federation.method=fedavg")
    for client in ditto.federation.clients:
        personal = client.personal.adapter()
        assert client.serving is client.personal
        assert all(not torch.equal(personal[name], own[name]) for row in sent for own in row for name in personal)
    assert equal(ditto.adapters()["0"], plain.adapters()["0"])  # so no trace of a personal adapter is in the average
    one, two, _ = (client.personal.adapter() for client in ditto.federation.clients)
    assert not equal(one, two)


def test_ditto_pulls_the_personal_adapter_towards_where_the_round_began(carry_out):
    apart = []
    for mu in (0.0, 100.0):
        rounds = carry_out(
            "federation.method=ditto", f"federation.proximal_mu={mu}", "federation.rounds=1",
            "training.local_epochs=4", "training.clip_norm=null",
        )  # fmt: skip
        apart.append([distance(c.personal.adapter(), rounds.federation.initial) for c in rounds.federation.clients])
    assert (np.array(apart[1]) < 0.8 * np.array(apart[0])).all()


def test_centralized_trains_one_adapter_on_everybodys_samples(carry_out):
    rounds = carry_out("federation.method=centralized", "federation.rounds=1")
    (pooled,) = rounds.federation.clients
    everybody = [sample for own in rounds.assembly.data.samples.values() for sample in own]
    assert pooled.encoded == rounds.assembly.backbone.encode(everybody, rounds.assembly.data.dataset.catalog, 10)
    assert rounds.federation.records[0]["clients"]["pooled"]["samples"] == len(everybody) == 24
    assert set(rounds.assembly.serving(rounds.federation)) == {"0", "1", "2"}
    assert set(rounds.assembly.serving(rounds.federation).values()) == {pooled}


def test_freeze_a_keeps_a_at_its_start(carry_out):
    rounds = carry_out("federation.averaging=freeze_a")
    for state in rounds.adapters().values():
        for name, start in rounds.federation.initial.items():
            assert torch.equal(state[name], start) == ("lora_A" in name)


# -- who takes part ---------------------------------------------------------------------------------------------


def test_participants_are_drawn_by_the_seed_and_the_round(small_config):
    clients = list(range(10))
    drawn = small_config("federation.participation=0.3", "run.seed=4")

    def turns(config):
        return [participants_of(clients, server_round, config) for server_round in range(30)]

    assert turns(drawn) == turns(drawn)
    assert turns(drawn) != turns(small_config("federation.participation=0.3", "run.seed=5"))
    assert all(len(turn) == 3 and turn == sorted(turn) for turn in turns(drawn))
    assert len({tuple(turn) for turn in turns(drawn)}) > 20
    assert {client for turn in turns(drawn) for client in turn} == set(clients)
    assert turns(small_config()) == [clients] * 30
    assert all(len(turn) == 1 for turn in turns(small_config("federation.participation=0.001")))
