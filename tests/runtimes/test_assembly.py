"""From a configuration to clients around one frozen base."""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys

import pytest
import torch

from pplr.backbones.causal_lm import CausalLM
from pplr.backbones.slots import AdapterSlots
from pplr.config import AdapterConfig, TrainingConfig
from pplr.errors import ConfigError, PartitionError, StorageError
from pplr.progress import Silent
from pplr.recommend.training import train_locally
from pplr.runtimes.assembly import Assembly
from pplr.runtimes.in_process import train
from pplr.runtimes.run_data import load_run_data
from pplr.stages.cut import CutPlan
from pplr.stages.model import CutModel
from pplr.storage import cache_dir, write_atomic


def test_every_user_and_sample_belongs_to_one_client(small_config):
    data = load_run_data(small_config("training.samples=null", "evaluation.test_users=null"))
    users = [user for own in data.partition.users for user in own.tolist()]
    assert sorted(users) == list(range(24))
    for name, own in zip(data.partition.names, data.partition.users, strict=True):
        mine = set(own.tolist())
        assert {sample.user for sample in data.samples[name]} <= mine
        assert {case.user for case in data.validation[name]} <= mine
        assert {case.user for case in data.test[name]} == mine
        assert all(data.client_of(user) == name for user in mine)
    for own in data.samples.values():
        for sample in own:
            assert sample.target in data.holdout.train[sample.user]


def test_a_client_without_training_samples_is_named(small_config, monkeypatch):
    monkeypatch.setattr("pplr.runtimes.run_data.draw_samples", lambda every, total, seed: [*every[:2], []])
    with pytest.raises(PartitionError, match=r"client 2 \(region: west\) has no training samples.*Lower federation"):
        load_run_data(small_config())


def test_few_samples_are_at_least_one_for_each_client(small_config):
    assert [len(own) for own in load_run_data(small_config("training.samples=1")).samples.values()] == [1, 1, 1]


def test_draws_are_as_many_as_asked_and_follow_the_seed(small_config):
    def drawn(*settings):
        data = load_run_data(small_config(*settings))
        return data.samples, data.validation, data.test

    samples, validation, test = drawn()
    assert [len(own) for own in samples.values()] == [8, 8, 8]
    assert [len(own) for own in validation.values()] == [2, 2, 2]
    assert [len(own) for own in test.values()] == [2, 2, 2]
    assert drawn() == (samples, validation, test)
    assert all(one != two for one, two in zip(drawn("run.seed=1"), (samples, validation, test), strict=True))


@pytest.mark.parametrize("metric", ["ndgc@5", "ndcg@7"])
def test_a_validation_metric_that_is_not_measured_is_named_with_the_nearest(small_config, backbone, metric):
    with pytest.raises(ConfigError, match=rf"validation_metric: '{metric}' is not measured.*'ndcg@5'"):
        Assembly(small_config(f"evaluation.validation_metric={metric}"), Silent(), backbone)


def test_rankings_may_pick_the_best_round(tmp_path, small_config, backbone):
    config = small_config("evaluation.validation_metric=ndcg@5", "federation.rounds=1")
    run = train(config, tmp_path / "run", backbone=backbone)
    for row in run.rounds[0]["clients"].values():
        assert set(row["validation"]) == {"recall@3", "ndcg@3", "hit@3", "recall@5", "ndcg@5", "hit@5", "mrr"}


def test_a_damaged_cache_of_titles_is_told_and_mended_by_hand(small_config, backbone, monkeypatch, tmp_path):
    monkeypatch.setenv("PPLR_CACHE", str(tmp_path))
    assembly = Assembly(small_config(), Silent(), backbone)
    expected = assembly.space.embeddings
    (path,) = (cache_dir() / "title_embeddings").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-4])
    assembly = Assembly(small_config(), Silent(), backbone)
    for _ in range(2):
        with pytest.raises(StorageError, match=rf"do not match their SHA-256. Delete {path}"):
            _ = assembly.space
    path.unlink()
    assert torch.equal(assembly.space.embeddings, expected)


@pytest.mark.parametrize("number", [1, 2])
def test_a_cache_of_titles_that_was_half_written_is_written_again(
    small_config, backbone, monkeypatch, tmp_path, number
):
    monkeypatch.setenv("PPLR_CACHE", str(tmp_path))
    expected = Assembly(small_config(), Silent(), backbone).space.embeddings
    shutil.rmtree(tmp_path / "title_embeddings")
    writes = []

    def killed(path, content):
        writes.append(path)
        if len(writes) == number:
            raise KeyboardInterrupt
        write_atomic(path, content)

    monkeypatch.setattr("pplr.recommend.generative.write_atomic", killed)
    with pytest.raises(KeyboardInterrupt):
        _ = Assembly(small_config(), Silent(), backbone).space
    monkeypatch.setattr("pplr.recommend.generative.write_atomic", write_atomic)
    assert torch.equal(Assembly(small_config(), Silent(), backbone).space.embeddings, expected)


# -- one base for all -------------------------------------------------------------------------------------------

CLIENTS = 50


def living_bytes():
    """Bytes of all tensors that Python holds, each memory once."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if isinstance(type(thing), type) and issubclass(type(thing), torch.Tensor)]  # noqa: E501 # fmt: skip
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("cut", [True, False])
def test_a_client_costs_its_adapter_and_two_moments(backbone, cut):
    plan = CutPlan(1, 1, 3) if cut else CutPlan.make(None, 3)
    config = AdapterConfig(rank=16)
    model = CutModel(backbone, plan, config, TrainingConfig(batch_size=2))
    initial = model.initial_adapter(0)
    samples = [_sample(backbone, "Ash", "Elm"), _sample(backbone, "Oak", "Fir")]

    def admit(name):
        client = model.client(name, initial)
        train_locally(client, samples, TrainingConfig(batch_size=2), client=name, server_round=0, rounds=1, seed=0)
        return client

    clients = [admit("first")]  # whatever is made once is made now
    before = living_bytes()
    clients += [admit(f"client {number}") for number in range(CLIENTS)]
    each = (living_bytes() - before) / CLIENTS
    adapter = sum(tensor.nbytes for tensor in initial.values())
    assert adapter > 10_000
    assert each == pytest.approx(3 * adapter, rel=0.1)
    base = {p.data_ptr() for p in backbone.model.parameters()}
    for client in (clients[0], clients[-1]):
        stages = [*client._stages, *([model.host.stage] if cut else [])]
        frozen = {p.data_ptr() for stage in stages for n, p in stage.blocks.named_parameters() if "lora_" not in n}
        assert frozen
        assert frozen <= base


def _sample(backbone, *titles):
    from pplr.backbones.causal_lm import EncodedSample

    answer = backbone.answer_tokens(titles[-1])
    return EncodedSample(backbone.prompt_tokens(titles[:-1], len(answer)), answer)


def test_all_clients_of_a_run_stand_on_one_base(small_config, backbone):
    federation = Assembly(small_config("federation.method=ditto"), Silent(), backbone).federation()
    models = [model for client in federation.clients for model in (client.model, client.personal)]
    assert len(models) == 6
    assert len({id(stage) for model in models for stage in model._stages}) == 2
    tensors = [tensor.data_ptr() for model in models for tensor in model.adapter().values()]
    assert len(set(tensors)) == len(tensors)  # adapters alone are each model's own
    assert isinstance(backbone, CausalLM)
    assert isinstance(models[0]._stages[0].slots, AdapterSlots)


def test_what_a_backbone_trains_on_is_known_in_a_fresh_process(small_config):
    """No backbone is loaded yet when the data is; a missed lookup once fell back to one target for each sample."""
    config = small_config("backbone.name=item_vectors")
    code = (
        "import sys; from pplr.config import Config; from pplr.runtimes.assembly import load_run_data; import yaml; "
        "data = load_run_data(Config.model_validate(yaml.safe_load(sys.stdin.read()))); "
        "print(all(sample.every for own in data.samples.values() for sample in own))"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], input=config.to_yaml(), capture_output=True, text=True, check=True
    )
    assert told.stdout.strip() == "True"
