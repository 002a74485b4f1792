"""A decoder that reads item vectors: cut as it is whole, and each part against a slow and plain truth."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pplr.backbones.base import Batch
from pplr.backbones.item_vectors import ItemVectors, item_texts, whiten
from pplr.backbones.losses import draw_negatives
from pplr.config import AdapterConfig, ItemVectorsConfig, TrainingConfig
from pplr.data.holdout import Holdout
from pplr.data.interactions import Catalog
from pplr.data.prompts import Case, Sample, training_histories
from pplr.errors import BackboneError, ConfigError
from pplr.recommend.matching import MatchingRanker
from pplr.stages.cut import CutPlan
from pplr.stages.model import CutModel
from pplr.testing import BackboneContract, every_cut, random_adapter, refuses, tiny_backbone, tiny_catalog, tiny_samples

CONFIG = ItemVectorsConfig(width=8, hidden_width=16)


def read(texts) -> torch.Tensor:
    """Stand in for the base model: a vector that follows from the text."""
    rows = [torch.randn(32, generator=torch.Generator().manual_seed(sum(text.encode()))) for text in texts]
    return torch.stack(rows)


def make(family: str = "llama", config: ItemVectorsConfig = CONFIG, dtype: torch.dtype = torch.float32) -> ItemVectors:
    backbone = ItemVectors(tiny_backbone(family, dtype=dtype), config)
    backbone.prepare(tiny_catalog(), read)
    return backbone


def histories() -> list[Sample]:
    return [Sample(sample.user, sample.history, sample.target, every=True) for sample in tiny_samples()]


class TestItemVectorsOnLlama(BackboneContract):
    def make(self) -> ItemVectors:
        return make("llama")

    def encoded(self, backbone):
        return backbone.encode(histories(), tiny_catalog(), history_items=3)


class TestItemVectorsOnQwen3(TestItemVectorsOnLlama):
    def make(self) -> ItemVectors:
        return make("qwen3")


class TestItemVectorsWithLinearProjections(TestItemVectorsOnLlama):
    def make(self) -> ItemVectors:
        return make("llama", ItemVectorsConfig(width=8, hidden_width=None))


class TestItemVectorsWithResidualsAndNegatives(TestItemVectorsOnLlama):
    def make(self) -> ItemVectors:
        return make("llama", ItemVectorsConfig(width=8, hidden_width=4, residuals="mixed", negatives=3, dropout=0.3))

    def test_padding_changes_nothing(self) -> None:
        """Negatives are drawn for each batch while it trains; without gradients the whole catalog is compared."""
        with torch.no_grad():
            super().test_padding_changes_nothing()


def client(backbone: ItemVectors, seed: int = 0):
    cut = CutModel(backbone, CutPlan(1, 1, 4), AdapterConfig(rank=2, dropout=0.0), TrainingConfig())
    return cut.client("one", random_adapter(cut.shapes, seed))


@pytest.mark.parametrize("hidden", [None, 16])
def test_the_loss_is_that_of_plain_loops(hidden: int | None) -> None:
    backbone = make(config=ItemVectorsConfig(width=8, hidden_width=hidden))
    model = client(backbone)
    samples = backbone.encode(histories(), tiny_catalog(), 3)
    batch = backbone.collate(samples)
    ends = {name: tensor.double().detach() for name, tensor in model.adapter().items() if "item_out" in name}
    assert len(ends) == (2 if hidden is None else 4)
    states = backbone.text.final_states(model.hidden_states(batch)).double()
    total = 0.0
    for row, sample in enumerate(samples):
        for place in range(1, len(sample.items)):
            query = ends["item_out.state.weight"] @ states[row, place - 1]
            scores = []
            for item in range(len(tiny_catalog())):
                vector = backbone.vectors[item].double()
                placed = ends["item_out.item.weight"] @ vector
                if hidden is not None:
                    inner = ends["item_out.item.hidden.weight"] @ vector
                    inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
                    placed = placed + ends["item_out.item.back.weight"] @ inner
                scores.append(float(query @ placed / query.norm() / placed.norm()) / backbone.config.temperature)
            total += math.log(sum(math.exp(score) for score in scores)) - scores[sample.items[place]]
    assert float(model.evaluation_loss(batch)) == pytest.approx(total, rel=1e-5)


def test_what_enters_the_first_block_is_a_projection_and_a_hidden_layer_beside_it() -> None:
    for hidden in (None, 16):
        backbone = make(config=ItemVectorsConfig(width=8, hidden_width=hidden))
        model = client(backbone)
        ends = {name: tensor.double() for name, tensor in model.adapter().items() if "item_in" in name}
        vector = backbone.vectors[3].double()
        expected = ends["item_in.weight"] @ vector
        if hidden is not None:
            inner = ends["item_in.hidden.weight"] @ vector
            expected = expected + ends["item_in.back.weight"] @ (inner * (1 + torch.erf(inner / math.sqrt(2))) / 2)
        found = backbone.embed(torch.tensor([[3]]), {name: own.float() for name, own in ends.items()})
        torch.testing.assert_close(found[0, 0].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("narrow", [True, False], ids=["bfloat16", "widened"])
def test_projections_of_items_are_computed_as_the_blocks_are(monkeypatch: pytest.MonkeyPatch, narrow: bool) -> None:
    """In bfloat16 where the processor multiplies it, with float32 weights, gradients and results."""
    monkeypatch.setattr("pplr.backbones.arithmetic.multiplies_bfloat16", lambda: narrow)
    wide, backbone = make(), ItemVectors(tiny_backbone(dtype=torch.bfloat16), CONFIG)
    backbone.prepare(tiny_catalog(), read)
    weights = {name: own.requires_grad_() for name, own in client(wide).adapter().items() if "item_out" in name}
    placed, exact = backbone.items(weights), wide.items(weights)
    assert placed.dtype == torch.float32
    error = float((placed - exact).detach().norm() / exact.detach().norm())
    assert (1e-4 < error < 1e-2) if narrow else error < 1e-6
    probe = torch.randn(placed.shape, generator=torch.Generator().manual_seed(0))
    found = torch.autograd.grad((placed * probe).sum(), weights["item_out.item.hidden.weight"])[0]
    truth = torch.autograd.grad((exact * probe).sum(), weights["item_out.item.hidden.weight"])[0]
    assert found.dtype == torch.float32
    assert float((found - truth).norm() / truth.norm()) < 3e-2


def test_a_hidden_layer_adds_nothing_at_the_start() -> None:
    shapes = make().end_shapes("input") | make().end_shapes("output")
    backs = [name for name in shapes if ".back." in name]
    assert len(backs) == 2
    assert not any(make().initial_end(name, shapes[name], torch.Generator()).any() for name in backs)


def test_items_that_are_left_out_have_no_part_in_training() -> None:
    backbone = make()
    model = client(backbone)
    batch = backbone.collate(backbone.encode([Sample(0, (1, 2), 3, every=True)], tiny_catalog(), 3))
    ends, states = model.output_end, model.hidden_states(batch)
    whole = backbone.loss(states, batch, ends)
    backbone.leave_out([0, 5])
    with torch.no_grad():
        assert torch.equal(backbone.loss(states, batch, ends), whole)  # what is measured stays the full catalog
    found = backbone.loss(states, batch, ends)
    queries = backbone.queries(states[0, :2], ends)
    kept = [item for item in range(len(tiny_catalog())) if item not in (0, 5)]
    scores = queries @ backbone.items(ends)[kept].t() / backbone.config.temperature
    expected = -sum(scores.log_softmax(-1)[place, kept.index(item)] for place, item in enumerate((2, 3)))
    torch.testing.assert_close(found, expected)
    backbone.leave_out([])
    assert torch.equal(backbone.loss(states, batch, ends), whole)


def test_a_position_sees_nothing_of_what_comes_after() -> None:
    backbone = make()
    model = client(backbone)
    one, other = backbone.pad([(1, 2, 3, 4)]), backbone.pad([(1, 2, 7, 0)])
    a, b = model.hidden_states(one), model.hidden_states(other)
    assert torch.equal(a[:, :2], b[:, :2])
    assert not torch.equal(a[:, 2:], b[:, 2:])


def test_only_the_last_item_of_a_validation_sample_is_a_target() -> None:
    backbone = make()
    batch = backbone.collate(backbone.encode(tiny_samples(), tiny_catalog(), 3))
    assert batch.targets == batch.samples
    assert [row.nonzero().flatten().tolist() for row in batch.is_target] == [[n - 1] for n in batch.lengths.tolist()]


def test_negatives_are_the_targets_and_as_many_others_as_asked_and_follow_from_the_batch() -> None:
    backbone = make(config=ItemVectorsConfig(width=8, negatives=3))
    batch = backbone.collate(backbone.encode(histories()[:1], tiny_catalog(), 3))
    labels, content = batch.labels, torch.cat([batch.input_ids.flatten(), batch.labels])
    chosen = draw_negatives(content, labels, 3, len(tiny_catalog()))
    assert chosen is not None
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert set(labels.tolist()) <= set(chosen.tolist())
    assert 3 <= len(chosen) <= 3 + len(labels)
    assert torch.equal(chosen, draw_negatives(content, labels, 3, len(tiny_catalog())))
    model = client(backbone)
    trained = float(model.train_loss(batch, 0).detach())
    states = model.hidden_states(batch)
    scores = backbone.queries(states[batch.is_target], model.output_end) @ backbone.items(model.output_end, chosen).t()
    places = [chosen.tolist().index(label) for label in labels.tolist()]
    logs = (scores / backbone.config.temperature).log_softmax(-1)
    told = -sum(float(logs[row, place].detach()) for row, place in enumerate(places))
    assert trained == pytest.approx(told, rel=1e-4)


def with_the_last_item(backbone: ItemVectors, samples) -> Batch:
    """Let every item enter, the last too, though nothing follows it."""
    batch, own = backbone.collate(samples), backbone.pad([sample.items for sample in samples])
    is_target = torch.nn.functional.pad(batch.is_target, (0, 1))
    return replace(own, is_target=is_target, labels=batch.labels)


@pytest.mark.parametrize("plan", every_cut(4)[:-1], ids=str)
def test_a_last_item_that_precedes_nothing_stays_out_and_nothing_else_changes(plan: CutPlan) -> None:
    backbone, found = make(dtype=torch.float64), []  # so that rounding does not stand between the two
    samples = backbone.encode([*histories(), Sample(9, (4,), 1, every=True)], tiny_catalog(), 3)
    batches = backbone.collate(samples), with_the_last_item(backbone, samples)
    assert batches[0].lengths.tolist() == [len(own.items) - 1 for own in samples]
    assert batches[1].lengths.tolist() == [len(own.items) for own in samples]
    for batch in batches:
        cut = CutModel(backbone, plan, AdapterConfig(rank=2, dropout=0.0), TrainingConfig())
        model = cut.client("one", random_adapter(cut.shapes))
        model.begin_round(2)
        loss = model.train_loss(batch, 1)
        loss.backward()
        members = [*model._members, cut.host._of("one").member]
        gradients = {name: own.grad for member in members for name, own in member.parameters.items()}
        found.append((float(loss.detach()), gradients, model.traffic))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert found[0][1].keys() == found[1][1].keys()
    for name, wanted in found[1][1].items():
        assert wanted is not None, name
        assert float((found[0][1][name] - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max()), name
    saved = len(samples) * 32 * 8
    assert (found[1][2].bytes_up - found[0][2].bytes_up, found[1][2].bytes_down - found[0][2].bytes_down) == (
        2 * saved,
        2 * saved,
    )


def test_every_item_enters_where_what_follows_is_asked_for() -> None:
    backbone = make()
    model = client(backbone)
    MatchingRanker(model, history_items=3).scores([Case(0, (0, 1, 2, 3), (4,), (0,)), Case(1, (5,), (4,), (5,))])
    assert model.traffic.bytes_up == (3 + 1) * 32 * 4
    batch = backbone.pad([(1, 2), (3,)])
    assert (batch.lengths.tolist(), batch.targets, batch.labels.tolist()) == ([2, 1], 0, [])


@given(st.integers(3, 40), st.integers(2, 6), st.integers(0, 99))
def test_whitening_makes_dimensions_alike(items: int, width: int, seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    vectors = torch.randn(items, width, generator=source) @ torch.randn(width, width, generator=source) + 3
    assert torch.equal(whiten(vectors, "none"), vectors)
    standard = whiten(vectors, "standardise")
    np.testing.assert_allclose(standard.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(standard.std(0), 1, atol=1e-3)
    white = whiten(vectors, "zca")
    spread = torch.linalg.eigvalsh(torch.cov(white.double().t()))
    assert float(spread.max()) < 1 + 1e-5
    if items > width:
        before = torch.linalg.eigvalsh(torch.cov(vectors.double().t()))
        large = before > 0.1 * before.mean()
        assert float(spread.sort().values[-int(large.sum()) :].min()) > 0.98


def test_texts_are_titles_and_then_what_is_asked_for() -> None:
    catalog = Catalog(("a", "b"), ("Ash", 'The "Elm"'), {"genre": ("tree|tall", "")})
    assert item_texts(catalog, ()) == ["Ash", "The 'Elm'"]
    assert item_texts(catalog, ("genre",)) == ["Ash. tree, tall", "The 'Elm'"]
    with refuses(ConfigError, "Did you mean 'genre'?"):
        item_texts(catalog, ("genres",))


def test_without_a_catalog_nothing_is_read() -> None:
    with refuses(BackboneError, "no catalog"):
        _ = ItemVectors(tiny_backbone()).vectors


def test_what_is_private_follows_from_the_residuals() -> None:
    assert make(config=ItemVectorsConfig(width=8)).private == frozenset()
    assert make(config=ItemVectorsConfig(width=8, residuals="mixed")).private == frozenset()
    private = make(config=ItemVectorsConfig(width=8, residuals="client"))
    shapes = private.end_shapes("input") | private.end_shapes("output")
    assert private.private == {name for name in shapes if "residual" in name}
    start = private.initial_end("item_in.residual", (8, 32), torch.Generator())
    assert not start.any()


def test_a_new_item_is_ranked_from_its_text_alone_and_changes_nothing_for_the_others() -> None:
    grown = tiny_catalog()
    grown = Catalog((*grown.item_ids, "t8"), (*grown.titles, "Larch"))
    scores = []
    for catalog in (tiny_catalog(), grown):
        backbone = ItemVectors(tiny_backbone(), ItemVectorsConfig(width=8, hidden_width=16, whitening="none"))
        backbone.prepare(catalog, read)
        ranker = MatchingRanker(client(backbone), history_items=3)
        scores.append(ranker.scores([Case(0, (0, 1, 2, 3), (4,), (0,)), Case(1, (5,), (4,), (5,))]))
    assert scores[1].shape == (2, 9)
    np.testing.assert_allclose(scores[1][:, :8], scores[0], rtol=1e-5)
    assert np.isfinite(scores[1]).all()


def test_ranking_is_the_cosine_with_the_last_state_of_the_newest_items() -> None:
    backbone = make()
    model = client(backbone)
    ranker = MatchingRanker(model, history_items=2)
    told = ranker.scores([Case(0, (0, 1, 2), (4,), (0,)), Case(1, (5,), (4,), (5,))])
    for row, history in enumerate([(1, 2), (5,)]):
        state = model.hidden_states(backbone.pad([history]))[0, len(history) - 1]
        query, items = backbone.queries(state, model.output_end), backbone.items(model.output_end)
        np.testing.assert_allclose(told[row], (items @ query).detach().numpy(), rtol=1e-4, atol=1e-6)


@given(st.lists(st.integers(0, 17), min_size=1, max_size=5), st.integers(1, 6))
def test_windows_make_every_item_but_the_first_a_target_once(lengths: list[int], size: int) -> None:
    train = tuple(np.arange(100 * user, 100 * user + length) for user, length in enumerate(lengths))
    empty = tuple(np.arange(0) for _ in lengths)
    samples = training_histories(Holdout(train, empty, empty, "test"), range(len(lengths)), size)
    for user, items in enumerate(train):
        own = [sample for sample in samples if sample.user == user]
        targets = [item for sample in own for item in (*sample.history[1:], sample.target)]
        assert targets == items.tolist()[1:]
        assert all(1 <= len(sample.history) <= size and sample.every for sample in own)
