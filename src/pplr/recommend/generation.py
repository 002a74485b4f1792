"""Titles written token by token, by a model that may be cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor

from pplr.backbones.causal_lm import CausalLM
from pplr.recommend.beam_search import search
from pplr.recommend.decoding import beams_of, padded_left
from pplr.stages.client_model import ClientModel

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
    opening: Sequence[int] = (),
) -> Generated:
    """Write on after prompts, greedily or by beam search, as ``generate`` of transformers does.

    Prompts run through the model once for all their beams, what they begin with alike once for all prompts, and who
    is done leaves the batch.

    Args:
        model: A client's model with a ``causal_lm`` backbone.
        prompts: B token sequences.
        beams: Width of the search; 1 is greedy.
        max_new_tokens: Longest answer.
        stop_tokens: Tokens that end an answer besides the end token.
        returned: Best sequences returned for each prompt, at most ``beams``.
        length_penalty: Exponent of the length by which a beam's score is divided.
        processors: Constraints, such as :class:`pplr.recommend.trie.TrieConstraint`; see
            :func:`pplr.recommend.beam_search.search`.
        opening: What every prompt begins with, whoever it is about; what the model makes of it is kept between calls,
            see :meth:`~pplr.stages.client_model.ClientModel.opening`.
    """
    backbone = model.backbone
    if not isinstance(backbone, CausalLM):
        raise TypeError(f"only causal_lm generates, not {type(backbone).__name__}")
    padded, _ = padded_left(prompts, backbone.pad_token)
    with model.generation() as generation:
        found = search(
            beams_of(model, generation, prompts, opening),
            padded.to(backbone.device),
            width=beams,
            longest=max_new_tokens,
            ends=list(dict.fromkeys([backbone.end_token, *stop_tokens])),
            length_penalty=length_penalty,
            processors=processors,
        )
    written = int(found.lengths[:, :returned].max())
    sequences = found.sequences[:, :returned, : padded.shape[1] + written].flatten(0, 1)
    scores = found.scores[:, :returned].flatten() if beams > 1 and returned > 1 else None
    return Generated(sequences, scores, padded.shape[1])
