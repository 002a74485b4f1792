"""A catalog's titles as the answers that a training pass may hold."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pplr.backbones.causal_lm import CausalLM
from pplr.privacy.audits.base import Attacker

__all__ = ["Answers"]


class Answers:
    """Every answer that the catalog allows, each with the first item that has it, S of them.

    A pass ends with its answer, so answers are told apart by what stands at the pass's last positions. In a list an
    answer follows the end of a line, which is taken for a part of it: so none is the end of a longer one.

    Args:
        attacker: Whose catalog and backbone, which reads text.

    Attributes:
        items: (S,).
        lengths: (S,) tokens of each answer.
        is_line: Whether what comes before an answer is predicted too.
    """

    def __init__(self, attacker: Attacker) -> None:
        backbone = attacker.replica.backbone
        if not isinstance(backbone, CausalLM):
            raise TypeError(type(backbone).__name__)
        first: dict[tuple[int, ...], int] = {}
        self.is_line = backbone.template.is_list
        before = (backbone.answer_end,) if self.is_line else ()
        for number, title in enumerate(attacker.catalog.titles):
            first.setdefault((*before, *backbone.answer_tokens(title)), number)
        self.items = torch.tensor(list(first.values()))
        self.lengths = torch.tensor([len(own) for own in first])
        self._rows: list[Sequence[int]] = list(first)

    def fitting(self, length: int) -> Tensor:
        """Choose the answers that leave room for a first token in a pass: (S_chosen,) of S."""
        return (self.lengths < length).nonzero()[:, 0]

    def tokens(self, chosen: Tensor, width: int) -> Tensor:
        """Write answers so that they end together: (S_chosen, width), -1 before an answer begins."""
        table = torch.full((len(chosen), width), -1)
        for place, number in enumerate(chosen.tolist()):
            row = self._rows[number]
            table[place, width - len(row) :] = torch.tensor(row)
        return table
