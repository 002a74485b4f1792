"""Tiny models of real families, a small catalog, samples of it, and random adapters."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from pplr.backbones.adapters import AdapterState
from pplr.backbones.causal_lm import CausalLM
from pplr.backbones.encoder import Encoder
from pplr.config import AdapterConfig, EncoderConfig, PromptConfig
from pplr.data.interactions import Catalog
from pplr.data.prompts import Sample
from pplr.stages.cut import CutPlan

__all__ = [
    "every_cut",
    "peft_model",
    "random_adapter",
    "tiny_backbone",
    "tiny_catalog",
    "tiny_decoder",
    "tiny_encoder",
    "tiny_samples",
    "tiny_tokenizer",
]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Make a byte-level tokenizer of 258 tokens: the bytes, the end token 256 and the padding token 257."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<end>",  # noqa: S106
        pad_token="<pad>",  # noqa: S106
        cls_token="<end>",  # noqa: S106
    )


def tiny_decoder(
    family: str = "llama", *, layers: int = 4, width: int = 32, seed: int = 0, **options: Any
) -> PreTrainedModel:
    """Make a random decoder of a family, in float32, with weights large enough that every layer matters."""
    defaults: dict[str, Any] = {
        "vocab_size": 258,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": width // 4,
        "max_position_embeddings": 1024,
        "bos_token_id": None,
        "eos_token_id": 256,
        "pad_token_id": 257,
        "initializer_range": 0.2,
        "attn_implementation": "sdpa",
    }
    config = AutoConfig.for_model(family, **(defaults | options))
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    finally:
        torch.random.set_rng_state(state)
    return model.eval()


def tiny_backbone(family: str = "llama", *, targets: Literal["one", "all"] = "one", **options: Any) -> CausalLM:
    """Make a random ``causal_lm`` backbone with the byte-level tokenizer."""
    model, prompt = tiny_decoder(family, **options), PromptConfig(targets=targets)
    return CausalLM(model, tiny_tokenizer(), prompt=prompt, max_tokens=512, folder=f"tiny-{family}")


def tiny_encoder(
    family: str = "bert", config: EncoderConfig | None = None, *, max_tokens: int = 128, seed: int = 0, **options: Any
) -> Encoder:
    """Make a random ``encoder`` backbone of a family, in float32, with the byte-level tokenizer."""
    defaults: dict[str, Any] = {
        "vocab_size": 258,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 160,
        "type_vocab_size": 2 if family == "bert" else 1,
        "pad_token_id": 0 if family == "bert" else 1,
        "initializer_range": 0.2,
    }
    if family == "longformer":
        defaults["attention_window"] = 8
    settings = AutoConfig.for_model(family, **(defaults | options))
    attention = "eager" if family == "longformer" else "sdpa"
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = AutoModel.from_config(settings, attn_implementation=attention, add_pooling_layer=False)
    finally:
        torch.random.set_rng_state(state)
    return Encoder(model, tiny_tokenizer(), config, max_tokens=max_tokens, folder=f"tiny-{family}")


def tiny_catalog() -> Catalog:
    """Make a catalog of eight items, two of which share a title."""
    titles = ("Ash", "Birch", "Cedar", "Copper Beech", "Elm", "Oak", "Oak", "Yew")
    return Catalog(tuple(f"t{number}" for number in range(len(titles))), titles)


def tiny_samples() -> list[Sample]:
    """Make six samples of the tiny catalog, with histories of one to four items."""
    walks = [(0, 3), (1, 2, 4), (5, 7, 0, 3), (2, 6), (7, 1, 3, 5, 0), (4, 2, 1)]
    return [Sample(user, walk[:-1], walk[-1]) for user, walk in enumerate(walks)]


def every_cut(total_layers: int) -> list[CutPlan]:
    """List every way to cut a model of ``total_layers`` blocks, the uncut model last.

    Example:
        >>> [(plan.input_layers, plan.output_layers) for plan in every_cut(2)]
        [(0, 0), (0, 1), (1, 0), (2, 0)]
    """
    cuts = [CutPlan(k, m, total_layers) for k in range(total_layers) for m in range(total_layers - k)]
    return [*cuts, CutPlan.make(None, total_layers)]


def random_adapter(shapes: Mapping[str, tuple[int, ...]], seed: int = 0, scale: float = 0.2) -> AdapterState:
    """Draw an adapter that changes every block: A and B both normal, with standard deviation ``scale``."""
    source = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=source) for name, shape in shapes.items()}


def peft_model(backbone: CausalLM, config: AdapterConfig, state: Mapping[str, Tensor]) -> PeftModel:
    """Make the uncut model with an adapter, by transformers and PEFT alone: the truth that every cut must equal."""
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type,unused-ignore]
        target_modules=list(config.target_modules),
        lora_dropout=config.dropout,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        model = get_peft_model(copy.deepcopy(backbone.model), lora)
    set_peft_model_state_dict(model, {name: tensor.clone() for name, tensor in state.items()})
    return model.eval()
