"""BIGRec's backbone: a decoder reads a history of titles and writes the next one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar, Literal, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from pplr.backbones.arithmetic import widen
from pplr.backbones.attention import ATTENTION
from pplr.backbones.base import Backbone, Batch, Blocks, register, span_tensors
from pplr.backbones.bundles import base_fingerprint
from pplr.backbones.loading import load_pretrained
from pplr.backbones.losses import head_loss
from pplr.backbones.norms import freeze_norms
from pplr.backbones.shared_row import SharedRow, common_prefix
from pplr.backbones.titles import EncodedSample, ListTokens, PromptTokens
from pplr.config import BackboneConfig, PromptConfig
from pplr.data.interactions import Catalog
from pplr.data.prompts import PromptTemplate, Sample
from pplr.errors import BackboneError, UnsupportedModelError

__all__ = ["FAMILIES", "CausalLM", "DecoderBlocks", "EncodedSample"]

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Model families whose cut is verified equal to the uncut model, as HF's ``model_type``."""


class DecoderBlocks(Blocks):
    """A span of a decoder's blocks: a small model of the same HF class, around the same frozen tensors.

    Masks, rotary embeddings and caches are transformers' own. Embeddings and the final norm are left out.

    Args:
        whole: The inner model (``model.model``) that holds every block.
        config: Its configuration.
        span: The blocks to hold, half-open like ``range``.
    """

    def __init__(self, whole: Any, config: PretrainedConfig, span: range) -> None:
        super().__init__()
        self.first_layer = span.start
        self.config = copy.deepcopy(config)
        self.config.num_hidden_layers = len(span)
        if self.config._attn_implementation == "sdpa":
            self.config._attn_implementation = ATTENTION
        if getattr(self.config, "layer_types", None) is not None:
            self.config.layer_types = list(config.layer_types[span.start : span.stop])
        with init_empty_weights(include_buffers=False):
            inner = type(whole)(self.config)
        inner.embed_tokens = nn.Identity()
        inner.norm = nn.Identity()
        tensors = span_tensors(whole.layers, span, "layers")
        inner.load_state_dict(tensors, assign=True)
        inner.rotary_emb.to(next(iter(tensors.values())).device if tensors else "cpu")
        inner.requires_grad_(False)
        inner.eval()
        widen(inner)
        freeze_norms(inner)
        self.inner = inner
        self.layers = inner.layers
        rotary = getattr(inner.rotary_emb, "rope_type", "default")
        longest_decides = rotary in ("dynamic", "longrope")  # how far positions turn depends on the longest sequence
        self.keeps_apart = self.config._attn_implementation == ATTENTION and not longest_decides

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: DynamicCache | None = None,
    ) -> Tensor:
        """Run the blocks: (B, T, D) -> (B, T, D)."""
        if len(self.layers) == 0:
            return hidden_states
        return self.inner(
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state

    @contextmanager
    def recomputing(self, prepare: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
        """Run each half of a block, with its norm, again in the backward pass.

        Halves rather than blocks, so that the backward pass holds the activations of attention or of the feed-forward
        layer at a time. That costs one more hidden state for each block, and no more computing.
        """

        def checkpointed(norm: Callable[[Tensor], Tensor], own: Callable[..., Any]) -> Callable[..., Any]:
            def half(hidden_states: Tensor, **options: Any) -> Any:
                def prepared(hidden_states: Tensor) -> Any:
                    with prepare():
                        return own(norm(hidden_states), **options)

                return checkpoint(prepared, hidden_states, use_reentrant=False, preserve_rng_state=False)

            return half

        layers: list[Any] = list(self.layers)
        halves = [(layer.input_layernorm, layer.self_attn) for layer in layers]
        halves += [(layer.post_attention_layernorm, layer.mlp) for layer in layers]
        for norm, own in halves:
            own.forward = checkpointed(norm.forward, own.forward)
            norm.forward = _same
        try:
            yield
        finally:
            for norm, own in halves:
                del norm.forward, own.forward


def _same(hidden_states: Tensor) -> Tensor:
    return hidden_states


def _shorten(model: PreTrainedModel, blocks: int) -> None:
    """Keep a decoder's first blocks."""
    total = model.config.num_hidden_layers
    if blocks > total:
        raise BackboneError(
            f"backbone.keep_blocks is {blocks}, and the model has {total} blocks",
            cure="Lower it, or set it to null for all.",
        )
    inner = cast(Any, model).model
    inner.layers = inner.layers[:blocks]
    for config in {id(own): own for own in (model.config, inner.config)}.values():
        config.num_hidden_layers = blocks
        if getattr(config, "layer_types", None) is not None:
            config.layer_types = list(config.layer_types[:blocks])


@register
class CausalLM(Backbone):
    """A decoder of the Llama-like layout, trained to write the next title after a history.

    Args:
        model: The frozen HF model.
        tokenizer: Its tokenizer; ``None`` for a server's bundle, which handles no text.
        prompt: Words around a history.
        max_tokens: Longest prompt with its answer.
        folder: Where the model was loaded from, a folder or a hub id.

    Raises:
        UnsupportedModelError: The model's family is not verified.
    """

    name: ClassVar[str] = "causal_lm"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        prompt: PromptConfig | None = None,
        max_tokens: int = 512,
        folder: str = "",
    ) -> None:
        if model.config.model_type not in FAMILIES:
            raise UnsupportedModelError(
                f"models of the family {model.config.model_type!r} are not verified for causal_lm",
                cure=f"Choose a model of one of these families: {', '.join(FAMILIES)}.",
            )
        if tokenizer is not None and tokenizer.eos_token_id is None:
            raise BackboneError(
                f"the tokenizer of {folder or 'the model'} has no end token",
                cure="Choose a model whose tokenizer has one.",
            )
        self.model = model.requires_grad_(False).eval()
        widen(self.model.lm_head)
        self.template = PromptTemplate(prompt or PromptConfig())
        self.max_tokens = max_tokens
        self.folder = folder
        self.total_layers = model.config.num_hidden_layers
        self.hidden_size = model.config.hidden_size
        held = next(tensor for tensor in model.state_dict().values() if not tensor.is_meta)
        self.dtype, self.device = held.dtype, held.device
        self._titles: PromptTokens | None = None
        if tokenizer is None:
            return
        probe = tokenizer("x").input_ids
        starts = tokenizer.bos_token_id is not None and probe[:1] == [tokenizer.bos_token_id]
        start: tuple[int, ...] = (tokenizer.bos_token_id,) if starts else ()
        self.end_token = tokenizer.eos_token_id
        kind = ListTokens if self.template.is_list else PromptTokens
        self._titles = kind(tokenizer, self.template, start, self.end_token)
        pad = tokenizer.pad_token_id
        self.pad_token = self.end_token if pad is None else pad

    @property
    def titles(self) -> PromptTokens:
        """Prompts and answers in tokens.

        Raises:
            BackboneError: This is a server's bundle, which handles no text.
        """
        if self._titles is None:
            raise BackboneError(f"{self.folder} is a server's bundle and handles no text", cure="Use the client's.")
        return self._titles

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, which a server's bundle has none of."""
        return self.titles.tokenizer

    @classmethod
    def load(cls, config: BackboneConfig, notify: Callable[[str], None] = lambda _: None) -> CausalLM:
        """Load a short name, a hub id, a folder or a GGUF file; see :func:`~pplr.backbones.loading.load_pretrained`."""
        model, tokenizer, folder = load_pretrained(config, FAMILIES, notify)
        if config.keep_blocks is not None:
            _shorten(model, config.keep_blocks)
        return cls(model, tokenizer, prompt=config.prompt, max_tokens=config.max_tokens, folder=folder)

    @classmethod
    def samples_of(cls, config: BackboneConfig) -> Literal["target", "history", "user"]:
        """Say what a sample is: one target, or a history where prompts are lists."""
        return "history" if config.prompt.targets == "all" else "target"

    def blocks(self, span: range) -> DecoderBlocks:
        """Build the blocks of a span; the frozen tensors are shared."""
        return DecoderBlocks(self.model.model, self.model.config, span)

    def block(self, number: int) -> nn.Module:
        """Return a frozen block."""
        return cast(nn.Module, self.model.model.layers[number])

    def new_cache(self, blocks: Blocks) -> DynamicCache:
        """Make an empty cache of the span's own layer types."""
        return DynamicCache(config=cast(DecoderBlocks, blocks).config)

    @property
    def takes_masks(self) -> bool:
        """Whether a mask alone says what a token sees: blocks look back without a limit, and take any mask."""
        config = self.model.config
        return config._attn_implementation == "sdpa" and not any(DynamicCache(config=config).is_sliding)

    # -- text to tokens ---------------------------------------------------------------------------------------

    def prompt_tokens(self, titles: Sequence[str], reserve: int) -> tuple[int, ...]:
        """Encode a history as a prompt that leaves room for an answer.

        Args:
            titles: The history, oldest first. While the prompt is too long the oldest title is left out.
            reserve: Tokens to leave for the answer.

        Raises:
            DataError: There is no history, or even its newest title alone does not fit ``max_tokens``.
        """
        return self.titles.prompt(titles, reserve, self.max_tokens)[0]

    @property
    def opening(self) -> tuple[int, ...]:
        """The tokens that every prompt begins with, whatever the history: they tell of no user."""
        return self.titles.whole_prompt(["A"])[: self.titles.opening]

    def answer_tokens(self, title: str) -> tuple[int, ...]:
        """Encode a title as the answer, with the token that ends it."""
        return self.titles.answer(title)

    @property
    def answer_end(self) -> int:
        """The token that ends an answer, and is nowhere else in it."""
        return self.titles.end

    def answer_room(self, catalog: Catalog) -> int:
        """Count the tokens of a catalog's longest answer, for which every prompt leaves room."""
        return self.titles.room(catalog)

    def text_tokens(self, text: str) -> tuple[int, ...]:
        """Encode a text by itself, as it is embedded for grounding."""
        return self.titles.start + self.titles.tokens(text)

    def divide(self, samples: Sequence[Sample], catalog: Catalog) -> list[Sample]:
        """Divide lists that are longer than ``max_tokens``, so that every title but a user's first is a target once."""
        return self.titles.windows(samples, catalog, self.max_tokens)

    def encode(self, samples: Sequence[Sample], catalog: Catalog, history_items: int) -> list[EncodedSample]:
        """Encode samples; histories longer than ``history_items`` or ``max_tokens`` keep their newest items."""
        return self.titles.encode_all(samples, catalog, history_items, self.max_tokens)

    def length(self, encoded: EncodedSample) -> int:
        """Count prompt and targets."""
        return len(encoded.prompt) + len(encoded.answer)

    def collate(self, encoded: Sequence[EncodedSample]) -> Batch:
        """Pad on the right; the answer's tokens are the targets."""
        return self.pad([s.prompt + s.answer for s in encoded], [len(s.prompt) for s in encoded])

    def collate_row(self, encoded: Sequence[EncodedSample]) -> Batch:
        """Put samples in one row without padding, and what every prompt begins with once in front.

        Where histories begin alike too, that is not shared: how long it is would tell of users. The last token of a
        sample is asked for and stands before nothing, so it is no part of the row.
        """
        shared = min(self.titles.opening, common_prefix([s.prompt for s in encoded]))
        rests = [(s.prompt + s.answer)[shared:] for s in encoded]
        row = SharedRow(shared, tuple(len(rest) - 1 for rest in rests))
        tokens = [*encoded[0].prompt[:shared], *(token for rest in rests for token in rest[:-1])]
        asked = [False] * shared
        for sample, rest in zip(encoded, rests, strict=True):
            asked += [False] * (len(rest) - 1 - len(sample.answer)) + [True] * len(sample.answer)
        return Batch(
            torch.tensor([tokens], device=self.device),
            torch.tensor([row.tokens]),
            torch.tensor([asked], device=self.device),
            torch.tensor([token for sample in encoded for token in sample.answer], device=self.device),
            row,
        )

    def pad(self, rows: Sequence[Sequence[int]], first_target: Sequence[int] | None = None) -> Batch:
        """Pad token rows on the right to a batch.

        Args:
            rows: B token sequences.
            first_target: For each row the position from which tokens are targets; none when absent.
        """
        longest = max(len(row) for row in rows)
        input_ids = torch.full((len(rows), longest), self.pad_token, dtype=torch.long)
        is_target = torch.zeros(len(rows), longest, dtype=torch.bool)
        for number, row in enumerate(rows):
            input_ids[number, : len(row)] = torch.tensor(row)
            if first_target is not None:
                is_target[number, first_target[number] : len(row)] = True
        lengths = torch.tensor([len(row) for row in rows])
        return Batch(input_ids.to(self.device), lengths, is_target.to(self.device))

    # -- tokens to states, states to loss ---------------------------------------------------------------------

    def embed(
        self, input_ids: Tensor, ends: Mapping[str, Tensor] | None = None, dropout_seed: int | None = None
    ) -> Tensor:
        """Look up token embeddings: (B, T) -> (B, T, D)."""
        return self.model.model.embed_tokens(input_ids)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Apply the final norm and the head: (..., D) -> (..., V)."""
        return self.model.lm_head(self.final_states(hidden_states))

    def final_states(self, hidden_states: Tensor) -> Tensor:
        """Apply the final norm: (..., D) -> (..., D)."""
        return self.model.model.norm(hidden_states)

    def loss(self, hidden_states: Tensor, batch: Batch, ends: Mapping[str, Tensor] | None = None) -> Tensor:
        """Sum the cross-entropy over answer tokens; the head runs only where one is predicted."""
        if batch.row is not None and batch.labels is not None:
            before, labels = hidden_states[batch.is_target], batch.labels
        else:
            before = hidden_states[:, :-1][batch.is_target[:, 1:]]  # (M, D), the states that predict answer tokens
            labels = batch.input_ids[:, 1:][batch.is_target[:, 1:]]  # (M,)
        return head_loss(self.model.lm_head, self.final_states(before), labels)

    def end_flops(self, batch: Batch) -> int:
        """Count the frozen head's two products, of states and of their gradients: 4 M D V."""
        return 4 * batch.targets * self.hidden_size * self.model.config.vocab_size

    def read_answer(self, tokens: Sequence[int]) -> str:
        """Read a generated answer as a title: its first line, without the quotes around it."""
        text = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text.strip().split("\n")[0].strip().strip('"').strip()

    def client_bytes(self) -> int:
        """Bytes of embeddings, norm and head; tied tensors count once."""
        parts = [self.model.model.embed_tokens, self.model.model.norm, self.model.lm_head]
        tensors = {p.data_ptr(): p.nbytes for part in parts for p in part.parameters()}
        return sum(tensors.values())

    def fingerprint(self) -> str:
        """Hash every frozen tensor with its name and dtype; for a bundle, the base it was cut from."""
        return base_fingerprint(self.model, self.folder, self.total_layers, self.dtype)
