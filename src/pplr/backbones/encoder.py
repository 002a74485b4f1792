"""RecFormer's backbone: an encoder reads a history as text, newest item first, and is matched with encoded items.

An item is its attributes, each as key and value. A client's item embeddings follow from its own adapter; they are
computed anew before each epoch and are constants of it, so the gradient goes through the history alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pplr.backbones.base import Batch, Blocks, End, MatchingBackbone, register
from pplr.backbones.bundles import ENCODERS, base_fingerprint
from pplr.backbones.encoder_blocks import EncoderBlocks, shorten
from pplr.backbones.loading import ENCODER, load_pretrained
from pplr.backbones.losses import catalog_loss, draw_negatives
from pplr.config import BackboneConfig, EncoderConfig
from pplr.data.interactions import Catalog
from pplr.data.prompts import Sample, shown_title
from pplr.errors import BackboneError, ConfigError, DataError, UnsupportedModelError
from pplr.seeds import generator

__all__ = ["FAMILIES", "EncodedUser", "Encoder", "item_fields"]

FAMILIES = ENCODERS
"""Model families whose cut is verified equal to the uncut model, as HF's ``model_type``."""

_SPECIAL, _KEY, _VALUE = 0, 1, 2
_MOST_ITEMS = 50
_TYPES, _PLACES, _TABLE = "embeddings.token_type", "embeddings.item_position", "catalog.items"
_ITEMS_AT_ONCE = 64
_TABLES_KEPT = 4


@dataclass(frozen=True, slots=True)
class EncodedUser:
    """A history in order of time and the item that followed.

    Args:
        history: Item numbers, oldest first.
        target: The item that followed.
        drawn_from: Most items before a target, where each epoch draws a target from the whole; absent where
            ``target`` is the one.
    """

    history: tuple[int, ...]
    target: int
    drawn_from: int | None = None


def item_fields(catalog: Catalog, attributes: Sequence[str]) -> list[list[tuple[str, str]]]:
    """Write each item as keys and values: its title, then the values of some columns; empty values are left out.

    Raises:
        ConfigError: The catalog has no such column.
    """
    columns = catalog.columns(attributes, "backbone.encoder.attributes")
    rows = []
    for number, title in enumerate(catalog.titles):
        told = [(name, str(column[number]).replace("|", " ")) for name, column in zip(attributes, columns, strict=True)]
        rows.append([("title", shown_title(title)), *((name, value) for name, value in told if value)])
    return rows


@register
class Encoder(MatchingBackbone):
    """An encoder of the BERT layout that reads items as keys and values.

    Token types (special, key, value) and item positions are embedded besides what the model knows; these tables start
    at zero, or from RecFormer's published ones.

    Args:
        model: The frozen HF model, without a pooler.
        tokenizer: Its tokenizer; ``None`` for a server's bundle, which handles no text.
        config: Settings.
        max_tokens: Longest sequence.
        folder: Where the model was loaded from, a folder or a hub id.

    Raises:
        UnsupportedModelError: The model's family is not verified.

    Cites:
        li2023recformer
    """

    name: ClassVar[str] = "encoder"
    trains_on: ClassVar[Literal["target", "history", "user"]] = "user"
    block_prefix: ClassVar[str] = "encoder.layer"
    bidirectional: ClassVar[bool] = True
    task: ClassVar[str] = "FEATURE_EXTRACTION"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        config: EncoderConfig | None = None,
        *,
        max_tokens: int = 512,
        folder: str = "",
    ) -> None:
        held = model.config
        if held.model_type not in FAMILIES:
            raise UnsupportedModelError(
                f"models of the family {held.model_type!r} are not verified for encoder",
                cure=f"Choose a model of one of these families: {', '.join(FAMILIES)}.",
            )
        self._first_position = 0 if held.model_type == "bert" else held.pad_token_id + 1
        self.model = model.eval().requires_grad_(False)
        self.config = config or EncoderConfig()
        self.max_tokens, self.folder = max_tokens, folder
        self._tokenizer = tokenizer
        self.total_layers, self.hidden_size = held.num_hidden_layers, held.hidden_size
        table = model.embeddings.word_embeddings.weight
        layers = [p for p in model.encoder.parameters() if not p.is_meta]
        self.dtype = table.dtype if not table.is_meta else layers[0].dtype
        self.device = table.device if not table.is_meta else layers[0].device
        self._items: list[tuple[tuple[int, ...], tuple[int, ...]]] | None = None
        self._left_out = torch.zeros(0, dtype=torch.bool)
        self._tables: OrderedDict[str, Tensor] = OrderedDict()
        if tokenizer is not None:
            first = tokenizer.cls_token_id
            if first is None or tokenizer.pad_token_id is None:
                raise BackboneError(
                    "the model's tokenizer has no first token or no padding", cure="Choose a model that encodes texts."
                )
            self._first, self._pad = first, tokenizer.pad_token_id

    @classmethod
    def load(cls, config: BackboneConfig, notify: Callable[[str], None] = lambda _: None) -> Encoder:
        """Load from a short name, a hub id or a folder; see :func:`~pplr.backbones.loading.load_pretrained`."""
        model, tokenizer, folder = load_pretrained(config, FAMILIES, notify, ENCODER)
        if config.keep_blocks is not None:
            shorten(model, config.keep_blocks)
        return cls(model, tokenizer, config.encoder, max_tokens=config.max_tokens, folder=folder)

    # -- the encoder's parts ----------------------------------------------------------------------------------

    def blocks(self, span: range) -> EncoderBlocks:
        """Build the blocks of a span; the frozen tensors are shared."""
        return EncoderBlocks(self.model, self.model.config, span)

    def block(self, number: int) -> nn.Module:
        """Return a frozen block."""
        return cast(nn.Module, cast(Any, self.model).encoder.layer[number])

    def new_cache(self, blocks: Blocks) -> Any:
        """An encoder has none.

        Raises:
            BackboneError: Always.
        """
        raise BackboneError("an encoder generates nothing, so it has no cache", cure="Use backbone.name: causal_lm.")

    def client_bytes(self) -> int:
        """Bytes of the embeddings, with RecFormer's tables where there are any, and of a client's item embeddings."""
        parts = {tensor.data_ptr(): tensor for tensor in self.model.embeddings.state_dict().values()}
        items = 0 if self._items is None else 4 * len(self._items) * self.hidden_size
        return sum(tensor.nbytes for tensor in parts.values() if tensor.is_floating_point()) + items

    def fingerprint(self) -> str:
        """Hash of the frozen encoder; for a bundle, of the base it was cut from."""
        return base_fingerprint(self.model, self.folder, self.total_layers, self.dtype)

    # -- items ------------------------------------------------------------------------------------------------

    def prepare(self, catalog: Catalog, read: Callable[[Sequence[str]], Tensor]) -> None:
        """Turn every item's attributes into tokens once; nothing is read by the model yet.

        Raises:
            ConfigError: The model has fewer positions than ``max_tokens``, or the catalog not every attribute.
            DataError: An item alone is too long.
        """
        if self._tokenizer is None:
            raise BackboneError(f"{self.folder} is a server's bundle and handles no text", cure="Use the client's.")
        positions = self.model.config.max_position_embeddings - self._first_position
        if self.max_tokens > positions:
            raise ConfigError(
                f"backbone.max_tokens is {self.max_tokens}, and the model has {positions} positions",
                cure=f"Set backbone.max_tokens to at most {positions}.",
            )
        fields = item_fields(catalog, self.config.attributes)
        distinct = list(dict.fromkeys(text for own in fields for pair in own for text in pair))
        rows = self._tokenizer(distinct, add_special_tokens=False, truncation=False).input_ids
        tokens = dict(zip(distinct, rows, strict=True))
        items: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        for own in fields:
            ids: list[int] = []
            types: list[int] = []
            for key, value in own:
                words = [*tokens[key], *tokens[value]][: self.config.attribute_tokens]
                ids += words
                types += [_KEY if place < len(tokens[key]) else _VALUE for place in range(len(words))]
            if len(ids) + 1 > self.max_tokens:
                raise DataError(
                    f"an item takes {len(ids) + 1} tokens, more than the {self.max_tokens} allowed",
                    cure="Raise backbone.max_tokens, or lower backbone.encoder.attribute_tokens.",
                )
            items.append((tuple(ids), tuple(types)))
        self._items = items
        self._tables.clear()

    def leave_out(self, items: Sequence[int]) -> None:
        """Compare no target with these items while training."""
        self._left_out = torch.zeros(len(self._texts) if items else 0, dtype=torch.bool, device=self.device)
        if items:
            self._left_out[torch.tensor(items, device=self.device)] = True

    @property
    def _texts(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        if self._items is None:
            raise BackboneError("no catalog was read by this backbone", cure="Call prepare with the catalog first.")
        return self._items

    def end_shapes(self, end: End) -> dict[str, tuple[int, ...]]:
        """Say the shapes of what the tables add to the embeddings, and of a client's item embeddings."""
        if end == "input":
            return {_TYPES: (3, self.hidden_size), _PLACES: (_MOST_ITEMS + 1, self.hidden_size)}
        return {_TABLE: (0 if self._items is None else len(self._items), self.hidden_size)}

    @property
    def private(self) -> frozenset[str]:
        """A client's item embeddings."""
        return self.constant

    @property
    def constant(self) -> frozenset[str]:
        """A client's item embeddings: they follow from its adapter."""
        return frozenset({_TABLE})

    def constants(self, read: Callable[[Batch], Tensor], key: str) -> dict[str, Tensor]:
        """Encode the catalog, items of like length together: (N, D) of rows of length 1; the newest few are cached."""
        if key in self._tables:
            return {_TABLE: self._tables[key]}
        table = torch.empty(len(self._texts), self.hidden_size)
        for chosen in self._together():
            batch = self.pad([(item,) for item in chosen])
            table[chosen] = self.queries(self.pool(read(batch), batch), {}).cpu()
        self._tables[key] = table
        while len(self._tables) > _TABLES_KEPT:
            self._tables.popitem(last=False)
        return {_TABLE: table}

    def _together(self) -> list[list[int]]:
        """Say which items are read in one batch: those of like length."""
        order = sorted(range(len(self._texts)), key=lambda item: len(self._texts[item][0]))
        return [order[start : start + _ITEMS_AT_ONCE] for start in range(0, len(order), _ITEMS_AT_ONCE)]

    def constant_batches(self) -> Iterator[Batch]:
        """Give the batches in which the catalog is read."""
        return (self.pad([(item,) for item in chosen]) for chosen in self._together())

    def keeps_constants(self, server_round: int) -> bool:
        """Whether a server round belongs to the second phase."""
        last = self.config.first_phase_rounds
        return last is not None and server_round >= last

    # -- histories to batches ---------------------------------------------------------------------------------

    def encode(self, samples: Sequence[Sample], catalog: Catalog, history_items: int) -> list[EncodedUser]:
        """Take the newest ``history_items`` items and the target, or the whole history to draw targets from.

        Raises:
            ConfigError: More items than have a position.
        """
        if history_items > _MOST_ITEMS:
            raise ConfigError(
                f"data.history_items is {history_items}, and an encoder knows {_MOST_ITEMS} item positions",
                cure=f"Set data.history_items to at most {_MOST_ITEMS}.",
            )
        return [
            EncodedUser(sample.history, sample.target, history_items)
            if sample.every
            else EncodedUser(sample.history[-history_items:], sample.target)
            for sample in samples
        ]

    def draw(self, encoded: Sequence[EncodedUser], seed: int) -> list[EncodedUser]:
        """Draw one target of each user's items but the first, and take the history before it."""
        source, drawn = generator(seed, "targets"), []
        for own in encoded:
            if own.drawn_from is None:
                drawn.append(own)
                continue
            items = (*own.history, own.target)
            place = int(source.integers(1, len(items)))
            drawn.append(EncodedUser(items[max(0, place - own.drawn_from) : place], items[place]))
        return drawn

    def _read(self, history: Sequence[int]) -> list[int]:
        """Say which items of a history are read: the newest first, as many as fit."""
        shown: list[int] = []
        room = self.max_tokens - 1
        for item in reversed(history[-_MOST_ITEMS:]):
            room -= len(self._texts[item][0])
            if room < 0:
                break
            shown.append(item)
        return shown

    def length(self, encoded: EncodedUser) -> int:
        """Count tokens of the history that is read."""
        return 1 + sum(len(self._texts[item][0]) for item in self._read(encoded.history))

    def collate(self, encoded: Sequence[EncodedUser]) -> Batch:
        """Pad on the right; the target is a label and no part of the text."""
        batch = self.pad([own.history for own in encoded])
        batch.is_target[:, 0] = True
        labels = torch.tensor([own.target for own in encoded], device=self.device)
        return Batch(batch.input_ids, batch.lengths, batch.is_target, labels)

    def pad(self, histories: Sequence[Sequence[int]]) -> Batch:
        """Write histories of item numbers, oldest first, as tokens, types and item positions: (B, T, 3)."""
        rows = []
        for history in histories:
            row = [(self._first, _SPECIAL, 0)]
            for place, item in enumerate(self._read(history), start=1):
                row += [(token, kind, place) for token, kind in zip(*self._texts[item], strict=True)]
            rows.append(row)
        longest = max(map(len, rows))
        padding = (self._pad, _SPECIAL, 0)
        padded = [row + [padding] * (longest - len(row)) for row in rows]
        input_ids = torch.tensor(padded, dtype=torch.long, device=self.device)  # (B, T, 3)
        is_target = torch.zeros(input_ids.shape[:2], dtype=torch.bool, device=self.device)
        return Batch(input_ids, torch.tensor([len(row) for row in rows]), is_target)

    # -- tokens to states, states to scores -------------------------------------------------------------------

    def embed(self, input_ids: Tensor, ends: Mapping[str, Tensor], dropout_seed: int | None = None) -> Tensor:
        """Embed tokens with their positions, types and item positions: (B, T, 3) -> (B, T, D)."""
        own = self.model.embeddings
        tokens, types, places = input_ids.unbind(-1)
        positions = torch.arange(tokens.shape[1], device=tokens.device) + self._first_position
        states = own.word_embeddings(tokens) + own.position_embeddings(positions)
        published = getattr(own, "recformer_token_types", None)
        if published is None:
            states = states + own.token_type_embeddings.weight[0]
        else:
            states = states + F.embedding(types, published) + F.embedding(places, own.recformer_item_positions)
        states = states.float() + F.embedding(types, ends[_TYPES]) + F.embedding(places, ends[_PLACES])
        norm = own.LayerNorm
        weight, bias = norm.weight.float(), norm.bias.float()
        return F.layer_norm(states, norm.normalized_shape, weight, bias, norm.eps).to(self.dtype)

    def pool(self, hidden_states: Tensor, batch: Batch) -> Tensor:
        """Make one state of each sequence's: (B, T, D) -> (B, D)."""
        if self.config.pooling == "first":
            return hidden_states[:, 0]
        real = torch.arange(hidden_states.shape[1])[None, :] < batch.lengths[:, None]
        summed = (hidden_states.float() * real.to(hidden_states.device)[:, :, None]).sum(dim=1)
        return summed / batch.lengths[:, None].to(summed)

    def queries(self, hidden_states: Tensor, ends: Mapping[str, Tensor]) -> Tensor:
        """Scale pooled states to length 1: (..., D) -> (..., D), float32."""
        return F.normalize(hidden_states.float(), dim=-1)

    def items(self, ends: Mapping[str, Tensor], chosen: Tensor | None = None) -> Tensor:
        """Return the client's item embeddings: (M, D), each of length 1."""
        return ends[_TABLE] if chosen is None else ends[_TABLE][chosen]

    def end_flops(self, batch: Batch) -> int | None:
        """Count the scores of M targets among the items compared, which are constants: 4 M N D."""
        if batch.labels is None:
            return None
        chosen = draw_negatives(batch.input_ids, batch.labels, self.config.negatives, len(self._texts))
        items = len(self._texts) if chosen is None else len(chosen)
        return 4 * len(batch.labels) * items * self.hidden_size

    def loss(self, hidden_states: Tensor, batch: Batch, ends: Mapping[str, Tensor]) -> Tensor:
        """Sum the cross-entropy of each target among the catalog, or among the negatives drawn for this batch."""
        if batch.labels is None:
            raise BackboneError("a batch without targets has no loss", cure="Collate encoded samples.")
        queries, items = self.queries(self.pool(hidden_states, batch), ends), partial(self.items, ends)
        total = len(self._texts)
        return catalog_loss(queries, items, batch.labels, batch.input_ids, self.config, total, self._left_out)
