"""Losses that keep less, against their plain form."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pplr.backbones.losses import head_loss

HEAD = nn.Linear(16, 50).requires_grad_(False)


@pytest.mark.parametrize("rows", [0, 1, 64, 65, 200])
def test_the_loss_by_rows_is_the_plain_one(rows: int):
    source = torch.Generator().manual_seed(rows)
    states = torch.randn(rows, 16, generator=source, requires_grad=True)
    labels = torch.randint(0, 50, (rows,), generator=source)
    plain = F.cross_entropy(HEAD(states), labels, reduction="sum")
    (expected,) = torch.autograd.grad(plain / 7, states)
    loss = head_loss(HEAD, states, labels)
    torch.testing.assert_close(loss, plain.detach())
    (loss / 7).backward()
    assert states.grad is not None
    torch.testing.assert_close(states.grad, expected)
    with torch.no_grad():
        torch.testing.assert_close(head_loss(HEAD, states, labels), plain.detach())


def test_no_more_than_64_rows_of_logits_exist_at_once():
    seen: list[int] = []

    def head(states: torch.Tensor) -> torch.Tensor:
        seen.append(len(states))
        return HEAD(states)

    states = torch.ones(150, 16, requires_grad=True)
    head_loss(head, states, torch.zeros(150, dtype=torch.long)).backward()
    assert seen == [64, 64, 22]


def test_states_in_bfloat16_get_gradients_in_bfloat16():
    states = torch.ones(70, 16, dtype=torch.bfloat16, requires_grad=True)
    head_loss(lambda x: HEAD(x.float()), states, torch.arange(70) % 50).backward()
    assert states.grad is not None
    assert states.grad.dtype == torch.bfloat16
