"""The blocks of encoders of the BERT layout: BERT's and RoBERTa's, and Longformer's with its windows."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from pplr.backbones.arithmetic import widen
from pplr.backbones.attention import ATTENTION
from pplr.backbones.base import Blocks, span_tensors
from pplr.errors import BackboneError

__all__ = ["EncoderBlocks", "shorten"]


class _PassThrough(nn.Module):
    """Stands where embeddings were: what comes in is embedded already."""

    def forward(self, inputs_embeds: Tensor, **_: Any) -> Tensor:
        return inputs_embeds


class EncoderBlocks(Blocks):
    """A span of an encoder's blocks: a small model of the same HF class, around the same frozen tensors.

    Args:
        whole: The encoder that holds every block.
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
        self.windows: list[int] = []
        if config.model_type == "longformer":
            self.windows = _windows(config)
            self.config.attention_window = self.windows[span.start : span.stop]
        with init_empty_weights(include_buffers=False):
            inner = type(whole)(self.config, add_pooling_layer=False)
        inner.embeddings = _PassThrough()
        inner.load_state_dict(span_tensors(whole.encoder.layer, span, "encoder.layer"), assign=True)
        inner.requires_grad_(False)
        inner.eval()
        widen(inner)
        self.inner = inner
        self.layers = inner.encoder.layer
        self.keeps_apart = self.config._attn_implementation == ATTENTION and not self.windows

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        """Run the blocks: (B, T, D) -> (B, T, D)."""
        if len(self.layers) == 0:
            return hidden_states
        if attention_mask is None:
            attention_mask = torch.ones(hidden_states.shape[:2], dtype=torch.long, device=hidden_states.device)
        if not self.windows:
            return self.inner(inputs_embeds=hidden_states, attention_mask=attention_mask).last_hidden_state
        return self._over_windows(hidden_states, attention_mask)

    def _over_windows(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        """Run Longformer's blocks: the first token sees all and is seen by all, others see their window."""
        tokens, window = hidden_states.shape[1], max(self.windows)
        more = -tokens % window
        states = F.pad(hidden_states, (0, 0, 0, more))
        real = F.pad(attention_mask, (0, more)).bool()
        strength = torch.zeros(real.shape, dtype=states.dtype, device=states.device)
        strength.masked_fill_(~real, torch.finfo(states.dtype).min)
        strength[:, 0] = torch.finfo(states.dtype).max
        return self.inner.encoder(states, attention_mask=strength, padding_len=more).last_hidden_state


def _windows(config: Any) -> list[int]:
    """Return each block's window; those of the whole model decide how far sequences are padded, for every cut."""
    given = config.attention_window
    return [given] * config.num_hidden_layers if isinstance(given, int) else list(given)


def shorten(model: PreTrainedModel, blocks: int) -> None:
    """Keep an encoder's first blocks.

    Raises:
        BackboneError: It has fewer.
    """
    config = cast(Any, model.config)
    if blocks > config.num_hidden_layers:
        raise BackboneError(
            f"backbone.keep_blocks is {blocks}, and the model has {config.num_hidden_layers} blocks",
            cure="Lower it, or set it to null for all.",
        )
    if config.model_type == "longformer":
        config.attention_window = _windows(config)[:blocks]
    model.encoder.layer = cast(Any, model).encoder.layer[:blocks]
    config.num_hidden_layers = blocks
