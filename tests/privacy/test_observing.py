"""What a pass holds, and what is kept of what crosses."""

from __future__ import annotations

import torch

from pplr.config import AdapterConfig, TrainingConfig
from pplr.data.prompts import Sample
from pplr.errors import ConfigError
from pplr.privacy.audits import Guess
from pplr.privacy.observing import Spy, observe, secret_of
from pplr.privacy.replica import Replica
from pplr.privacy.scoring import Reader, score
from pplr.stages.cut import CutPlan
from pplr.stages.model import CutModel
from pplr.testing import random_adapter, refuses, tiny_backbone, tiny_catalog, tiny_encoder


def test_only_letters_of_titles_are_private() -> None:
    backbone, catalog = tiny_backbone(), tiny_catalog()
    secret = secret_of(backbone, Sample(7, (3, 6), 5), "a", catalog, 10)
    told = backbone.tokenizer.decode([t for t, own in zip(secret.tokens, secret.is_private, strict=True) if own])
    assert told == "Copper BeechOakOak"
    (encoded,) = backbone.encode([Sample(7, (3, 6), 5)], catalog, 10)
    assert secret.tokens == (*encoded.prompt, *encoded.answer)
    assert secret.history == (3, 5)  # two items are called Oak, and the text does not say which
    assert (secret.target, secret.user, secret.client) == (5, 7, "a")


def test_titles_that_did_not_fit_are_no_secret_of_the_pass() -> None:
    backbone = tiny_backbone()
    whole = len(backbone.prompt_tokens(["Oak", "Elm"], 0))
    backbone.max_tokens = whole + backbone.answer_room(tiny_catalog()) - 1
    secret = secret_of(backbone, Sample(0, (5, 4), 1), "a", tiny_catalog(), 10)
    assert secret.history == (4,)


def test_of_a_list_all_but_the_ends_of_lines_is_private() -> None:
    backbone, catalog = tiny_backbone(targets="all"), tiny_catalog()
    sample = Sample(7, (0, 3, 6), 5, every=True)
    secret = secret_of(backbone, sample, "a", catalog, 2)  # the first item is not shown
    told = backbone.tokenizer.decode([t for t, own in zip(secret.tokens, secret.is_private, strict=True) if own])
    assert told == "Copper BeechOakOak"
    (encoded,) = backbone.encode([sample], catalog, 2)
    assert secret.tokens == (*encoded.prompt, *encoded.answer)
    assert (secret.history, secret.target) == ((3, 5), 5)
    reader = Reader(backbone, catalog)
    assert set(score(Guess(secret.tokens), secret, reader).values()) == {1.0}
    backbone.max_tokens = len(backbone.prompt_tokens(["Oak"], 0)) + backbone.answer_room(catalog)
    assert secret_of(backbone, sample, "a", catalog, 10).history == (5,)


def test_the_server_sees_what_the_client_sends_and_gets_back() -> None:
    backbone, plan, config = tiny_backbone(), CutPlan(1, 1, 4), AdapterConfig(rank=2)
    model = CutModel(backbone, plan, config, TrainingConfig())
    adapter = random_adapter(model.shapes)
    batch = backbone.collate(backbone.encode([Sample(0, (1, 2), 3)], tiny_catalog(), 10))
    seen = observe(model, adapter, batch, lambda states: states)
    replica = Replica(backbone, plan, config, adapter)
    torch.testing.assert_close(seen.states, replica.states(batch.input_ids)[0])
    entering = seen.returned[None].requires_grad_(True)
    backbone.loss(replica.leave(entering), batch).backward()
    assert seen.gradient is not None
    torch.testing.assert_close(seen.gradient, entering.grad[0])
    doubled = observe(model, adapter, batch, lambda states: 2 * states)
    torch.testing.assert_close(doubled.states, 2 * seen.states)
    halved = observe(model, adapter, batch, lambda states: states, back=lambda gradient: gradient / 2)
    assert halved.gradient is not None
    torch.testing.assert_close(halved.gradient, seen.gradient / 2)


def test_of_words_that_a_batch_shares_the_server_sees_the_sum_of_the_gradients() -> None:
    backbone = tiny_backbone()
    model = CutModel(backbone, CutPlan(1, 2, 4), AdapterConfig(rank=2), TrainingConfig())
    adapter = random_adapter(model.shapes)
    samples = backbone.encode([Sample(0, (1, 2), 3), Sample(1, (4,), 2), Sample(2, (5, 1), 0)], tiny_catalog(), 10)
    row = backbone.collate_row(samples)
    client = model.client("row", adapter)
    client.transport = spy = Spy(client.transport)
    client.train_loss(row, None).backward()
    count = row.row.prefix + row.row.lengths[0]
    seen = observe(model, adapter, backbone.collate(samples), lambda states: states, shared=row.row.prefix)
    assert seen.length == count + 1  # the last token of a sample does not cross in a row
    torch.testing.assert_close(seen.gradient[:count], spy.gradient[0, :count], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(seen.states[:count], spy.states[0, :count], rtol=1e-4, atol=1e-6)
    alone = observe(model, adapter, backbone.collate(samples[:1]), lambda states: states)
    own, prefix = alone.gradient, row.row.prefix
    torch.testing.assert_close(seen.gradient[prefix:count], own[prefix:count], rtol=1e-4, atol=1e-6)
    assert float((seen.gradient[:prefix] - own[:prefix]).norm()) > 0.1 * float(own[:prefix].norm())


def test_what_is_not_cut_or_not_read_is_refused() -> None:
    backbone = tiny_backbone()
    model = CutModel(backbone, CutPlan.make(None, 4), AdapterConfig(rank=2), TrainingConfig())
    batch = backbone.collate(backbone.encode([Sample(0, (1, 2), 3)], tiny_catalog(), 10))
    with refuses(ConfigError, "not cut"):
        observe(model, random_adapter(model.shapes), batch, lambda states: states)
    with refuses(ConfigError, "encoder"):
        secret_of(tiny_encoder(), Sample(0, (1, 2), 3), "a", tiny_catalog(), 10)


def test_walking_is_the_same_as_running_every_candidate_from_the_start() -> None:
    backbone, plan, config = tiny_backbone(), CutPlan(2, 0, 4), AdapterConfig(rank=2)
    adapter = random_adapter(CutModel(backbone, plan, config, TrainingConfig()).shapes)
    replica = Replica(backbone, plan, config, adapter)
    seen = torch.randn(5, backbone.hidden_size, generator=torch.Generator().manual_seed(1))
    candidates, known = torch.arange(40), [3, None, None, 9, None]
    found: list[int] = []
    for position, (order, distances) in enumerate(replica.walk(seen, known, lambda at, before: candidates)):
        if known[position] is None:
            rows = torch.cat([torch.tensor([found]).expand(40, -1), candidates[:, None]], dim=1)
            naive = (replica.states(rows)[:, -1] - seen[position]).norm(dim=-1)
            torch.testing.assert_close(distances, naive.sort().values)
            assert order[0] == naive.argmin()
        found.append(int(order[0]))
