"""How many operations training needs on each side of a cut, by arithmetic: two for each multiply-add.

Products of matrices count, and nothing else: no norms, softmax, optimizer or embedding look-ups. Padding does not
count, and neither does what is computed again to save memory. Of T tokens a linear layer from D_in to D_out costs
2 T D_in D_out forward, as much again backward where its input needs a gradient, and as much again where its weight is
trained. LoRA of rank R is two such layers, from D_in to R and from R to D_out. Attention of width A over P pairs of
tokens costs 4 P A forward (scores, then values by weights), and backward 2 P A each for queries, keys, values and
weights, where they need a gradient. Pairs count whether or not one token may see the other: a kernel that looks back
only does about half of them.

What enters the first block needs no gradient where nothing before it is trained, which saves part of that block's
backward pass, wherever the block is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from pplr.backbones.base import Backbone, Batch
from pplr.config import AdapterConfig
from pplr.stages.cut import CutPlan

__all__ = ["Flops", "FlopsOfCut"]

_READS: Final = {
    "self_attn.q_proj": "query",
    "self_attn.k_proj": "key",
    "self_attn.v_proj": "value",
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
}
"""Layers that read what enters a block."""
_THEN: Final = {
    "self_attn.o_proj": 0,
    "mlp.gate_proj": 1,
    "mlp.up_proj": 1,
    "mlp.down_proj": 2,
    "attention.output.dense": 0,
    "intermediate.dense": 1,
    "output.dense": 2,
}
"""Layers after attention, by their turn."""


@dataclass(frozen=True)
class Flops:
    """Operations of something.

    Args:
        client: On the client's side of the cut.
        server: On the server's.
        whole: Of the uncut model, for the same.
    """

    client: int = 0
    server: int = 0
    whole: int = 0

    def __add__(self, other: Flops) -> Flops:
        """Add up side by side."""
        return Flops(self.client + other.client, self.server + other.server, self.whole + other.whole)

    def __mul__(self, times: int) -> Flops:
        """Count the same several times."""
        return Flops(self.client * times, self.server * times, self.whole * times)


@dataclass(frozen=True)
class _Rate:
    """Operations of blocks for each token, and for each pair of tokens that attention compares."""

    token: int = 0
    pair: int = 0

    def __add__(self, other: _Rate) -> _Rate:
        return _Rate(self.token + other.token, self.pair + other.pair)

    def of(self, tokens: int, pairs: int) -> int:
        return self.token * tokens + self.pair * pairs


class FlopsOfCut:
    """Counts the operations of batches under one cut.

    Args:
        backbone: The model; the blocks need not be held.
        plan: The cut.
        adapter: What is trained in the blocks.
        train_a: Whether LoRA's A is trained, or B alone.

    Attributes:
        is_known: Whether the blocks are of a layout that is counted here; attention in windows is not.
    """

    def __init__(self, backbone: Backbone, plan: CutPlan, adapter: AdapterConfig, *, train_a: bool = True) -> None:
        self._backbone, self._adapter, self._train_a = backbone, adapter, train_a
        own = (*plan.input, *plan.output)
        begins = bool(backbone.end_shapes("input"))  # something is trained before the first block
        self.is_known = all(self._shapes(block) is not None for block in range(plan.total_layers))
        if not self.is_known:
            return
        every = range(plan.total_layers)
        self._training = (
            self._rate(own, needs_gradient=begins),
            self._rate(plan.middle, needs_gradient=begins),
            self._rate(every, needs_gradient=begins),
        )
        self._reading = tuple(self._rate(blocks, backward=False) for blocks in (own, plan.middle, every))

    def training(self, batch: Batch) -> Flops | None:
        """Count a forward and a backward pass, with the loss; ``None`` where the layout is not counted here."""
        ends = self._backbone.end_flops(batch)
        if ends is None or not self.is_known:
            return None
        client, server, whole = (rate.of(*_sizes(batch)) for rate in self._training)
        return Flops(client + ends, server, whole + ends)

    def reading(self, batch: Batch) -> Flops | None:
        """Count a forward pass through the blocks alone."""
        if not self.is_known:
            return None
        return Flops(*(rate.of(*_sizes(batch)) for rate in self._reading))

    def _rate(self, blocks: Iterable[int], *, needs_gradient: bool = True, backward: bool = True) -> _Rate:
        """Add blocks up; ``needs_gradient`` says whether what enters the model's first block does."""
        needs_gradient |= self._adapter.kind == "full"  # the norm that comes first is trained
        rate = _Rate()
        for block in blocks:
            rate += self._of_block(self._shapes(block) or {}, needs_gradient or block > 0, backward)
        return rate

    def _shapes(self, block: int) -> dict[str, tuple[int, int]] | None:
        """Name a block's linear layers without its number; ``None`` for a layout that is not known here."""
        start = f"{self._backbone.block_prefix}.{block}."
        shapes = {name.removeprefix(start): shape for name, shape in self._backbone.linear_shapes(block).items()}
        return shapes if all(name in _READS or name in _THEN for name in shapes) else None

    def _of_block(self, shapes: Mapping[str, tuple[int, int]], entering: bool, backward: bool) -> _Rate:
        """Count one block; ``entering`` says whether what enters it needs a gradient."""
        token, needs = 0, dict.fromkeys(("query", "key", "value"), entering)
        for name in (name for name in shapes if name in _READS):
            token += self._of_layer(name, shapes[name], entering, backward)
            needs[_READS[name]] |= self._is_trained(name)
        flows = any(needs.values())
        turns = sorted({_THEN[name] for name in shapes if name in _THEN})
        for turn in turns:
            layers = [name for name in shapes if _THEN.get(name) == turn]
            token += sum(self._of_layer(name, shapes[name], flows, backward) for name in layers)
            flows |= any(self._is_trained(name) for name in layers)
        width = next(shape[1] for name, shape in shapes.items() if _THEN.get(name) == 0)
        back = sum(needs.values()) + (needs["query"] or needs["key"]) if backward else 0
        return _Rate(token, 2 * width * (2 + back))

    def _of_layer(self, name: str, shape: tuple[int, int], needs_gradient: bool, backward: bool) -> int:
        """Count a linear layer with what is trained in it, for one token."""
        wide_out, wide_in = shape
        base, rank = wide_in * wide_out, self._adapter.rank
        is_lora = self._adapter.kind == "lora" and self._is_trained(name)
        count = base + (rank * (wide_in + wide_out) if is_lora else 0)
        if not backward:
            return 2 * count
        count += base * (needs_gradient + (self._adapter.kind == "full"))
        if is_lora:
            count += rank * wide_out  # of B
            count += rank * wide_out if self._train_a or needs_gradient else 0  # of what lies between the two
            count += rank * wide_in * (self._train_a + needs_gradient)
        return 2 * count

    def _is_trained(self, name: str) -> bool:
        return self._adapter.kind == "full" or name.split(".")[-1] in self._adapter.target_modules


def _sizes(batch: Batch) -> tuple[int, int]:
    """Count a batch's tokens without padding, and the pairs of them that stand in one sequence."""
    own = batch.lengths.tolist() if batch.row is None else [batch.row.prefix + length for length in batch.row.lengths]
    return batch.tokens, sum(length**2 for length in own)
