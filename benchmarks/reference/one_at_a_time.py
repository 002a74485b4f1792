"""The usual way to evaluate: one user at a time, ``generate`` of transformers on the whole model, then grounding."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import set_peft_model_state_dict
from torch import Tensor
from transformers import GenerationConfig

from benchmarks.reference.usual_loop import usual_model
from pplr.backbones.causal_lm import CausalLM
from pplr.config import AdapterConfig
from pplr.data.interactions import Catalog
from pplr.data.prompts import Case, shown_title


class OneAtATime:
    """Ranks the catalog for a user by the distance of the written text to every title, batch of one.

    Args:
        backbone: For its tokenizer, prompts and frozen model, which PEFT wraps in place.
        config: LoRA's settings.
        state: The adapter.
        beams: Width of the search.
        max_new_tokens: Longest answer; nothing but the end token ends one sooner.
    """

    def __init__(
        self,
        backbone: CausalLM,
        config: AdapterConfig,
        state: Mapping[str, Tensor],
        *,
        beams: int = 4,
        max_new_tokens: int = 128,
    ) -> None:
        self._backbone = backbone
        self._model = usual_model(backbone.model, config).eval()
        set_peft_model_state_dict(self._model, {name: tensor.clone() for name, tensor in state.items()})
        self._settings = GenerationConfig(
            num_beams=beams,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=backbone.end_token,
            pad_token_id=backbone.end_token,
        )
        self.written: list[int] = []

    def stopping_at(self, stop_tokens: Sequence[int]) -> OneAtATime:
        """Return the same, around the same model, for which these tokens end an answer as the end token does."""
        other = copy.copy(self)
        other._settings = copy.deepcopy(self._settings)
        other._settings.eos_token_id = [self._backbone.end_token, *stop_tokens]
        other.written = []
        return other

    @torch.no_grad()
    def embed(self, text: str) -> Tensor:
        """Embed a text by the base model, adapters off: (D,), the last token's state after the final norm."""
        tokens = torch.tensor([self._backbone.text_tokens(text)])
        with self._model.disable_adapter():
            states = self._model(input_ids=tokens, output_hidden_states=True).hidden_states[-1]
        return states[0, -1].float()

    def titles(self, catalog: Catalog) -> Tensor:
        """Embed the catalog's titles, one at a time: (N, D)."""
        return torch.stack([self.embed(shown_title(title)) for title in catalog.titles])

    @torch.no_grad()
    def write(self, prompt: Sequence[int]) -> str:
        """Write on after a prompt and read the first line as a title."""
        tokens = torch.tensor([list(prompt)])
        told: Any = self._model.generate(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), generation_config=self._settings
        )
        answer = told[0, tokens.shape[1] :].tolist()
        self.written.append(len(answer))
        return self._backbone.read_answer(answer)

    def scores(self, case: Case, titles: Tensor, catalog: Catalog, history_items: int) -> NDArray[np.float32]:
        """Score every item for one user: (N,)."""
        history = [catalog.titles[item] for item in case.history[-history_items:]]
        text = self.write(self._backbone.prompt_tokens(history, self._backbone.answer_room(catalog)))
        if not text:
            return np.zeros(len(catalog), dtype=np.float32)
        return np.asarray(-(titles - self.embed(text)).norm(dim=1).numpy(), dtype=np.float32)
