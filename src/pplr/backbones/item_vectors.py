"""An LLM that reads a history as one vector for each item, and at every position predicts the next item.

An item's vector is what the base model itself makes of its text, so no item needs an id: a new one is ranked at once.
A learned projection takes it into the first block, LoRA adapts the blocks, and two more projections take states and
items into one space, where cosines rank the catalog.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pplr.backbones.arithmetic import is_widened
from pplr.backbones.base import Batch, Blocks, End, MatchingBackbone, Normal, register
from pplr.backbones.causal_lm import CausalLM, DecoderBlocks
from pplr.backbones.losses import catalog_loss, draw_negatives
from pplr.backbones.slots import SeededDropout
from pplr.config import BackboneConfig, ItemVectorsConfig
from pplr.data.interactions import Catalog
from pplr.data.prompts import Sample, shown_title
from pplr.errors import BackboneError
from pplr.seeds import derive_seed

__all__ = ["EncodedHistory", "ItemVectors", "item_texts", "whiten"]

_IN, _STATE, _ITEM = "item_in.weight", "item_out.state.weight", "item_out.item.weight"
_HIDDEN_IN, _BACK_IN = "item_in.hidden.weight", "item_in.back.weight"
_PROJECTION_IN = (_IN, _HIDDEN_IN, _BACK_IN)
_HIDDEN_ITEM, _BACK_ITEM = "item_out.item.hidden.weight", "item_out.item.back.weight"
_RESIDUAL_IN, _RESIDUAL_OUT = "item_in.residual", "item_out.residual"
_EIGENVALUE_FLOOR = 1e-3


@dataclass(frozen=True, slots=True)
class EncodedHistory:
    """Items in order of time, from which place on each is a target, and whose they are; -1 where nobody says."""

    items: tuple[int, ...]
    first_target: int
    owner: int = -1


def item_texts(catalog: Catalog, attributes: Sequence[str]) -> list[str]:
    """Write each item as a text: its title, then the values of some columns.

    Raises:
        ConfigError: The catalog has no such column.
    """
    columns = catalog.columns(attributes, "backbone.item_vectors.attributes")
    texts = []
    for number, title in enumerate(catalog.titles):
        values = [str(column[number]).replace("|", ", ") for column in columns if column[number]]
        texts.append(". ".join([shown_title(title), *values]))
    return texts


def whiten(vectors: Tensor, how: Literal["none", "standardise", "zca"]) -> Tensor:
    """Prepare the base model's vectors, whose dimensions differ in size and go together.

    Args:
        vectors: (N, D).
        how: ``standardise`` gives every dimension mean 0 and standard deviation 1; ``zca`` also decorrelates them, with
            directions of less than a thousandth of the mean variance left small.

    Returns:
        (N, D) float32.

    Cites:
        kessy2018whitening
    """
    centred = vectors.double() - vectors.double().mean(dim=0)
    if how == "none" or len(vectors) < 2:
        return vectors.float()
    if how == "standardise":
        return (centred / centred.std(dim=0).clamp(min=1e-6)).float()
    values, directions = torch.linalg.eigh(centred.t() @ centred / (len(vectors) - 1))  # (D,), (D, D)
    floor = max(float(values.mean()), 1e-12) * _EIGENVALUE_FLOOR
    scale = (values.clamp(min=0) + floor).rsqrt()
    return (centred @ ((directions * scale) @ directions.t())).float()


def _project(
    vectors: Tensor, ends: Mapping[str, Tensor], direct: str, hidden: str, back: str, dtype: torch.dtype
) -> Tensor:
    """Map (..., D) to (..., W): W v + B gelu(A v), with the tensors ``direct`` W, ``hidden`` A and ``back`` B.

    Without a hidden layer it is W v alone. Products are of ``dtype``, the result is float32.
    """
    vectors = vectors.to(dtype)
    projected = F.linear(vectors, ends[direct].to(dtype)).float()
    if hidden not in ends:
        return projected
    between = F.gelu(F.linear(vectors, ends[hidden].to(dtype)))
    return projected + F.linear(between, ends[back].to(dtype)).float()


@register
class ItemVectors(MatchingBackbone):
    """A decoder over item vectors.

    Args:
        text: The decoder, which also reads the items' texts.
        config: Settings.

    Cites:
        chen2024hllm
    """

    name: ClassVar[str] = "item_vectors"
    trains_on: ClassVar[Literal["target", "history", "user"]] = "history"

    def __init__(self, text: CausalLM, config: ItemVectorsConfig | None = None) -> None:
        self._text = text
        self.config = config or ItemVectorsConfig()
        self.total_layers, self.hidden_size = text.total_layers, text.hidden_size
        self.dtype, self.device = text.dtype, text.device
        self._vectors: Tensor | None = None
        self._dropout = SeededDropout(self.config.dropout)
        self._left_out = torch.zeros(0, dtype=torch.bool)

    @classmethod
    def load(cls, config: BackboneConfig, notify: Callable[[str], None] = lambda _: None) -> ItemVectors:
        """Load the decoder; see :meth:`~pplr.backbones.causal_lm.CausalLM.load`."""
        return cls(CausalLM.load(config, notify), config.item_vectors)

    @property
    def text(self) -> CausalLM:
        """The decoder over tokens."""
        return self._text

    # -- the decoder's parts ----------------------------------------------------------------------------------

    def blocks(self, span: range) -> DecoderBlocks:
        """Build the blocks of a span; the frozen tensors are shared."""
        return self.text.blocks(span)

    def block(self, number: int) -> nn.Module:
        """Return a frozen block."""
        return self.text.block(number)

    def new_cache(self, blocks: Blocks) -> Any:
        """Make an empty cache; no step of this backbone needs one."""
        return self.text.new_cache(blocks)

    def client_bytes(self) -> int:
        """Bytes of embeddings, norm and head, with which the client reads the items' texts, and of the vectors."""
        return self.text.client_bytes() + (0 if self._vectors is None else self._vectors.nbytes)

    def fingerprint(self) -> str:
        """Hash of the frozen decoder; a server that hosts its middle needs to know no more."""
        return self.text.fingerprint()

    @property
    def _products(self) -> torch.dtype:
        """What projections of items are computed in: as the blocks are, with float32 weights."""
        return torch.float32 if is_widened(torch.empty(0, dtype=self.dtype, device=self.device)) else self.dtype

    # -- items ------------------------------------------------------------------------------------------------

    def prepare(self, catalog: Catalog, read: Callable[[Sequence[str]], Tensor]) -> None:
        """Read every item's text once, by the base model."""
        vectors = read(item_texts(catalog, self.config.attributes))
        self._vectors = whiten(vectors, self.config.whitening).to(self.device)

    def leave_out(self, items: Sequence[int]) -> None:
        """Compare no target with these items while training."""
        self._left_out = torch.zeros(len(self.vectors) if items else 0, dtype=torch.bool, device=self.device)
        if items:
            self._left_out[torch.tensor(items, device=self.device)] = True

    @property
    def vectors(self) -> Tensor:
        """The items' vectors: (N, D), float32.

        Raises:
            BackboneError: No catalog was taken in yet.
        """
        if self._vectors is None:
            raise BackboneError("no catalog was read by this backbone", cure="Call prepare with the catalog first.")
        return self._vectors

    def end_shapes(self, end: End) -> dict[str, tuple[int, ...]]:
        """Say the shapes of the projections, and of the residuals where there are any."""
        size, width, hidden = self.hidden_size, self.config.width, self.config.hidden_width
        items = 0 if self._vectors is None else len(self._vectors)
        if end == "input":
            shapes: dict[str, tuple[int, ...]] = {_IN: (size, size)}
            if hidden is not None:
                shapes |= {_HIDDEN_IN: (hidden, size), _BACK_IN: (size, hidden)}
            residual = {_RESIDUAL_IN: (items, size)}
        else:
            shapes = {_STATE: (width, size), _ITEM: (width, size)}
            if hidden is not None:
                shapes |= {_HIDDEN_ITEM: (hidden, size), _BACK_ITEM: (width, hidden)}
            residual = {_RESIDUAL_OUT: (items, width)}
        return shapes if self.config.residuals == "none" else shapes | residual

    def initial_end(self, name: str, shape: tuple[int, ...], source: torch.Generator) -> Tensor:
        """Draw a projection; inputs start as large as token embeddings, hidden layers and residuals add zero."""
        return self._start(name, shape, lambda own: torch.randn(own, generator=source))

    def secret_start(self, shapes: Mapping[str, tuple[int, ...]], normal: Normal) -> dict[str, Tensor]:
        """Draw the input projection from a client's own secret, where it is to stay there."""
        own = [name for name in _PROJECTION_IN if name in shapes] if self.config.secret_projection else []
        return {name: self._start(name, shapes[name], normal) for name in own}

    def _start(self, name: str, shape: tuple[int, ...], normal: Normal) -> Tensor:
        if name in (_BACK_IN, _BACK_ITEM, _RESIDUAL_IN, _RESIDUAL_OUT):
            return torch.zeros(shape)
        size = 1.0
        if name == _IN:
            table = self.text.model.model.embed_tokens.weight
            size = float(table[:: max(1, len(table) // 1024)].float().std())
        return normal(shape) * (size / math.sqrt(shape[1]))

    @property
    def private(self) -> frozenset[str]:
        """The residuals and the input projection, where they stay on the client."""
        residuals = {_RESIDUAL_IN, _RESIDUAL_OUT} if self.config.residuals == "client" else set()
        return frozenset(residuals | set(_PROJECTION_IN if self.config.secret_projection else ()))

    # -- histories to batches ---------------------------------------------------------------------------------

    def encode(self, samples: Sequence[Sample], catalog: Catalog, history_items: int) -> list[EncodedHistory]:
        """Take the newest ``history_items`` items and the target; every item but the first may be a target."""
        encoded = []
        for sample in samples:
            items = (*sample.history[-history_items:], sample.target)
            encoded.append(EncodedHistory(items, 1 if sample.every else len(items) - 1, sample.user))
        return encoded

    def length(self, encoded: EncodedHistory) -> int:
        """Count items that enter the model: a last one that is a target precedes none, so it stays out."""
        return len(encoded.items) - (encoded.first_target < len(encoded.items))

    def collate(self, encoded: Sequence[EncodedHistory]) -> Batch:
        """Pad on the right with item 0, which nothing sees: the decoder looks back only."""
        lengths = [self.length(own) for own in encoded]
        items = torch.zeros(len(encoded), max(lengths), dtype=torch.long)
        is_target = torch.zeros(len(encoded), max(lengths), dtype=torch.bool)
        labels: list[int] = []
        for row, (own, length) in enumerate(zip(encoded, lengths, strict=True)):
            items[row, :length] = torch.tensor(own.items[:length])
            is_target[row, own.first_target - 1 : len(own.items) - 1] = True
            labels += own.items[own.first_target :]
        return Batch(
            items.to(self.device),
            torch.tensor(lengths),
            is_target.to(self.device),
            labels=torch.tensor(labels, dtype=torch.long, device=self.device),
            owners=torch.tensor([own.owner for own in encoded]),
        )

    def pad(self, histories: Sequence[Sequence[int]]) -> Batch:
        """Pad histories to rank after: no item is a target."""
        return self.collate([EncodedHistory(tuple(own), len(own)) for own in histories])

    # -- vectors to states, states to scores ------------------------------------------------------------------

    def embed(self, input_ids: Tensor, ends: Mapping[str, Tensor], dropout_seed: int | None = None) -> Tensor:
        """Project the vectors of items (B, T) into the model: (B, T, D)."""
        states = _project(self.vectors[input_ids], ends, _IN, _HIDDEN_IN, _BACK_IN, self._products)
        if _RESIDUAL_IN in ends:
            states = states + F.embedding(input_ids, ends[_RESIDUAL_IN])
        self._dropout.reseed(None if dropout_seed is None else derive_seed(dropout_seed, "item vectors"))
        return self._dropout(states).to(self.dtype)

    def items(self, ends: Mapping[str, Tensor], chosen: Tensor | None = None) -> Tensor:
        """Place items in the space of comparison: (M, width), each of length 1.

        Args:
            ends: What is trained at the output end.
            chosen: (M,) item numbers; the whole catalog when absent.
        """
        vectors = self.vectors if chosen is None else self.vectors[chosen]
        placed = _project(vectors, ends, _ITEM, _HIDDEN_ITEM, _BACK_ITEM, self._products)
        if _RESIDUAL_OUT in ends:
            placed = placed + (ends[_RESIDUAL_OUT] if chosen is None else ends[_RESIDUAL_OUT][chosen])
        return F.normalize(placed, dim=-1)

    def queries(self, hidden_states: Tensor, ends: Mapping[str, Tensor]) -> Tensor:
        """Place states in the space of comparison: (..., D) -> (..., width), each of length 1."""
        return F.normalize(F.linear(self.text.final_states(hidden_states).float(), ends[_STATE]), dim=-1)

    def end_flops(self, batch: Batch) -> int:
        """Count the products of the projections, all trained, and the scores of M targets among the items compared."""
        size, width, hidden = self.hidden_size, self.config.width, self.config.hidden_width or 0
        labels, held = _asked(batch)
        chosen = draw_negatives(held, labels, self.config.negatives, len(self.vectors))
        items, targets = len(self.vectors) if chosen is None else len(chosen), len(labels)
        vectors = 4 * size * (size + hidden) + 6 * hidden * size  # an item's: what enters needs no gradient
        placed = 4 * size * (width + hidden) + 6 * hidden * width
        return batch.tokens * vectors + items * placed + 6 * targets * width * (size + items)

    def loss(self, hidden_states: Tensor, batch: Batch, ends: Mapping[str, Tensor]) -> Tensor:
        """Sum the cross-entropy of each target among the catalog, or among the negatives drawn for this batch."""
        labels, held = _asked(batch)
        queries = self.queries(hidden_states[batch.is_target], ends)  # (M, width), of the states that predict
        items = partial(self.items, ends)
        return catalog_loss(queries, items, labels, held, self.config, len(self.vectors), self._left_out)


def _asked(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return what a batch asks for, (M,), and all items of its histories, targets included, padding with them."""
    if batch.labels is None:
        raise BackboneError("a batch without targets has no loss", cure="Make it with collate.")
    return batch.labels, torch.cat([batch.input_ids.flatten(), batch.labels])
