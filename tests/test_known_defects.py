"""Defects known from other implementations of the method, each with a test that fails where the defect is."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from pplr.backbones import loading
from pplr.backbones.adapters import load_adapter, save_adapter
from pplr.data.prompts import Case, Sample, training_samples
from pplr.federation.aggregation import mix, mixing_weights, similarity
from pplr.progress import Silent
from pplr.recommend.evaluation import evaluate
from pplr.recommend.training import evaluation_loss, train_locally
from pplr.runtimes.assembly import Assembly
from pplr.runtimes.in_process import train
from pplr.runtimes.run import open_run
from pplr.runtimes.run_data import load_run_data
from pplr.testing import tiny_encoder

LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"


@pytest.fixture
def assembly(small_config, backbone):
    return Assembly(small_config(), Silent(), backbone)


def test_aggregation_in_place():
    """Every client is mixed from one snapshot, also where mixed tensors overwrite the adapters they came from."""

    def marked():  # client i's adapter is the i-th unit vector, so a mixture shows its weights
        return [{A: torch.eye(5)[i : i + 1].clone(), B: torch.eye(5)[:, i : i + 1].clone()} for i in range(5)]

    in_place = marked()
    for own in in_place:  # what the authors' loop does
        own[A] = torch.stack([other[A] for other in in_place]).mean(dim=0)
    assert in_place[4][A].flatten().tolist() == pytest.approx([0.07, 0.13, 0.18, 0.22, 0.41], abs=6e-3)

    states = marked()
    for layer in mix(states, mixing_weights(np.ones((5, 5)), [1.0] * 5)):
        for own, tensors in zip(states, layer, strict=True):
            for name, tensor in tensors.items():
                own[name].copy_(tensor)
    for own in states:
        assert own[A].flatten().tolist() == pytest.approx([0.2] * 5)
        assert own[B].flatten().tolist() == pytest.approx([0.2] * 5)


def test_base_model_reloaded_for_each_client(tmp_path, small_config, model_folder, monkeypatch):
    loads = []
    real = loading.AutoModelForCausalLM.from_pretrained

    def counted(*arguments, **options):
        loads.append(arguments)
        return real(*arguments, **options)

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", counted)
    config = small_config(f"backbone.model={model_folder}", "evaluation.beams=1", "evaluation.max_new_tokens=2")
    run = train(config, tmp_path / "run")
    run.recommend(user="u4")
    run.evaluate()
    assert len(run.rounds) == 2
    assert len(run.metrics["clients"]) == 3
    assert len(loads) == 1


def test_another_random_adapter_for_each_client(assembly):
    adapters = [client.model.adapter() for client in assembly.federation().clients]
    assert all(torch.equal(own[name], tensor) for own in adapters for name, tensor in assembly.initial.items())
    assert similarity(adapters, assembly.initial).tolist() == [[1.0] * 3] * 3
    apart = [assembly.model.initial_adapter(seed) for seed in range(3)]  # what the similarity would say otherwise
    assert (abs(similarity(apart, assembly.initial) - np.eye(3) / 2 - 0.5) < 0.1).all()
    assert any(tensor.abs().sum() > 0 for name, tensor in assembly.initial.items() if "lora_A" in name)


def test_factors_averaged_apart():
    """mean(B) mean(A) is not mean(BA): `product` and `freeze_a` are exact where the mixture fits the rank."""
    source = torch.Generator().manual_seed(0)
    states = [{A: torch.randn(4, 9, generator=source), B: torch.randn(7, 4, generator=source)} for _ in range(2)]
    for state in states:
        state[B][:, 2:] = 0  # of rank two each, so their mean is of rank four
    weights = np.full((2, 2), 0.5)
    expected = (states[0][B] @ states[0][A] + states[1][B] @ states[1][A]) / 2

    def mixed(states, averaging):
        (layer,) = mix(states, weights, averaging=averaging)
        own = states[0] | layer[0]
        return own[B] @ own[A]

    torch.testing.assert_close(mixed(states, "product"), expected)
    assert (mixed(states, "factors") - expected).norm() > 0.1 * expected.norm()
    frozen = [{A: states[0][A], B: state[B]} for state in states]
    expected = (states[0][B] + states[1][B]) @ states[0][A] / 2
    torch.testing.assert_close(mixed(frozen, "freeze_a"), expected)


def test_training_prompt_indented_and_inference_prompt_not(assembly, monkeypatch):
    data = assembly.data
    sample = training_samples(data.holdout, [5], 10)[-1]
    (encoded,) = assembly.backbone.encode([sample], data.dataset.catalog, 10)
    prompts = []

    def heard(model, tokens, **options):
        prompts.extend(tokens)
        raise InterruptedError

    monkeypatch.setattr("pplr.recommend.generative.generate", heard)
    reader = assembly.model.client("reader", assembly.initial)
    with pytest.raises(InterruptedError):
        assembly.ranker(reader).scores([Case(5, sample.history, (sample.target,), sample.history)])
    assert prompts == [encoded.prompt]
    text = assembly.backbone.tokenizer.decode(encoded.prompt)
    assert all(line == line.strip() for line in text.splitlines())


def test_loss_over_prompt_tokens(assembly, backbone):
    """The loss that heating and the best round follow is the answer's alone."""
    samples = [sample for own in assembly.data.samples.values() for sample in own][:5]
    encoded = backbone.encode(samples, assembly.data.dataset.catalog, 10)
    answers, everything = [], []
    for one in encoded:
        tokens = torch.tensor(one.prompt + one.answer)
        with torch.no_grad():
            logs = backbone.model(input_ids=tokens[None]).logits[0].log_softmax(-1)
        for place in range(1, len(tokens)):
            value = -float(logs[place - 1, tokens[place]])
            everything.append(value)
            if place >= len(one.prompt):
                answers.append(value)
    client = assembly.model.client("reader", assembly.initial)  # B is zero: the model is still the base
    expected = sum(answers) / len(answers)
    assert evaluation_loss(client, encoded, 2) == pytest.approx(expected, rel=1e-4)
    assert abs(sum(everything) / len(everything) - expected) > 0.02 * expected
    still = assembly.config.training.model_copy(update={"learning_rate": 1e-12})
    told = train_locally(client, encoded, still, client="0", server_round=0, rounds=1, seed=0)
    assert told.loss == pytest.approx(expected, rel=1e-4)
    assert told.targets == len(answers)


def test_unseeded_partition_cached_under_a_fixed_name(small_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PPLR_CACHE", str(tmp_path / "cache"))

    def partition(global_seed, *settings):
        np.random.seed(global_seed)  # noqa: NPY002  (whose state must not matter)
        found = load_run_data(
            small_config(
                "data.partition.by=kmeans", "data.partition.factors=4", "data.partition.min_users=1", *settings
            )
        ).partition
        return found.sha256, [own.tolist() for own in found.users]

    first = partition(0)
    assert partition(1) == first
    assert len(partition(0, "federation.clients=2")[1]) == 2
    dealt = {partition(0, f"run.seed={seed}", "data.partition.by=random")[0] for seed in range(4)}
    assert len(dealt) == 4
    assert list(tmp_path.iterdir()) == []  # nothing is cached


def test_ground_truth_by_title(assembly):
    """Two items are called Oak: recommending one is no hit for the other, and both are ranked."""
    catalog = assembly.data.dataset.catalog
    oak, other_oak = catalog.find("Oak")
    assert len(catalog) == 20
    elm, fir = catalog.find("Elm")[0], catalog.find("Fir")[0]

    class OneOak:
        def scores(self, cases):
            row = np.zeros(20, dtype=np.float32)
            row[[oak, elm]] = 2, 1
            return np.repeat(row[None], len(cases), axis=0)

    cases = {"0": [Case(0, (fir,), (oak,), (fir,)), Case(1, (fir,), (other_oak,), (fir,))]}
    assert evaluate(OneOak(), cases, [2], 8).values["hit@2"].tolist() == [1.0, 0.0]
    seen = {"0": [Case(0, (oak,), (other_oak,), (oak,))]}  # having had one does not mask the other
    assert evaluate(OneOak(), seen, [20], 8).values["hit@20"].tolist() == [1.0]
    titles = assembly.space.title_of
    assert titles[oak] == titles[other_oak]  # text alone cannot tell them apart, so they tie
    assert len(assembly.space.embeddings) == 19


def test_similarity_swamped_by_a_constant_buffer(assembly):
    names = {name for client in assembly.federation().clients for name in client.model.adapter()}
    assert names == set(assembly.initial)
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names)
    source = torch.Generator().manual_seed(1)
    one = {name: torch.randn(tensor.shape, generator=source) for name, tensor in assembly.initial.items()}
    opposite = {name: -tensor for name, tensor in one.items()}
    assert similarity([one, opposite], assembly.initial)[0, 1] == pytest.approx(0)
    buffer = {"rotary.inv_freq": torch.full((1000,), 100.0)}
    start = assembly.initial | {"rotary.inv_freq": torch.zeros(1000)}
    assert similarity([one | buffer, opposite | buffer], start)[0, 1] > 0.99  # so a buffer would have hidden it


def test_metrics_of_one_client_reported_for_all(finished, tmp_path):
    whole = finished("evaluation.test_users=null", "evaluation.validation_users=2")
    shutil.copytree(whole.folder, tmp_path / "run")
    run = open_run(tmp_path / "run")
    run._assembled = whole.assembly()
    before = run.evaluation()
    users_of = dict(zip(run.assembly().data.partition.names, run.assembly().data.partition.users, strict=True))
    for client, row in run.metrics["clients"].items():
        own = [place for place, user in enumerate(before.users) if user in users_of[client]]
        assert row["users"] == len(own) == 8
        assert row["mrr"] == pytest.approx(np.mean([before.values["mrr"][place] for place in own]))
    folder = run.folder / "clients" / "1"
    source = torch.Generator().manual_seed(2)
    changed = {name: torch.randn(tensor.shape, generator=source) for name, tensor in load_adapter(folder).items()}
    save_adapter(changed, folder, run.config.adapter, "tiny")
    run.evaluate()
    after = run.evaluation()
    same = before.values["mrr"] == after.values["mrr"]
    assert before.users.tolist() == after.users.tolist()
    assert all(same[place] for place, client in enumerate(before.client_of) if client != "1")
    assert not all(same[place] for place, client in enumerate(before.client_of) if client == "1")


def test_samples_of_a_client_stay_its_own(assembly):
    """No client trains on, or is measured by, another's users."""
    for client in assembly.federation().clients:
        own = assembly.data.samples[client.name]
        users = set(assembly.data.partition.users[int(client.name)].tolist())
        assert {sample.user for sample in own} <= users
        assert client.encoded == assembly.backbone.encode(own, assembly.data.dataset.catalog, 10)
        assert all(isinstance(sample, Sample) for sample in own)


def test_validation_input_contains_its_labels(small_config):
    """RecFormer's validation reads a user's train items and nothing later: another label, the same input."""
    data = load_run_data(small_config("backbone.name=encoder", "data.holdout.kind=leave_one_out"))
    backbone = tiny_encoder(max_tokens=158)
    backbone.prepare(data.dataset.catalog, lambda texts: torch.empty(0))
    cases = [case for own in data.validation.values() for case in own]
    assert len(cases) > 3
    for case in cases:
        train = data.holdout.train[case.user].tolist()
        assert list(case.history) == train[-len(case.history) :]
        inputs = []
        for target in (*case.targets, (case.targets[0] + 1) % 20):
            encoded = backbone.encode([Sample(case.user, case.history, target)], data.dataset.catalog, 10)
            batch = backbone.collate(encoded)
            assert batch.labels.tolist() == [target]
            inputs.append(batch.input_ids)
        assert all(torch.equal(own, inputs[0]) for own in inputs)
        leaking = backbone.pad([(*case.history, *case.targets)])  # what the authors' validation reads
        assert leaking.input_ids.shape != inputs[0].shape or not torch.equal(leaking.input_ids, inputs[0])
