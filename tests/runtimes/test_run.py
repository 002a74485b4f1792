"""What can be asked of a run folder."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from pplr.backbones.adapters import load_adapter, save_adapter
from pplr.data.prompts import Case
from pplr.errors import AdapterError, ConfigError, DataError, PartitionError, RunError, UnknownItemError
from pplr.runtimes import readers
from pplr.runtimes.run import Recommendation, open_run


@pytest.fixture(scope="module")
def run(finished):
    return finished("run.keep_rounds=true", "evaluation.before=true")


def test_a_user_is_recommended_what_is_new_to_them(run):
    dataset = run.assembly().data.dataset
    found = run.recommend(user="u4", count=50)
    seen = {dataset.catalog.item_ids[item] for item in dataset.histories[dataset.user("u4")]}
    assert [item.rank for item in found] == list(range(1, 21 - len(seen)))  # everything else, best first
    assert not seen & {item.item_id for item in found}
    assert len({item.item_id for item in found}) == len(found)
    assert [item.score for item in found] == sorted((item.score for item in found), reverse=True)
    assert all(dataset.catalog.titles[dataset.catalog.item_ids.index(item.item_id)] == item.title for item in found)
    assert run.recommend(user="u4", count=3) == found[:3]
    assert isinstance(found[0], Recommendation)


def test_lists_of_every_user_are_those_of_each_alone(run):
    data = run.assembly().data
    lists = run.recommend_all(count=4)
    assert [own.user for own in run.recommend_all("1", count=4)] == [own.user for own in lists if own.client == "1"]
    assert sorted(own.user for own in lists) == sorted(data.dataset.user_ids)
    for own in lists:
        assert own.client == data.client_of(data.dataset.user(own.user))
        alone = run.recommend(user=own.user, count=4)
        assert [item.item_id for item in own.items] == [item.item_id for item in alone]
        assert [item.score for item in own.items] == pytest.approx([item.score for item in alone], rel=1e-4)


def test_every_user_cannot_be_asked_of_a_client_that_is_not_there(run):
    with pytest.raises(PartitionError, match="no client '9'"):
        run.recommend_all("9")
    with pytest.raises(ConfigError, match="0 items"):
        run.recommend_all(count=0)


def test_a_user_is_served_by_the_own_client(run):
    assembly = run.assembly()
    own = assembly.data.client_of(assembly.data.dataset.user("u4"))
    assert own == "1"  # u4 lives in the south, the second region
    assert run.recommend("1", user="u4") == run.recommend(user="u4")


def test_clients_recommend_by_their_own_adapters(run, tmp_path):
    shutil.copytree(run.folder, tmp_path / "run")
    told_apart = open_run(tmp_path / "run")
    told_apart._assembled = run.assembly()
    for client in "12":  # adapters so far apart that what they write differs
        state = load_adapter(run.folder / "clients" / client)
        source = torch.Generator().manual_seed(int(client))
        state = {name: torch.randn(tensor.shape, generator=source) for name, tensor in state.items()}
        save_adapter(state, told_apart.folder / "clients" / client, run.config.adapter, "tiny")
    history = ["Oak", "Elm", "Fir"]
    lists = {client: told_apart.recommend(client, history=history, count=20) for client in "012"}
    assert len({tuple(item.score for item in found) for found in lists.values()}) == 3
    assert lists["0"] == run.recommend("0", history=history, count=20)  # asking others in between changes nothing


def test_a_client_is_admitted_once_for_many_requests(run, tmp_path, monkeypatch):
    shutil.copytree(run.folder, tmp_path / "run")
    asked, parts, admitted = open_run(tmp_path / "run"), run.assembly(), list[str]()
    asked._assembled = parts
    parts.dismiss_all()
    admit = parts.admit
    monkeypatch.setattr(parts, "admit", lambda client, *others: admitted.append(client) or admit(client, *others))
    first = asked.recommend("0", history=["Oak", "Elm"], count=20)
    assert asked.recommend("0", history=["Oak", "Elm"], count=20) == first
    assert admitted == ["0"]

    other = {name: 3 * tensor for name, tensor in load_adapter(asked.folder / "clients" / "0").items()}
    save_adapter(other, asked.folder / "clients" / "0", run.config.adapter, "tiny")
    second = asked.recommend("0", history=["Oak", "Elm"], count=20)
    assert [item.score for item in second] != [item.score for item in first]  # never the adapter of before
    assert admitted == ["0", "0"]

    def fail(*_):
        raise RuntimeError("no ranker")

    with monkeypatch.context() as patch:
        patch.setattr(parts, "ranker", fail)
        with pytest.raises(RuntimeError, match="no ranker"):
            asked.recommend("0", history=["Oak"])
    assert asked.recommend("0", history=["Oak", "Elm"], count=20) == second
    assert admitted == ["0", "0", "0"]  # what failed was let go of
    parts.dismiss_all()
    assert asked.recommend("0", history=["Oak", "Elm"], count=20) == second
    assert admitted == ["0"] * 4
    assert run.recommend("0", history=["Oak", "Elm"], count=20) == first


def test_models_of_few_clients_are_kept(run, monkeypatch):
    monkeypatch.setattr(readers, "_MOST", 2)
    run.assembly().dismiss_all()
    for client in "0120":
        run.recommend(client, history=["Oak"])
    assert list(run.assembly().readers._kept) == ["2", "0"]


def test_scores_are_those_of_the_ranker(run):
    assembly = run.assembly()
    catalog = assembly.data.dataset.catalog
    items = [catalog.find(title)[0] for title in ("Elm", "Fir")]
    found = run.recommend("0", history=["Elm", "Fir"], count=20)
    reader = assembly.model.client("by hand", load_adapter(run.folder / "clients" / "0"))
    try:
        scores = assembly.ranker(reader).scores([Case(-1, tuple(items), (), tuple(items))])[0].astype(np.float64)
    finally:
        assembly.model.dismiss("by hand")
    for item in found:
        assert item.score == scores[catalog.item_ids.index(item.item_id)]


def test_titles_are_found_as_a_person_types_them(run):
    assert run.recommend("0", history=[" oAK ", "elm"]) == run.recommend("0", history=["Oak", "Elm"])


def test_every_item_of_a_typed_title_counts_as_seen(run):
    found = run.recommend("0", history=["Oak"], count=20)
    assert len(found) == 18
    assert not any(item.title == "Oak" for item in found)


@pytest.mark.parametrize(
    ("question", "error", "message"),
    [
        ({"client": "0", "history": ["Elmm"]}, UnknownItemError, r"called 'Elmm'. Did you mean 'Elm'\?"),
        ({"user": "u99"}, UnknownItemError, r"no user 'u99'.*Did you mean 'u9'\?"),
        ({"client": "0", "user": "u4"}, PartitionError, r"of client 1, not of client 0. Use --client 1"),
        ({"client": "7", "history": ["Elm"]}, PartitionError, r"no client '7'. Known: '0', '1', '2'."),
        ({"client": "0"}, ConfigError, r"either a user or a history"),
        ({"user": "u4", "history": ["Elm"]}, ConfigError, r"either a user or a history"),
        ({"history": ["Elm"]}, ConfigError, r"no client is named.*one of: 0, 1, 2"),
        ({"client": "0", "history": []}, DataError, r"history is empty"),
        ({"user": "u4", "count": 0}, ConfigError, r"0 items"),
    ],
)
def test_questions_without_an_answer_say_what_is_wrong(run, question, error, message):
    with pytest.raises(error, match=message):
        run.recommend(**question)


def test_history_titles_are_the_whole_history(run):
    assert run.history_titles("u0") == ["Ash", "Alder", "Aspen", "Beech", "Birch"]


def test_an_unfinished_run_says_so(run, tmp_path):
    shutil.copy(run.folder / "config.yaml", tmp_path)
    begun = open_run(tmp_path)
    assert begun.metrics is None
    assert begun.rounds == []
    for ask in (lambda: begun.recommend(user="u4"), begun.evaluation, lambda: begun.provenance):
        with pytest.raises(RunError, match=r"--resume"):
            ask()


def test_a_damaged_adapter_is_not_used(run, tmp_path):
    shutil.copytree(run.folder, tmp_path / "run")
    damaged = open_run(tmp_path / "run")
    damaged._assembled = run.assembly()
    path = damaged.folder / "clients" / "1" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(AdapterError, match=r"damaged.*--resume"):
        damaged.recommend(user="u4")
    path.unlink()
    with pytest.raises(AdapterError, match="no adapter at"):
        damaged.recommend(user="u4")


@pytest.mark.parametrize("name", ["metrics.json", "rounds.jsonl"])
def test_a_damaged_file_is_told(run, tmp_path, name):
    shutil.copy(run.folder / "config.yaml", tmp_path)
    (tmp_path / name).write_text('{"half": ')
    damaged = open_run(tmp_path)
    with pytest.raises(RunError, match=rf"{name} is damaged.*--resume"):
        _ = damaged.metrics if name == "metrics.json" else damaged.rounds


def test_what_is_no_run_folder_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"is not a run folder: it has no config.yaml"):
        open_run(tmp_path / "nowhere")
    (tmp_path / "config.yaml").write_text("federation: {methods: pplr}\n")
    with pytest.raises(RunError, match=r"cannot be read .*unknown key 'federation.methods'"):
        open_run(tmp_path)
