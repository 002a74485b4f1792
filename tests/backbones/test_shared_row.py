"""A row of sequences that share their beginning is those sequences, there and back."""

from __future__ import annotations

import pytest
import torch

from pplr.backbones.base import Backbone
from pplr.backbones.causal_lm import EncodedSample
from pplr.backbones.shared_row import Places, SharedRow, joined, spread
from pplr.data.prompts import Sample
from pplr.errors import BackboneError
from pplr.testing import refuses, tiny_backbone, tiny_catalog

ROWS = [SharedRow(3, (2, 4, 1)), SharedRow(0, (2, 4, 1)), SharedRow(5, (1,)), SharedRow(1, (2, 2)), SharedRow(0, (3,))]


def draw(*shape: int) -> torch.Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)
    return made.requires_grad_(True)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_sequences_come_from_the_row_and_go_back_with_their_gradients(row: SharedRow) -> None:
    states, places = draw(1, 2, row.tokens, 3), Places(row, "cpu")
    apart = spread(states, places)
    assert apart.shape == (len(row.lengths), 2, row.longest, 3)
    assert row.padded == len(row.lengths) * row.longest
    weight = torch.randn(apart.shape, dtype=torch.float64)
    expected, start = torch.zeros_like(states), row.prefix
    for number, length in enumerate(row.lengths):
        chosen = [*range(row.prefix), *range(start, start + length)]
        start += length
        assert torch.equal(apart[number, :, : len(chosen)], states[0, :, chosen])
        expected[0, :, chosen] += weight[number, :, : len(chosen)]
    (found,) = torch.autograd.grad(apart, states, weight)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)

    left = draw(len(row.lengths), row.longest, 2, 3)
    back = joined(left, places)
    plain = [left[0, : row.prefix], *(left[i, row.prefix :][:length] for i, length in enumerate(row.lengths))]
    assert torch.equal(back[0], torch.cat(plain))
    weight = torch.randn(back.shape, dtype=torch.float64)
    found, expected = (torch.autograd.grad(own, left, weight)[0] for own in (back, torch.cat(plain)[None]))
    assert torch.equal(found, expected)


def test_positions_count_on_after_what_is_shared() -> None:
    assert SharedRow(2, (1, 3)).positions().tolist() == [[0, 1, 2, 2, 3, 4]]
    assert SharedRow(0, (2, 1)).positions().tolist() == [[0, 1, 0]]


def test_samples_in_a_row() -> None:
    backbone = tiny_backbone()
    samples = [
        EncodedSample((1, 2, 3, 4), (10, 11)),
        EncodedSample((1, 2, 5), (12,)),
        EncodedSample((1, 2, 3), (13, 14, 15)),
    ]
    batch = backbone.collate_row(samples)
    assert batch.row == SharedRow(2, (3, 1, 3))
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 10, 5, 3, 13, 14]]  # the last of each stands before nothing
    assert batch.is_target.tolist() == [[False] * 3 + [True] * 2 + [True] + [True] * 3]
    assert batch.labels.tolist() == [10, 11, 12, 13, 14, 15]
    assert (batch.samples, batch.targets, batch.tokens, batch.lengths.tolist()) == (3, 6, 9, [9])
    apart = backbone.collate(samples)
    assert (apart.samples, apart.targets, apart.tokens) == (3, 6, 16)
    alone = backbone.collate_row(samples[:1])
    assert alone.row == SharedRow(3, (2,))
    strangers = backbone.collate_row([EncodedSample((1, 2), (3,)), EncodedSample((4,), (5,))])
    assert strangers.row == SharedRow(0, (2, 1))


@pytest.mark.parametrize("targets", ["one", "all"])
def test_what_is_shared_tells_of_no_history(targets: str) -> None:
    backbone = tiny_backbone(targets=targets)
    alike = [Sample(user, (3, 0, user), 4) for user in (0, 1)]  # two histories that begin with the same two titles
    for samples in (alike, alike[:1], [*alike, Sample(2, (5,), 1)]):
        batch = backbone.collate_row(backbone.encode(samples, tiny_catalog(), 3))
        quote = "" if targets == "all" else '"'
        assert batch.row.prefix == len(backbone.template.before + quote)  # a byte is a token


def test_a_backbone_without_prompts_says_so() -> None:
    with refuses(BackboneError, "training.shared_prefix"):
        Backbone.collate_row(tiny_backbone(), [])
