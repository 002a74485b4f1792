"""Titles written token by token: HF ``generate``, with every stage's keys and values where the stage is."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from pplr.backbones.causal_lm import CausalLM
from pplr.stages.model import ClientModel, GenerationCache
from pplr.stages.stage import StageCall

__all__ = ["Generated", "generate"]


@dataclass(frozen=True)
class Generated:
    """What a search wrote.

    Args:
        sequences: (B · returned, T) tokens, prompt included, padded on the left before it and by ends after it.
        scores: (B · returned,) sums of log-probabilities, divided by length^length_penalty; ``None`` where one
            sequence is returned.
        prompt_length: Tokens of the padded prompts.
    """

    sequences: Tensor
    scores: Tensor | None
    prompt_length: int


class _StagedCache(DynamicCache):
    """The caches of all stages, as the one cache that ``generate`` knows."""

    def __init__(self, model: ClientModel, caches: GenerationCache) -> None:
        super().__init__()
        self._model = model
        self.caches = caches
        self.tokens = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.tokens

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._model.reorder(self.caches, beam_idx)


class _CutDecoder(PreTrainedModel, GenerationMixin):
    """A cut model in the shape that ``generate`` of transformers drives; it owns no tensor."""

    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, model: ClientModel, backbone: CausalLM) -> None:
        super().__init__(copy.deepcopy(backbone.model.config))
        self._model = (model,)
        self._backbone = (backbone,)  # in tuples, so that torch does not register their tensors
        self.generation_config = GenerationConfig()

    @property
    def device(self) -> torch.device:
        return self._backbone[0].device

    @property
    def dtype(self) -> torch.dtype:
        return self._backbone[0].dtype

    def forward(
        self,
        input_ids: Tensor,
        past_key_values: _StagedCache,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Run new tokens (B, T) after the cached ones; logits of the last position only, (B, 1, V)."""
        if attention_mask is None:  # transformers leaves a mask of ones out for a single row
            attention_mask = input_ids.new_ones(len(input_ids), past_key_values.tokens + input_ids.shape[1])
        states = _run(self._model[0], input_ids, attention_mask, past_key_values)
        logits = self._backbone[0].logits(states[:, -1:])
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)


def _run(model: ClientModel, input_ids: Tensor, attention_mask: Tensor, cache: _StagedCache) -> Tensor:
    positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
    call = StageCall(attention_mask=attention_mask, position_ids=positions)
    states = model.decode(input_ids, call, cache.caches)
    cache.tokens += input_ids.shape[1]
    return states


@torch.no_grad()
def generate(
    model: ClientModel,
    prompts: Sequence[Sequence[int]],
    *,
    beams: int = 1,
    max_new_tokens: int,
    stop_tokens: Sequence[int] = (),
    returned: int = 1,
    length_penalty: float = 1.0,
    processors: Sequence[LogitsProcessor] = (),
) -> Generated:
    """Write on after prompts, greedily or by beam search.

    Prompts run through the model once, before the beams part, and not once for each beam.

    Args:
        model: A client's model with a ``causal_lm`` backbone.
        prompts: B token sequences.
        beams: Width of the search; 1 is greedy.
        max_new_tokens: Longest answer.
        stop_tokens: Tokens that end an answer besides the end token.
        returned: Best sequences returned for each prompt, at most ``beams``.
        length_penalty: Exponent of the length by which a beam's score is divided.
        processors: Constraints, such as :class:`pplr.recommend.trie.TrieConstraint`.
    """
    backbone = model.backbone
    if not isinstance(backbone, CausalLM):
        raise TypeError(f"only causal_lm generates, not {type(backbone).__name__}")
    longest = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), longest), backbone.pad_token, device=backbone.device)
    mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    with model.generation() as caches:
        cache = _StagedCache(model, caches)
        if longest > 1:
            _run(model, input_ids[:, :-1], mask[:, :-1], cache)
            if beams > 1:
                rows = torch.arange(len(prompts), device=backbone.device).repeat_interleave(beams)
                cache.reorder_cache(rows)
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            num_beams=beams,
            num_return_sequences=returned,
            do_sample=False,
            length_penalty=length_penalty,
            eos_token_id=list(dict.fromkeys([backbone.end_token, *stop_tokens])),
            pad_token_id=backbone.end_token,
            return_dict_in_generate=True,
            output_scores=beams > 1 and returned > 1,  # keeps (steps, B · beams, V), so only where scores are read
        )
        written = _CutDecoder(model, backbone).generate(
            input_ids,
            attention_mask=mask,
            past_key_values=cache,
            generation_config=config,
            logits_processor=LogitsProcessorList(processors),
        )
    scores = written.sequences_scores if beams > 1 and returned > 1 else None
    return Generated(written.sequences, scores, longest)
