"""What a backbone is: embeddings, a row of blocks, and an end that turns states into a loss.

A backbone is one file. It says how text becomes a batch, how a batch enters the first block, what a span
of blocks is, and what is made of the last block's states. It knows nothing of cuts, clients or rounds: any
span of its blocks may be hosted anywhere.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pplr.backbones.shared_row import SharedRow
from pplr.config import BackboneConfig
from pplr.data.interactions import Catalog
from pplr.data.prompts import Sample
from pplr.errors import BackboneError, ConfigError, nearest

__all__ = [
    "BACKBONES",
    "Backbone",
    "Batch",
    "Blocks",
    "End",
    "MatchingBackbone",
    "Normal",
    "backbone_kind",
    "load_backbone",
    "register",
    "span_tensors",
]

Normal = Callable[[tuple[int, ...]], Tensor]
"""Draws standard normal numbers of a shape."""
End = Literal["input", "output"]
"""One of the two ends of a model, both of which the client holds."""


@dataclass(frozen=True)
class Batch:
    """Sequences of one forward pass, padded on the right.

    Args:
        input_ids: (B, T) token ids, or (B, T, ...) where a backbone reads more of a token than its id.
        lengths: (B,) real tokens of each row.
        is_target: (B, T), true where the token is one that the loss asks for; where there are ``labels`` of tokens, it
            is true where the token that follows is.
        labels: What the loss asks for, where that is not among the tokens: (B,), or (M,) one for each target, of which
            a sequence's last may be none of its tokens.
        row: How the sequences stand in one row, where they do. Then B is 1 above, and there are ``labels``.
        owners: (B,) the user of each row, where that is known.
    """

    input_ids: Tensor
    lengths: Tensor
    is_target: Tensor
    labels: Tensor | None = None
    row: SharedRow | None = None
    owners: Tensor | None = None

    @property
    def samples(self) -> int:
        """Sequences."""
        return self.input_ids.shape[0] if self.row is None else len(self.row.lengths)

    @property
    def targets(self) -> int:
        """Tokens that the loss asks for."""
        return int(self.is_target.sum())

    @property
    def tokens(self) -> int:
        """Real tokens, without padding; shared ones count once."""
        return int(self.lengths.sum())


class Blocks(nn.Module, ABC):
    """A span of a backbone's blocks, numbered from 0 within the span and named as in the whole model.

    Attributes:
        layers: The blocks.
        first_layer: Absolute number of the first.
        keeps_apart: Whether batches that stand in one row of tokens (:func:`pplr.backbones.attention.batches`) have no
            effect on each other.
    """

    layers: nn.ModuleList
    first_layer: int
    keeps_apart: bool = False

    @abstractmethod
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        """Run the blocks: (B, T, D) -> (B, T, D).

        Args:
            hidden_states: (B, T, D), from the block before.
            attention_mask: (B, T_past + T), 0 where a token is padding; for blocks that look back only, absent when
                padding is on the right.
            position_ids: (B, T); absent counts from 0.
            cache: Keys and values of this span, extended in place.
        """

    @contextmanager
    def recomputing(self, prepare: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
        """Let passes within keep no activations inside the blocks, which run again in the backward pass.

        This uses the checkpointing of transformers' blocks, one block at a time.

        Args:
            prepare: Makes what surrounds whatever runs again, so that it finds what it ran with at first.
        """

        def run(block: Callable[..., Any], *inputs: Any) -> Any:
            def prepared(*inputs: Any) -> Any:
                with prepare():
                    return block(*inputs)

            return checkpoint(prepared, *inputs, use_reentrant=False, preserve_rng_state=False)

        layers: list[Any] = list(self.layers)
        for layer in layers:
            layer._gradient_checkpointing_func = run
            layer.gradient_checkpointing = layer.training = True
        try:
            yield
        finally:
            for layer in layers:
                layer.gradient_checkpointing = layer.training = False


def span_tensors(layers: nn.ModuleList, span: range, prefix: str) -> dict[str, Tensor]:
    """Collect the frozen tensors of a span, shared and not copied, numbered from 0 within it.

    Args:
        layers: Every block of the model.
        span: Which blocks, half-open like ``range``.
        prefix: What stands before a block's number.

    Raises:
        BackboneError: The model was loaded from a bundle that does not hold one of them.
    """
    tensors: dict[str, Tensor] = {}
    for number, layer in enumerate(layers[span.start : span.stop]):
        own = layer.state_dict()
        if any(tensor.is_meta for tensor in own.values()):
            raise BackboneError(
                f"this bundle of the model does not hold block {span.start + number}",
                cure="Use the bundle of the side that runs it; a client's needs --stage-server, and its own cut.",
            )
        tensors |= {f"{prefix}.{number}.{name}": tensor for name, tensor in own.items()}
    return tensors


class Backbone(ABC):
    """A language model with a frozen base, as parts that can be hosted apart.

    Attributes:
        name: The registered name.
        total_layers: Number of blocks.
        hidden_size: D, the width of what passes from block to block.
        dtype: Of the frozen base and of what passes from block to block.
        device: Where the base lies.
        trains_on: What a sample is: one ``target`` after a history, a ``history`` whose every item is a target, or a
            ``user``, one of whose items is drawn as the target in each epoch.
        block_prefix: Where the blocks are in the uncut model, as its tensors are named.
        bidirectional: Whether a block looks ahead as well, so that it must be told where padding begins.
        task: What PEFT calls the uncut model's task.
    """

    name: ClassVar[str]
    trains_on: ClassVar[Literal["target", "history", "user"]] = "target"
    block_prefix: ClassVar[str] = "model.layers"
    bidirectional: ClassVar[bool] = False
    task: ClassVar[str] = "CAUSAL_LM"
    total_layers: int
    hidden_size: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    @abstractmethod
    def load(cls, config: BackboneConfig, notify: Callable[[str], None]) -> Backbone:
        """Load the frozen base.

        Raises:
            BackboneError: The model cannot be found or read.
            UnsupportedModelError: The model's family is not one this backbone knows.
        """

    @classmethod
    def samples_of(cls, config: BackboneConfig) -> Literal["target", "history", "user"]:
        """Say what a sample is under a configuration; see ``trains_on``, which it is by default."""
        return cls.trains_on

    @abstractmethod
    def blocks(self, span: range) -> Blocks:
        """Build the blocks of a span around the shared frozen tensors, without copying them.

        Returns:
            A module that shares the frozen tensors, and no adapter, with those of other calls.
        """

    @abstractmethod
    def block(self, number: int) -> nn.Module:
        """Return a frozen block; where it is not held, one without memory that has the right shapes."""

    def linear_shapes(self, block: int) -> dict[str, tuple[int, int]]:
        """Say the (D_out, D_in) of every linear layer of a block, by its absolute name; the block need not be held."""
        return {
            f"{self.block_prefix}.{block}.{name}": (module.out_features, module.in_features)
            for name, module in self.block(block).named_modules()
            if isinstance(module, nn.Linear)
        }

    def parameter_shapes(self, block: int) -> dict[str, tuple[int, ...]]:
        """Say the shape of every parameter of a block, by its absolute name; the block need not be held."""
        return {
            f"{self.block_prefix}.{block}.{name}": tuple(parameter.shape)
            for name, parameter in self.block(block).named_parameters()
        }

    @abstractmethod
    def new_cache(self, blocks: Blocks) -> Any:
        """Make an empty key-value cache for a span of blocks."""

    def divide(self, samples: Sequence[Sample], catalog: Catalog) -> Sequence[Sample]:
        """Divide training samples that are too long to be encoded whole; by default they are left as they are."""
        return samples

    @abstractmethod
    def encode(self, samples: Sequence[Sample], catalog: Catalog, history_items: int) -> list[Any]:
        """Turn samples into token sequences once, so that training only collates."""

    def draw(self, encoded: Sequence[Any], seed: int) -> Sequence[Any]:
        """Say what an epoch trains on: the samples as they are, or something drawn from each by the epoch's seed."""
        return encoded

    @abstractmethod
    def length(self, encoded: Any) -> int:
        """Return the number of tokens of one encoded sample."""

    @abstractmethod
    def collate(self, encoded: Sequence[Any]) -> Batch:
        """Pad encoded samples to a batch."""

    def collate_row(self, encoded: Sequence[Any]) -> Batch:
        """Put encoded samples in one row without padding, and what all begin with once in front.

        Raises:
            BackboneError: The backbone has no such form.
        """
        raise BackboneError(
            f"samples of the backbone {self.name} share no row", cure="Set training.shared_prefix: false."
        )

    @property
    def text(self) -> Backbone:
        """The backbone by which the base model reads text: this one, or the one that this one is built on."""
        return self

    def prepare(self, catalog: Catalog, read: Callable[[Sequence[str]], Tensor]) -> None:  # noqa: B027
        """Take in a catalog before anything is encoded; nothing by default.

        Args:
            catalog: N items.
            read: Turns S texts into (S, D) states of the base model, one for each text, pooled as configured.
        """

    def leave_out(self, items: Sequence[int]) -> None:  # noqa: B027
        """Take items for unknown while training, so that no loss tells targets apart from them; nothing by default."""

    def end_shapes(self, end: End) -> dict[str, tuple[int, ...]]:
        """Say what is trained outside the blocks at one end, by its name in an adapter; nothing by default."""
        return {}

    def initial_end(self, name: str, shape: tuple[int, ...], source: torch.Generator) -> Tensor:
        """Draw the start of what is trained outside the blocks, float32."""
        return torch.zeros(shape)

    def secret_start(self, shapes: Mapping[str, tuple[int, ...]], normal: Normal) -> dict[str, Tensor]:
        """Draw the start of those private tensors that each client starts from a secret of its own; none by default.

        Args:
            shapes: Of what is trained outside the blocks.
            normal: Draws standard normal numbers of a shape, which nobody else can tell.
        """
        return {}

    @property
    def private(self) -> frozenset[str]:
        """Names of tensors that never leave the client, not even to be mixed; none by default."""
        return frozenset()

    @property
    def constant(self) -> frozenset[str]:
        """Names of tensors at the ends that no gradient changes; they are private too. None by default."""
        return frozenset()

    def constants(self, read: Callable[[Batch], Tensor], key: str) -> dict[str, Tensor]:
        """Compute the constant tensors from a client's model as it is now.

        Args:
            read: Runs a batch through the model with its adapter: (B, T) -> (B, T, D).
            key: Hash of the adapter, for a cache.
        """
        return {}

    def keeps_constants(self, server_round: int) -> bool:
        """Say whether a server round (from 0) leaves the constants as its client's best round before had them."""
        return False

    @abstractmethod
    def embed(self, input_ids: Tensor, ends: Mapping[str, Tensor], dropout_seed: int | None = None) -> Tensor:
        """Map token ids (B, T) to what enters the first block (B, T, D).

        Args:
            input_ids: Tokens, or whatever a batch of this backbone is made of.
            ends: What is trained at the input end; see :meth:`end_shapes`.
            dropout_seed: Seed of this pass's dropout masks; absent is evaluation.
        """

    @abstractmethod
    def loss(self, hidden_states: Tensor, batch: Batch, ends: Mapping[str, Tensor]) -> Tensor:
        """Sum the loss over the batch's targets, from the last block's states (B, T, D).

        Args:
            hidden_states: (B, T, D).
            batch: What they came from.
            ends: What is trained at the output end.
        """

    def end_flops(self, batch: Batch) -> int | None:
        """Count the operations of a training pass outside the blocks, two for each multiply-add, without padding.

        Returns:
            Those of matrix products, forward and backward; ``None`` where nobody has worked them out.
        """
        return None

    def constant_batches(self) -> Iterator[Batch]:
        """Give the batches that :meth:`constants` reads; none by default."""
        return iter(())

    @abstractmethod
    def client_bytes(self) -> int:
        """Bytes of the frozen tensors outside the blocks (embeddings, norm, head), which clients always hold."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of the frozen base, for caches of what is computed from it."""


class MatchingBackbone(Backbone):
    """A backbone that ranks by cosines: one of its states stands for a history, and is matched with every item."""

    @abstractmethod
    def pad(self, histories: Sequence[Sequence[int]]) -> Batch:
        """Pad histories of item numbers, oldest first, to a batch without targets."""

    def pool(self, hidden_states: Tensor, batch: Batch) -> Tensor:
        """Make one state of each history's: (B, T, D) -> (B, D). The last by default, as decoders look back."""
        return hidden_states[torch.arange(batch.samples), batch.lengths - 1]

    @abstractmethod
    def queries(self, hidden_states: Tensor, ends: Mapping[str, Tensor]) -> Tensor:
        """Place last-block states in the space of comparison: (..., D) -> (..., width), each of length 1."""

    @abstractmethod
    def items(self, ends: Mapping[str, Tensor], chosen: Tensor | None = None) -> Tensor:
        """Place items in the space of comparison: (M, width), each of length 1.

        Args:
            ends: What is trained at the output end.
            chosen: (M,) item numbers; the whole catalog when absent.
        """


BackboneT = TypeVar("BackboneT", bound=Backbone)

BACKBONES: dict[str, type[Backbone]] = {}


def register(backbone: type[BackboneT]) -> type[BackboneT]:
    """Register a backbone under its ``name``; used as a decorator."""
    BACKBONES[backbone.name] = backbone
    return backbone


def backbone_kind(name: str) -> type[Backbone]:
    """Find a registered backbone.

    Raises:
        ConfigError: No backbone has that name.
    """
    from pplr.backbones import causal_lm, encoder, item_vectors  # noqa: F401  (they register themselves)

    try:
        return BACKBONES[name]
    except KeyError:
        raise ConfigError(f"no backbone is called {name!r}", cure=nearest(name, BACKBONES)) from None


def load_backbone(config: BackboneConfig, notify: Callable[[str], None] = lambda _: None) -> Backbone:
    """Load the backbone that a configuration names.

    Raises:
        ConfigError: No backbone has that name.
        BackboneError: The model cannot be loaded.
    """
    return backbone_kind(config.name).load(config, notify)
