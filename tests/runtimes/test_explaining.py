"""One request, explained: the same lists as everywhere, and figures that plain loops find too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pplr.errors import PartitionError, RunError, UnknownItemError
from pplr.runtimes.explaining import Explainer
from pplr.runtimes.in_process import train
from pplr.runtimes.run import Run, open_run

ITEM_VECTORS = (
    "backbone.name=item_vectors",
    "backbone.item_vectors.width=8",
    "data.history_items=6",
    "evaluation.validation_metric=loss",
)


@pytest.fixture(scope="module")
def items(tmp_path_factory, small_config, model_folder) -> Run:
    """A run that reads items and has kept its rounds."""
    config = small_config(f"backbone.model={model_folder}", *ITEM_VECTORS, "run.keep_rounds=true")
    return train(config, tmp_path_factory.mktemp("items") / "run")


@pytest.fixture(scope="module", params=["causal_lm", "item_vectors"])
def run(request, finished, items) -> Run:
    if request.param == "item_vectors":
        return items
    return finished("run.keep_rounds=true", "evaluation.before=true")  # as other tests have it trained


def test_it_recommends_what_the_run_does_and_says_it_again(run: Run) -> None:
    explainer = Explainer(run)
    request = explainer.request(None, user="u4")
    answer = explainer.after(request, 5)
    assert list(answer.items) == run.recommend(user="u4", count=5)
    assert explainer.after(request, 5).items == answer.items
    typed = explainer.request("1", history=["Oak", "elm"])
    assert list(explainer.after(typed, 5).items) == run.recommend("1", history=["Oak", "Elm"], count=5)
    assert typed.taken == 2


def test_before_is_what_the_client_trained_alone_where_the_run_has_kept_it(run: Run) -> None:
    explainer = Explainer(run)
    request = explainer.request(None, user="u4")
    what, answer = explainer.before(request, 5)
    assert "not mixed" in what
    alone = load_file(run.folder / "rounds" / "1" / request.client / "local.safetensors")
    by_hand = explainer.parts.admit("by hand", dict(alone), "recommend")
    scores = explainer.parts.ranker(by_hand).scores([request.case])[0]
    assert answer.items[0].item_id == explainer.catalog.item_ids[_best(scores, request.case.seen)]


def _best(scores: np.ndarray, seen: tuple[int, ...]) -> int:
    order = sorted(range(len(scores)), key=lambda item: (-scores[item], item))
    return next(item for item in order if item not in seen)


def test_before_is_the_common_start_where_nothing_else_is_left(finished: Callable[..., Run]) -> None:
    explainer = Explainer(finished())
    what, answer = explainer.before(explainer.request(None, user="u4"), 5)
    assert "every client starts from" in what
    assert len(answer.items) == 5
    adapter = explainer._before("1")[1]
    assert adapter.keys() == explainer.parts.initial.keys()
    assert all(torch.equal(own, explainer.parts.initial[name]) for name, own in adapter.items())


def test_popular_items_are_counted_in_training(run: Run) -> None:
    explainer = Explainer(run)
    request = explainer.request(None, user="u4")
    taken = [0] * len(explainer.catalog)
    for own in explainer.parts.data.holdout.train:
        for item in own:
            taken[item] += 1
    found = explainer.popular(request, 4)
    assert [item.score for item in found] == sorted(
        (float(count) for item, count in enumerate(taken) if item not in request.case.seen), reverse=True
    )[:4]


def test_near_are_the_items_of_the_history_that_a_loop_finds(items: Run) -> None:
    explainer = Explainer(items)
    request = explainer.request(None, user="u4")
    answer = explainer.after(request, 3)
    reader = explainer.parts.admit("naive", explainer.saved(request.client), "recommend")
    vectors = explainer.parts.backbone.items(reader.output_end).detach()
    for found, near in zip(answer.items, answer.near, strict=True):
        own = vectors[explainer.catalog.item_ids.index(found.item_id)]
        alike = {item: float(torch.dot(own, vectors[item])) for item in request.case.history}
        best = sorted(alike, key=lambda item: -alike[item])[:2]
        assert [one.similarity for one in near] == pytest.approx([alike[item] for item in best], abs=1e-5)
        assert near[0].title == explainer.catalog.titles[best[0]]


def test_near_titles_are_of_the_base_models_embeddings_where_titles_are_written(finished) -> None:
    explainer = Explainer(finished())
    request = explainer.request("0", history=["Oak", "Elm", "Yew"])
    answer = explainer.after(request, 3)
    space = explainer.parts.space
    rows = space.embeddings[space.title_of] - space.embeddings[space.title_of].mean(dim=0)
    own = rows[explainer.catalog.item_ids.index(answer.items[0].item_id)]
    alike = [float(torch.cosine_similarity(own, rows[item], dim=0)) for item in request.case.history]
    assert answer.near[0][0].similarity == pytest.approx(max(alike), abs=1e-5)
    assert "base model" in explainer.nearness


def test_what_crossed_is_counted_as_the_transport_counts_it(run: Run) -> None:
    explainer = Explainer(run)
    request = explainer.request(None, user="u4")
    answer = explainer.after(request, 3)
    assert answer.exchanges
    width = explainer.parts.backbone.hidden_size
    for own in answer.exchanges:
        assert own.up.shape == own.down.shape
        assert own.up.shape[2] == width
        assert own.up.sent_bytes == own.down.sent_bytes == own.up.vectors * width * 4  # float32
        assert own.up.dtype == "float32"
        assert own.milliseconds > 0
    assert answer.states is not None
    first, *later = (own.up.vectors for own in answer.exchanges)
    if run.config.backbone.name == "item_vectors":
        assert len(answer.states) == first
    else:  # what every prompt begins with crosses on its own, then the rest of it
        assert first < len(answer.states) <= first + later[0]


def test_an_attacker_with_the_adapter_reads_the_history(run: Run) -> None:
    explainer = Explainer(run)
    request = explainer.request(None, user="u4")
    found = explainer.read_back(request, explainer.after(request, 3))
    assert not isinstance(found, str)
    catalog, reader = explainer.catalog, explainer._reader
    assert [true for true, _ in found.rows] == [catalog.titles[reader.first(i)] for i in request.case.history]
    named = {guessed for _, guessed in found.rows if guessed is not None} | set(found.wrong)
    truth = {true for true, _ in found.rows}
    assert found.share == pytest.approx(len(truth & named) / len(truth))
    assert found.share >= 0.9
    assert found.knowledge == "own"
    assert found.by_place == (run.config.backbone.name == "item_vectors")
    assert explainer.attacks_long != found.by_place
    taken = explainer.attackers.popularity.tolist()
    popular = sorted(range(len(taken)), key=lambda item: -taken[item])
    first = list(dict.fromkeys(catalog.titles[reader.first(item)] for item in popular))[: len(truth)]
    assert found.guess_share == pytest.approx(len(truth & set(first)) / len(truth))


def test_an_attacker_without_time_still_answers(items: Run) -> None:
    explainer = Explainer(items)
    request = explainer.request(None, user="u4")
    answer = explainer.after(request, 3)
    explainer._attacker = lambda client: replace(explainer._make_attacker(client), seconds=0.0)
    found = explainer.read_back(request, answer)
    assert not isinstance(found, str)
    assert all(guessed is not None for _, guessed in found.rows)


def test_states_of_somebody_else_do_not_give_the_history_away(items: Run) -> None:
    explainer = Explainer(items)
    request = explainer.request(None, user="u4")
    answer = explainer.after(request, 3)
    assert answer.states is not None
    noise = torch.randn(answer.states.shape, generator=torch.Generator().manual_seed(0))
    found = explainer.read_back(request, replace(answer, states=noise * answer.states.std()))
    assert not isinstance(found, str)
    assert found.share < 0.7


def test_where_nothing_crossed_nothing_is_claimed(finished: Callable[..., Run]) -> None:
    explainer = Explainer(finished("cut=null"))
    request = explainer.request(None, user="u4")
    answer = explainer.after(request, 3)
    assert answer.exchanges == ()
    assert "not cut" in str(explainer.read_back(request, answer))


def test_an_encoder_is_not_attacked_and_says_so(tmp_path: Path, small_config, encoder_folder) -> None:
    config = small_config(
        f"backbone.model={encoder_folder}", "backbone.name=encoder", "backbone.max_tokens=128",
        "adapter.target_modules=[query, value]", "evaluation.validation_metric=loss", "data.history_items=4",
        "federation.rounds=1",
    )  # fmt: skip
    explainer = Explainer(train(config, tmp_path / "run"))
    request = explainer.request(None, user="u4")
    answer = explainer.after(request, 3)
    assert len(answer.near) == 3
    assert "not measured" in str(explainer.read_back(request, answer))


def test_what_is_not_there_is_refused(items: Run, tmp_path: Path, small_config) -> None:
    explainer = Explainer(items)
    with pytest.raises(UnknownItemError, match="no user 'u99'"):
        explainer.request("0", user="u99")
    with pytest.raises(PartitionError, match="not of client"):
        explainer.request("0", user="u4")
    with pytest.raises(UnknownItemError, match="<img"):
        explainer.request("0", history=["<img src=x onerror=alert(1)>"])
    (tmp_path / "config.yaml").write_text(small_config().to_yaml())
    with pytest.raises(RunError, match="not finished"):
        Explainer(open_run(tmp_path))
